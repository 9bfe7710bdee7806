"""Train and evaluate one model, the same way for every method."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from tucka.demo.model import Collator, Item, SentenceClassifier
from tucka.demo.plan import Plan

__all__ = ["LengthBatches", "Training", "accuracy", "features", "predict", "train"]

_EVALUATION_BATCH = 100


class LengthBatches(Sampler[list[int]]):
    """Batches of items of similar length, so that little is padded; their order and members differ every epoch.

    Parameters
    ----------
    lengths : sequence of int
        One for each item.
    batch_size : int
        Items in a batch; the last one may be smaller.

    Notes
    -----
    It draws from torch's global generator, as torch's own samplers do. So every method sees the same batches after
    the same seed, even where a callback looks at some of them beforehand and puts the generator back.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int) -> None:
        self._lengths = torch.tensor(lengths, dtype=torch.float64)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._lengths) // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # A length that is off by up to a tenth mixes neighbours, so that batches do not repeat from epoch to epoch.
        noise = torch.rand(len(self._lengths), dtype=torch.float64)
        batches = (self._lengths * (1 + 0.1 * noise) + noise).argsort().split(self._batch_size)
        for index in torch.randperm(len(batches)).tolist():
            yield batches[index].tolist()


class _BucketTrainer(Trainer):
    """The Trainer of transformers, fed by `LengthBatches`."""

    def get_train_dataloader(self) -> DataLoader[Item]:
        items, batch_size = self.train_dataset, self.args.per_device_train_batch_size
        lengths = [len(item.get("input_ids", ())) for item in items]
        batches = LengthBatches(lengths, batch_size)
        return DataLoader(items, batch_sampler=batches, collate_fn=self.data_collator)


@dataclass(frozen=True)
class Training:
    """What there is to tell about a finished training.

    Parameters
    ----------
    seconds : float
        Its duration, the router's initialisation included.
    log : list of dict
        The Trainer's log.
    """

    seconds: float
    log: list[dict[str, float]]


def train(
    model: nn.Module,
    items: Sequence[Item],
    plan: Plan,
    *,
    learning_rate: float,
    collator: Collator,
    callbacks: Sequence[TrainerCallback] = (),
) -> Training:
    """Train what is trainable in a model, on the CPU.

    Parameters
    ----------
    model : nn.Module
        Trained in place; in evaluation mode afterwards.
    items : sequence of dict
        From `tucka.demo.model.encode`, or ``features`` and ``labels``.
    plan : Plan
        Epochs, batch size and seed.
    learning_rate : float
        The highest of a schedule that warms up and then falls linearly to zero.
    collator : Collator
        Makes batches of items.
    callbacks : sequence of TrainerCallback
        They see what the Trainer logs.

    Returns
    -------
    Training
        How long it took, and what the Trainer logged.
    """
    set_seed(plan.seed)
    with tempfile.TemporaryDirectory(prefix="tucka-") as scratch:
        arguments = TrainingArguments(**_arguments(plan, len(items), learning_rate), output_dir=scratch)
        trainer = _BucketTrainer(
            model=model, args=arguments, train_dataset=items, data_collator=collator, callbacks=list(callbacks)
        )
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    model.eval()
    return Training(seconds, trainer.state.log_history)


def _arguments(plan: Plan, items: int, learning_rate: float) -> dict[str, Any]:
    steps = plan.epochs * -(-items // plan.batch_size)
    return {
        "per_device_train_batch_size": plan.batch_size,
        "num_train_epochs": plan.epochs,
        "learning_rate": learning_rate,
        "warmup_steps": steps // 16,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "seed": plan.seed,
        "logging_steps": max(1, steps // 50),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }


def _batches(items: Sequence[Item], collator: Collator) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield batches sorted by length, each with its items' places; always the same for the same items."""
    order = torch.tensor([len(item["input_ids"]) for item in items]).argsort(stable=True)
    for places in order.split(_EVALUATION_BATCH):
        yield places, collator([items[place] for place in places.tolist()])


@torch.no_grad()
def predict(model: nn.Module, items: Sequence[Item], collator: Collator) -> Tensor:
    """Compute the logits of items.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode.
    items : sequence of dict
        From `tucka.demo.model.encode`.
    collator : Collator
        Makes batches of items.

    Returns
    -------
    Tensor, shape (N, 2)
        In the order of the items.
    """
    logits = torch.empty(len(items), 2)
    for places, batch in _batches(items, collator):
        logits[places] = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


@torch.no_grad()
def features(model: SentenceClassifier, items: Sequence[Item], collator: Collator) -> list[Item]:
    """Pool items with the frozen encoder, once, to train a head on.

    Parameters
    ----------
    model : SentenceClassifier
        In evaluation mode.
    items : sequence of dict
        From `tucka.demo.model.encode`.
    collator : Collator
        Makes batches of items.

    Returns
    -------
    list of dict
        With ``features`` and ``labels``, in the order of the items.
    """
    made: dict[int, Tensor] = {}
    for places, batch in _batches(items, collator):
        made.update(zip(places.tolist(), model.pool(batch["input_ids"], batch["attention_mask"]), strict=True))
    return [{"features": made[place], "labels": item["labels"]} for place, item in enumerate(items)]


def accuracy(logits: Mapping[str, Tensor], items: Mapping[str, Sequence[Item]]) -> dict[str, float]:
    """Return the share of correct predictions in every domain.

    Parameters
    ----------
    logits : mapping of str to Tensor
        By domain, from `predict`.
    items : mapping of str to sequence of dict
        By domain, with ``labels``.

    Returns
    -------
    dict of str to float
        By domain.
    """
    right = {
        domain: logits[domain].argmax(-1) == torch.tensor([item["labels"] for item in items[domain]])
        for domain in items
    }
    return {domain: hits.double().mean().item() for domain, hits in right.items()}
