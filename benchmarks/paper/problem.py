"""A task that is loaded: what each of the modules text, images and mathematics returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Metrics = dict[str, float]


@dataclass(frozen=True)
class Problem:
    """A pretrained model with its data."""

    model: nn.Module  # not adapted yet
    train: Any
    collator: Callable[..., Any]
    test: Any = None  # what the Trainer evaluates on
    # From the Trainer's predictions to metrics between 0 and 1 (Matthews: from -1).
    metrics: Callable[[Any], Metrics] | None = None
    # From the trained model to metrics, where the Trainer cannot evaluate.
    score: Callable[[nn.Module], Metrics] | None = None
