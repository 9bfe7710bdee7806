"""What a task gives to every method: data, a fresh pretrained model, and which of its layers to adapt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Item = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much of a task is run; items are of each part (a domain), or of each class where the task says so."""

    train: int | None  # None: all there are
    validation: int
    test: int
    epochs: int
    batch_size: int


@dataclass(frozen=True)
class Problem:
    """Everything that one run needs, whatever the method."""

    # From a seed to the pretrained model with a fresh head. Its forward takes what `collator` makes and returns an
    # object with ``loss`` and ``logits`` (B, classes).
    model: Callable[[int], nn.Module]
    # Items have ``labels``; ``input_ids`` if batches are made by length, ``text`` if words can be counted.
    train: Sequence[Item]
    validation: Mapping[str, Sequence[Item]]  # by part; it chooses the learning rate
    test: Mapping[str, Sequence[Item]]  # by part; it is reported
    collator: Callable[[Sequence[Item]], dict[str, Tensor]]
    targets: tuple[str, ...]  # names, or their endings, of the layers to adapt
    head: tuple[str, ...]  # modules that every method trains in full


@dataclass(frozen=True)
class Task:
    """A task in two sizes: the first finishes on two cores, the second is for a machine with a GPU."""

    title: str  # for tables
    load: Callable[[Sizes], Problem]
    quick: Sizes
    full: Sizes
    head_rate: float  # learning rate of the head, the same for every method
