"""What the cost of an adapter is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Amount", "Cost", "Layer", "Sizes"]

Layer = tuple[int, int]  # input and output width (d, d')
Sizes = Mapping[str, Any]


@dataclass(frozen=True)
class Amount:
    """A number that grows with what goes through the model: once, for each sample and for each token."""

    fixed: int = 0
    per_sample: int = 0
    per_token: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.fixed + other.fixed, self.per_sample + other.per_sample, self.per_token + other.per_token)

    def __rmul__(self, factor: int) -> Amount:
        return Amount(factor * self.fixed, factor * self.per_sample, factor * self.per_token)

    def at(self, *, tokens: int, samples: int = 0) -> int:
        """Evaluate for a forward of some size."""
        return self.fixed + self.per_sample * samples + self.per_token * tokens


@dataclass(frozen=True)
class Cost:
    """What one layer's adapter costs, or a part that all layers share."""

    parameters: int = 0  # trainable numbers
    buffers: int = 0  # further numbers that the adapter's file holds
    forward: Amount = field(default_factory=Amount)  # multiply-adds beyond the frozen layer's
    backward: Amount = field(default_factory=Amount)  # multiply-adds beyond the frozen layer's gradient of its input
    kept: Amount = field(
        default_factory=Amount
    )  # numbers from forward to backward, beside parameters, weights, buffers

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.buffers + other.buffers,
            self.forward + other.forward,
            self.backward + other.backward,
            self.kept + other.kept,
        )
