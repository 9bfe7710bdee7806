"""The methods that the demo compares: each takes a fresh classifier and gives back a trained one and its outcome."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from tucka.demo.data import Sentence, Split
from tucka.demo.model import Collator, FeatureHead, Item, SentenceClassifier
from tucka.demo.plan import HEAD_ONLY, LORA, MAJORITY, TUCKA, Outcome, Plan
from tucka.demo.training import accuracy, features, predict, train
from tucka.peft import RouterCallback, TuckAConfig, expert_load

__all__ = ["Data", "Trained", "run_head_only", "run_lora", "run_majority", "run_tucka"]

# Query, value and all dense layers of the encoder.
_TARGETS = ["query", "value", "dense"]


@dataclass(frozen=True)
class Data:
    """Tokenised sentences.

    Parameters
    ----------
    train : list of dict
        From `tucka.demo.model.encode`.
    test : dict of str to list of dict
        By domain.
    collator : Collator
        Makes batches of them.
    """

    train: list[Item]
    test: dict[str, list[Item]]
    collator: Collator


@dataclass(frozen=True)
class Trained:
    """A trained model with its outcome and its predictions.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    outcome : Outcome
        What it cost and reached.
    logits : dict of str to Tensor
        Of the test sentences, by domain.
    """

    model: Any
    outcome: Outcome
    logits: dict[str, torch.Tensor]


def run_majority(split: Split) -> Outcome:
    """Say of every sentence what most training sentences of its domain are: the floor for all methods.

    Parameters
    ----------
    split : Split
        The sentences.

    Returns
    -------
    Outcome
        Without cost.
    """
    counts = Counter((sentence.domain, sentence.label) for sentence in split.train)

    def right(domain: str, sentences: Sequence[Sentence]) -> float:
        said = int(counts[domain, 1] > counts[domain, 0])
        return sum(sentence.label == said for sentence in sentences) / len(sentences)

    return Outcome(MAJORITY, "", {domain: right(domain, sentences) for domain, sentences in split.test.items()})


def run_head_only(
    classifier: SentenceClassifier, data: Data, plan: Plan, callbacks: Sequence[TrainerCallback] = ()
) -> Trained:
    """Train the head on what the frozen encoder says, which is computed once.

    Parameters
    ----------
    classifier : SentenceClassifier
        Its head is trained in place.
    data : Data
        The sentences.
    plan : Plan
        The sizes.
    callbacks : sequence of TrainerCallback
        For progress.

    Returns
    -------
    Trained
        The classifier and its outcome; the seconds include the pooling of the training sentences.
    """
    started = time.perf_counter()
    pooled = features(classifier, data.train, data.collator)
    spent = time.perf_counter() - started
    head = FeatureHead(classifier.head)
    rate = plan.learning_rates[HEAD_ONLY]
    trained = train(head, pooled, plan, learning_rate=rate, collator=data.collator, callbacks=callbacks)
    logits = {domain: predict(classifier, items, data.collator) for domain, items in data.test.items()}
    outcome = Outcome(
        HEAD_ONLY,
        "",
        accuracy(logits, data.test),
        head_parameters=_trainable(head),
        seconds=spent + trained.seconds,
        learning_rate=rate,
        log=trained.log,
    )
    return Trained(classifier, outcome, logits)


def run_lora(
    classifier: SentenceClassifier, data: Data, plan: Plan, callbacks: Sequence[TrainerCallback] = ()
) -> Trained:
    """Train PEFT's LoRA and the head.

    Parameters
    ----------
    classifier : SentenceClassifier
        Adapted in place.
    data : Data
        The sentences.
    plan : Plan
        The sizes.
    callbacks : sequence of TrainerCallback
        For progress.

    Returns
    -------
    Trained
        The PEFT model and its outcome.
    """
    config = LoraConfig(r=plan.rank, lora_alpha=2 * plan.rank, target_modules=list(_TARGETS), modules_to_save=["head"])
    return _run_adapter(LORA, f"r={plan.rank}", config, classifier, data, plan, callbacks)


def run_tucka(
    classifier: SentenceClassifier, data: Data, plan: Plan, callbacks: Sequence[TrainerCallback] = ()
) -> Trained:
    """Train TuckA and the head; every sentence gets its own route.

    Parameters
    ----------
    classifier : SentenceClassifier
        Adapted in place.
    data : Data
        The sentences.
    plan : Plan
        The sizes.
    callbacks : sequence of TrainerCallback
        For progress; they see the load of the expert groups in the logs.

    Returns
    -------
    Trained
        The PEFT model and its outcome, with the load of the expert groups.
    """
    config = TuckAConfig(
        r=plan.rank,
        k=plan.groups,
        t=2,
        p=2,
        routing="sample",
        router_seed=plan.seed,
        target_modules=list(_TARGETS),
        modules_to_save=["head"],
    )
    # Its own bar would tear the demo's; a few hundred sentences show the directions in which all of them differ.
    observers = [RouterCallback(max_batches=16, progress=False), *callbacks]
    sizes = f"r={plan.rank} k={plan.groups}"
    return _run_adapter(TUCKA, sizes, config, classifier, data, plan, observers, load_of=_take_load)


def _take_load(model: nn.Module) -> list[float]:
    """Return the groups' counts and start counting anew."""
    return [float(count) for count in expert_load(model, reset=True)]


def _run_adapter(
    method: str,
    sizes: str,
    config: Any,
    classifier: SentenceClassifier,
    data: Data,
    plan: Plan,
    callbacks: Sequence[TrainerCallback],
    *,
    load_of: Callable[[nn.Module], list[float]] | None = None,
) -> Trained:
    torch.manual_seed(plan.seed)  # adapters start at random
    model: PeftModel = get_peft_model(classifier, config)
    rate = plan.learning_rates[method]
    trained = train(model, data.train, plan, learning_rate=rate, collator=data.collator, callbacks=callbacks)
    load = {"training": load_of(model)} if load_of else {}
    logits = {}
    for domain, items in data.test.items():
        logits[domain] = predict(model, items, data.collator)
        load.update({domain: load_of(model)} if load_of else {})
    head = _trainable(classifier.head)
    outcome = Outcome(
        method,
        sizes,
        accuracy(logits, data.test),
        adapter_parameters=_trainable(model) - head,
        head_parameters=head,
        seconds=trained.seconds,
        learning_rate=rate,
        load=load,
        log=trained.log,
    )
    return Trained(model, outcome, logits)


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
