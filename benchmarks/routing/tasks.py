"""Several tasks for one encoder: what labels mean differs from task to task, and each has texts of its own.

Adapters are in the upper half of MiniLM's layers. The lower half is frozen, so each text runs through it once only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from statistics import quantiles
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.quality.problem import Sizes
from benchmarks.quality.tasks.reviews import load_reviews
from benchmarks.quality.tasks.sources import rated_sentences, split_sentences
from examples.data import DOMAINS, Sentence, split_domains
from examples.sentence_classifier import Item, LengthBatches, encode, load_classifier
from tucka.peft import TuckAConfig, adapted_modules, given_route, initialize_router

MAX_LENGTH, BATCH = 48, 8
SIZES = Sizes(train=200, validation=100, test=400, epochs=2, batch_size=BATCH)  # of each task
TARGETS = ["query", "value", "dense"]
CORES_ALIKE = "cores alike"


@dataclass(frozen=True)
class Question:
    """What one task asks of a text, and the head that answers; tasks may share a head."""

    ask: Callable[[Sentence], int]
    classes: int = 2
    head: str | None = None  # None: its own
    is_review: bool = False


QUESTIONS = {
    "positive": Question(lambda one: one.label),
    "domain": Question(lambda one: list(DOMAINS).index(one.domain), classes=len(DOMAINS)),
    "quarter": Question(lambda one: sum(one.rating > cut for cut in cuts()[one.domain]), classes=4),
    "five stars": Question(lambda one: one.label, is_review=True),
    # Two opposite policies with one head: no single adapter without a route can follow both.
    "yes if positive": Question(lambda one: one.label, head="yes"),
    "yes if negative": Question(lambda one: 1 - one.label, head="yes"),
}
FOUR, OPPOSITE = tuple(QUESTIONS)[:4], tuple(QUESTIONS)[4:]


@cache
def cuts() -> dict[str, list[float]]:
    """Return what divides the ratings of a domain into quarters."""
    return {domain: quantiles([one.rating for one in found], n=4) for domain, found in rated_sentences().items()}


@dataclass(frozen=True)
class Texts:
    """Items of one task with ``states`` (S, width) and ``labels``; no text to train on is another task's too."""

    train: list[Item]
    validation: list[Item]
    test: list[Item]


class Given(nn.Module):
    """Stands in the place of embeddings, and of the layers that ran before."""

    def forward(self, inputs_embeds: Tensor, **_unused: Any) -> Tensor:
        return inputs_embeds


