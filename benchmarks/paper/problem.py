"""What the module of a kind makes of a task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Metrics = dict[str, float]


@dataclass(frozen=True)
class Problem:
    """A pretrained model with its data.

    Parameters
    ----------
    model : nn.Module
        Not adapted yet.
    train : Dataset
        What is trained on.
    collator : callable
        Makes batches.
    test : Dataset, optional
        What the Trainer evaluates on.
    metrics : callable, optional
        From the Trainer's predictions to metrics between 0 and 1 (Matthews from -1).
    score : callable, optional
        From the trained model to metrics, where the Trainer cannot evaluate.
    """

    model: nn.Module
    train: Any
    collator: Callable[..., Any]
    test: Any = None
    metrics: Callable[[Any], Metrics] | None = None
    score: Callable[[nn.Module], Metrics] | None = None
