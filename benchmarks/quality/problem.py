"""What a task gives to every method: data, a fresh pretrained model, and which of its layers to adapt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Item = dict[str, Any]


class TaskError(RuntimeError):
    """The data or the pretrained model of a task are not on this machine; the message says how to get them."""


@dataclass(frozen=True)
class Sizes:
    """How much of a task is run.

    Parameters
    ----------
    train, validation, test : int
        Items of each part (a domain), or of each class where the task says so; None for all there are.
    epochs, batch_size : int
        Of training, the same for every method.
    """

    train: int | None
    validation: int
    test: int
    epochs: int
    batch_size: int


@dataclass(frozen=True)
class Problem:
    """Everything that one run needs, whatever the method.

    Parameters
    ----------
    model : callable
        Takes a seed and returns the pretrained model with a fresh head. Its forward takes what `collator` makes and
        returns an object with ``loss`` and ``logits`` (B, classes).
    train : sequence of dict
        Each with ``labels``; with ``input_ids`` if batches are made by length, with ``text`` if words can be counted.
    validation, test : mapping of str to sequence of dict
        By part. The learning rate is chosen on the one, reported is the other.
    collator : callable
        Makes a batch of items.
    targets : tuple of str
        Names, or their endings, of the layers to adapt.
    head : tuple of str
        Modules that every method trains in full.
    """

    model: Callable[[int], nn.Module]
    train: Sequence[Item]
    validation: Mapping[str, Sequence[Item]]
    test: Mapping[str, Sequence[Item]]
    collator: Callable[[Sequence[Item]], dict[str, Tensor]]
    targets: tuple[str, ...]
    head: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """A task in two sizes.

    Parameters
    ----------
    title : str
        For tables.
    load : callable
        Makes the problem; raises `TaskError` where something is missing.
    quick, full : Sizes
        The first finishes on two cores; the second is for a machine with a GPU.
    head_rate : float
        Learning rate of the head, the same for every method.
    """

    title: str
    load: Callable[[Sizes], Problem]
    quick: Sizes
    full: Sizes
    head_rate: float