@cache
def lower_half() -> tuple[nn.Module, Any]:
    """Return the frozen encoder up to the middle of its layers, and its tokenizer."""
    classifier, tokenizer = load_classifier(seed=0)
    encoder = classifier.encoder.requires_grad_(False)
    encoder.encoder.layer = encoder.encoder.layer[: len(encoder.encoder.layer) // 2]
    return encoder, tokenizer


def upper_half() -> nn.Module:
    """Return the encoder from the middle of its layers on; its ``inputs_embeds`` are what the lower half returns."""
    encoder = load_classifier(seed=0)[0].encoder.requires_grad_(False)
    encoder.encoder.layer = encoder.encoder.layer[len(encoder.encoder.layer) // 2 :]
    encoder.embeddings = Given()
    return encoder


@cache
def texts_of(name: str, sizes: Sizes = SIZES) -> Texts:
    question = QUESTIONS[name]
    if question.is_review:
        train, test = load_reviews()
        split = split_domains({"reviews": train}, train=sizes.train, test=sizes.validation)
        parts = [split.train, split.test["reviews"], test[: sizes.test]]
    else:
        asked = [other for other in QUESTIONS if not QUESTIONS[other].is_review]
        counts = {part: getattr(sizes, part) // len(DOMAINS) for part in ("train", "validation", "test")}
        counts["train"] *= len(asked)
        found = split_sentences(rated_sentences(), replace(sizes, **counts))
        held = [[one for rows in part.values() for one in rows] for part in (found.validation, found.test)]
        # Every so many sentences are for one task, so each has its share of every domain and label.
        parts = [found.train[asked.index(name) :: len(asked)], *held]
    made = []
    encoder, tokenizer = lower_half()
    for part in parts:
        items = []
        for item, one in zip(encode(tokenizer, part, max_length=MAX_LENGTH), part, strict=True):
            with torch.no_grad():
                states = encoder(input_ids=torch.tensor([item["input_ids"]])).last_hidden_state[0]
            items.append({"states": states, "labels": question.ask(one)})
        made.append(items)
    return Texts(*made)


@dataclass(frozen=True)
class Method:
    """How the tasks share adapters; for tables, and for `build`."""

    label: str
    kind: str  # "head", "lora" or "tucka"
    config: dict[str, Any] = field(default_factory=dict)
    is_apart: bool = False  # an adapter of its own for every task
    start: str | None = None


def _lora(label: str, r: int, *, is_apart: bool = False) -> Method:
    return Method(label, "lora", {"r": r, "lora_alpha": 2 * r}, is_apart)


METHODS = {
    "head": Method("heads only", "head"),
    "lora_r8": _lora("one LoRA r=8", 8),
    "lora_r5": _lora("one LoRA r=5", 5),
    "loras_r1": _lora("a LoRA r=1 for each task", 1, is_apart=True),
    "loras_r8": _lora("a LoRA r=8 for each task", 8, is_apart=True),
    "tucka_one": Method("TuckA r=8, one group", "tucka", {"k": 1, "routing": "sample"}),
    "tucka_sample": Method("TuckA r=8, as many groups, routed by sample", "tucka", {"routing": "sample"}),
    "tucka_given": Method(
        "TuckA r=8, a group for each task, cores that start alike", "tucka", {"routing": "given"}, start=CORES_ALIKE
    ),
    "tucka_given_apart": Method("TuckA r=8, a group for each task", "tucka", {"routing": "given"}),
}


class Learner(nn.Module):
    """The upper half of an encoder with at most one adapter, and the heads of some tasks."""

    def __init__(self, method: Method, tasks: Sequence[str], seed: int) -> None:
        super().__init__()
        self.method, self.seed = method, seed
        self.encoder = upper_half()
        self.width = self.encoder.config.hidden_size
        torch.manual_seed(seed)
        if method.kind == "lora":
            config: peft.PeftConfig = peft.LoraConfig(target_modules=TARGETS, **method.config)
        elif method.kind == "tucka":
            settings = {"k": len(tasks), "target_modules": TARGETS, "router_seed": seed, **method.config}
            names = {"group_names": list(tasks)} if method.config["routing"] == "given" else {}
            config = TuckAConfig(**settings, **names)
        if method.kind != "head":
            self.encoder = peft.get_peft_model(self.encoder, config)
        if method.start == CORES_ALIKE:
            set_cores_alike(self.encoder)
        self.heads = nn.ModuleDict()
        for task in tasks:
            self.add_head(task)

    def add_head(self, task: str) -> None:
        """Add a fresh head, unless a task that shares it has done so."""
        name = QUESTIONS[task].head or task
        if name not in self.heads:
            self.heads[name] = nn.Linear(self.width, QUESTIONS[task].classes)
            nn.init.normal_(self.heads[name].weight, std=0.02, generator=torch.Generator().manual_seed(self.seed))
            nn.init.zeros_(self.heads[name].bias)

    def route(self, task: str) -> AbstractContextManager[Any]:
        return given_route(self.encoder, groups=task) if self.method.config.get("routing") == "given" else nullcontext()

    def forward(self, task: str, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits of texts of one task, (B, classes)."""
        with self.route(task):
            hidden = self.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.heads[QUESTIONS[task].head or task]((hidden * weights).sum(1) / weights.sum(1))

    def adapters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.encoder.parameters() if parameter.requires_grad]


@torch.no_grad()
def set_cores_alike(model: nn.Module) -> None:
    """Let all groups lead what they read to the zero columns in one order, which the library's start turns by group."""
    for name, parameter in model.named_parameters():
        if name.endswith("cores"):
            read = (parameter.shape[-1] + 1) // 2
            for group, core in enumerate(parameter):
                core[:, :read, read:] = core[:, :read, read:].roll(-group, dims=-1)


def inputs(rows: Sequence[Item]) -> tuple[dict[str, Tensor], Tensor]:
    """Pad the states of items, with a mask, and gather their labels."""
    states = nn.utils.rnn.pad_sequence([item["states"] for item in rows], batch_first=True)
    lengths = torch.tensor([len(item["states"]) for item in rows])
    mask = (torch.arange(states.shape[1]) < lengths[:, None]).long()
    labels = torch.tensor([item["labels"] for item in rows])
    return {"inputs_embeds": states, "attention_mask": mask}, labels


def batches_of(name: str, sizes: Sizes, seed: int) -> Iterator[list[Item]]:
    """Yield the batches of one task for all epochs; they depend on the task and the seed alone."""
    train = texts_of(name, sizes).train
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1000 * seed + list(QUESTIONS).index(name))
        order = [
            rows for _ in range(sizes.epochs) for rows in LengthBatches([len(item["states"]) for item in train], BATCH)
        ]
    yield from ([train[row] for row in rows] for rows in order)


def start_router(learner: Learner, tasks: Sequence[str], sizes: Sizes) -> None:
    """Start a learned router from some batches of every task."""
    plans = zip(*(batches_of(task, sizes, learner.seed) for task in tasks), strict=True)
    looked = (inputs([item for rows in step for item in rows])[0] for step in plans)
    initialize_router(learner.encoder, looked, max_batches=16, progress=False)


def train(
    learner: Learner, tasks: Sequence[str], groups: list[dict[str, Any]], *, sizes: Sizes = SIZES, seed: int
) -> None:
    """Train groups of parameters with AdamW; a step has one batch of each task, and all batches weigh the same."""
    plan = list(zip(*(batches_of(task, sizes, seed) for task in tasks), strict=True))
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    parameters = [parameter for group in groups for parameter in group["params"]]
    warm = max(1, len(plan) // 16)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (len(plan) - step) / (len(plan) - warm))
    )
    torch.manual_seed(2000 + seed)  # for dropout
    learner.train()
    for step in plan:
        optimizer.zero_grad()
        for task, rows in zip(tasks, step, strict=True):
            batch, labels = inputs(rows)
            (nn.functional.cross_entropy(learner(task, **batch), labels) / len(tasks)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    learner.eval()


@torch.no_grad()
def accuracy(learner: Learner, task: str, items: Sequence[Item]) -> float:
    lengths = torch.tensor([len(item["states"]) for item in items])
    right = 0
    for chunk in lengths.argsort(stable=True).split(100):
        batch, labels = inputs([items[row] for row in chunk.tolist()])
        right += int((learner(task, **batch).argmax(-1) == labels).sum())
    return right / len(items)


def parameters_of(learner: Learner) -> int:
    """Count the parameters of the adapters, without heads."""
    if learner.method.kind == "tucka":
        return sum(row.parameters for row in adapted_modules(learner.encoder))
    return sum(parameter.numel() for parameter in learner.adapters())
