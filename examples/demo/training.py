"""How the demo trains: the same data, batches, schedule and head for each method."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments, set_seed

from examples.sentence_classifier import Collator, FeatureHead, Item, LengthBatches, SentenceClassifier
from tucka.peft import RouterCallback, TuckAConfig, expert_load

HEAD_ONLY, LORA, TUCKA = "head only", "LoRA", "TuckA"
LEARNING_RATES = {HEAD_ONLY: 1e-2, LORA: 3e-3, TUCKA: 3e-3}


@dataclass(frozen=True)
class Plan:
    """The sizes of one run."""

    seed: int = 0
    train_per_domain: int | None = 400  # None: all that are left
    test_per_domain: int = 500
    epochs: int = 2
    batch_size: int = 32
    max_length: int = 64  # tokens
    rank: int = 8  # of LoRA and of TuckA
    groups: int = 4  # of TuckA


@dataclass(frozen=True)
class Data:
    """Sentences as tokens; those to test with by domain."""

    train: list[Item]
    test: dict[str, list[Item]]
    collator: Collator


@dataclass(frozen=True)
class Outcome:
    """What a method cost and reached: accuracy by domain, load of the groups in training and by domain."""

    method: str
    sizes: str
    accuracy: dict[str, float]
    adapter_parameters: int = 0
    head_parameters: int = 0
    seconds: float = 0.0
    learning_rate: float | None = None
    load: dict[str, list[float]] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The method with its sizes."""
        return f"{self.method} {self.sizes}".strip()

    @property
    def mean(self) -> float:
        """The mean accuracy of the domains."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    def error(self, tested: int) -> float:
        """Return the standard error of the mean accuracy for so many test sentences a domain."""
        return math.sqrt(sum(value * (1 - value) / tested for value in self.accuracy.values())) / len(self.accuracy)


def adapter_config(method: str, plan: Plan) -> PeftConfig:
    """Put LoRA or TuckA on the same layers; the head is trained whole."""
    shared: dict[str, Any] = {
        "r": plan.rank,
        "target_modules": ["query", "value", "dense"],
        "modules_to_save": ["head"],
    }
    if method == LORA:
        return LoraConfig(lora_alpha=2 * plan.rank, **shared)
    return TuckAConfig(k=plan.groups, routing="sample", router_seed=plan.seed, **shared)


def train_method(
    method: str, classifier: SentenceClassifier, data: Data, plan: Plan
) -> tuple[Any, Outcome, dict[str, Tensor]]:
    """Train a fresh classifier by a method; return the model, its outcome and the test sentences' logits (N, 2)."""
    torch.manual_seed(plan.seed)  # adapters start at random
    started, items, callbacks = time.perf_counter(), data.train, [_Bar()]
    model: Any = classifier.requires_grad_(False)
    trained: nn.Module = FeatureHead(classifier.head.requires_grad_(True))
    if method == HEAD_ONLY:
        items = pooled(classifier, items, data.collator)
    else:
        model = trained = get_peft_model(classifier, adapter_config(method, plan))
    if method == TUCKA:  # the callback starts the router and logs the load of its groups
        callbacks.append(RouterCallback(max_batches=16, progress=False))
    log = fit(trained, items, data.collator, plan, LEARNING_RATES[method], callbacks)
    seconds = time.perf_counter() - started
    load, logits = ({"training": take_load(model)} if method == TUCKA else {}), {}
    for domain, sentences in data.test.items():
        logits[domain] = predict(model, sentences, data.collator)
        load |= {domain: take_load(model)} if method == TUCKA else {}
    head = trainable(classifier.head)
    outcome = Outcome(
        method,
        {HEAD_ONLY: "", LORA: f"r={plan.rank}", TUCKA: f"r={plan.rank} k={plan.groups}"}[method],
        accuracy(logits, data.test),
        adapter_parameters=trainable(model) - head,
        head_parameters=head,
        seconds=seconds,
        learning_rate=LEARNING_RATES[method],
        load=load,
        log=log,
    )
    return model, outcome, logits


def take_load(model: nn.Module) -> list[float]:
    """Return how often each group was chosen, and count from zero again."""
    return [float(count) for count in expert_load(model, reset=True)]


class _Bar(ProgressCallback):
    """The Trainer's progress bar, without the log between its lines."""

    def on_log(self, *_args: Any, **_kwargs: Any) -> None:
        pass


class _Trainer(Trainer):
    """The Trainer of transformers, fed with batches of similar length."""

    def get_train_dataloader(self) -> DataLoader[Item]:
        lengths = [len(item.get("input_ids", ())) for item in self.train_dataset]
        batches = LengthBatches(lengths, self.args.per_device_train_batch_size)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)


def fit(
    model: nn.Module, items: Sequence[Item], collator: Collator, plan: Plan, learning_rate: float, callbacks: list[Any]
) -> list[dict[str, float]]:
    """Train what is trainable in a model, on the CPU, and return the Trainer's log."""
    set_seed(plan.seed)
    steps = plan.epochs * -(-len(items) // plan.batch_size)
    with tempfile.TemporaryDirectory(prefix="tucka-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=plan.batch_size,
            num_train_epochs=plan.epochs,
            learning_rate=learning_rate,
            warmup_steps=steps // 16,
            weight_decay=0.0,
            seed=plan.seed,
            logging_steps=max(1, steps // 50),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        trainer = _Trainer(model, arguments, collator, items, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    log: list[dict[str, float]] = trainer.state.log_history
    return log


def trainable(model: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _batches(items: Sequence[Item], collator: Collator) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield batches sorted by length, each with its items' places; always the same for the same items."""
    order = torch.tensor([len(item["input_ids"]) for item in items]).argsort(stable=True)
    for places in order.split(100):
        yield places, collator([items[place] for place in places.tolist()])


@torch.no_grad()
def predict(model: nn.Module, items: Sequence[Item], collator: Collator) -> Tensor:
    """Compute the logits of items (N, 2), in their order."""
    logits = torch.empty(len(items), 2)
    for places, batch in _batches(items, collator):
        logits[places] = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


@torch.no_grad()
def pooled(model: SentenceClassifier, items: Sequence[Item], collator: Collator) -> list[Item]:
    """Replace the tokens of items by the encoder's vectors, which a frozen encoder makes only once."""
    made: dict[int, Tensor] = {}
    for places, batch in _batches(items, collator):
        made.update(zip(places.tolist(), model.pool(batch["input_ids"], batch["attention_mask"]), strict=True))
    return [{"features": made[place], "labels": item["labels"]} for place, item in enumerate(items)]


def accuracy(logits: Mapping[str, Tensor], items: Mapping[str, Sequence[Item]]) -> dict[str, float]:
    """Return the share of correct predictions in every domain."""
    labels = {domain: torch.tensor([item["labels"] for item in rows]) for domain, rows in items.items()}
    return {domain: (logits[domain].argmax(-1) == labels[domain]).double().mean().item() for domain in labels}
