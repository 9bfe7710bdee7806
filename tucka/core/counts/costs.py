"""What the cost of an adapter is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Amount", "Cost", "Layer", "Sizes"]

Layer = tuple[int, int]
Sizes = Mapping[str, Any]


@dataclass(frozen=True)
class Amount:
    """A number that grows with what goes through the model: once, for each sample and for each token.

    Parameters
    ----------
    fixed : int
        Once in a forward.
    per_sample : int
        For each sample.
    per_token : int
        For each token.

    Examples
    --------
    >>> (Amount(fixed=5) + 2 * Amount(per_token=3)).at(tokens=10)
    65
    """

    fixed: int = 0
    per_sample: int = 0
    per_token: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.fixed + other.fixed, self.per_sample + other.per_sample, self.per_token + other.per_token)

    def __rmul__(self, factor: int) -> Amount:
        return Amount(factor * self.fixed, factor * self.per_sample, factor * self.per_token)

    def at(self, *, tokens: int, samples: int = 0) -> int:
        """Evaluate for a forward of some size.

        Parameters
        ----------
        tokens : int
            Tokens in the forward.
        samples : int
            Samples in the forward.

        Returns
        -------
        int
            The number.
        """
        return self.fixed + self.per_sample * samples + self.per_token * tokens


@dataclass(frozen=True)
class Cost:
    """What one layer's adapter costs, or a part that all layers share.

    Parameters
    ----------
    parameters : int
        Trainable numbers.
    buffers : int
        Further numbers that the adapter's file holds.
    flags : int
        Further bytes that it holds, whatever the size of a number.
    forward : Amount
        Multiply-adds of a forward beyond the frozen layer's.
    backward : Amount
        Multiply-adds of a backward beyond the frozen layer's gradient of its input.
    kept : Amount
        Numbers kept from forward to backward, beside parameters, frozen weights and buffers.

    Examples
    --------
    >>> (Cost(parameters=2) + Cost(parameters=3)).parameters
    5
    """

    parameters: int = 0
    buffers: int = 0
    flags: int = 0
    forward: Amount = field(default_factory=Amount)
    backward: Amount = field(default_factory=Amount)
    kept: Amount = field(default_factory=Amount)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            self.buffers + other.buffers,
            self.flags + other.flags,
            self.forward + other.forward,
            self.backward + other.backward,
            self.kept + other.kept,
        )
