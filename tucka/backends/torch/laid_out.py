"""What calls without gradients have in common: a layer's factors as its products take them, and its last mixed core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tucka.backends.torch.functional import by_sample, mixed, times_own
from tucka.backends.torch.private import states_of, version_of
from tucka.backends.torch.thin import turned

__all__ = ["LaidOut"]


class LaidOut:
    """The factors of one layer for inputs of one dtype, kept while its parameters stay as they are."""

    def __init__(
        self, parameters: Sequence[Tensor], factors: Sequence[Tensor], dtype: torch.dtype, alpha: float
    ) -> None:
        self.dtype = dtype
        self._parameters = tuple(parameters)
        # They share the parameters' memory, so that no other numbers come to stand at the same address meanwhile.
        self._kept = [parameter.detach() for parameter in parameters]
        self._state = states_of(parameters)
        self._cores, self._expert_factor, basis = factors  # (k, p, r, r), (t, p), (d, r)
        self._alpha = alpha
        self._turned = turned(basis, dtype)
        self._columns = self._turned.t()
        self._last: tuple[Tensor, int, Tensor] | None = None  # gates, their version and their mixed core

    def is_of(self, named: Mapping[str, Tensor | None], dtype: torch.dtype) -> bool:
        """Tell whether a layer's parameters are those that this was made of, and have not changed since."""
        known = self._parameters
        return (
            dtype is self.dtype
            and named.get("cores") is known[0]
            and named.get("expert_factor") is known[1]
            and named.get("basis") is known[2]
            and states_of(known) == self._state
        )

    def add_update(self, base: Tensor, x: Tensor, gates: Tensor) -> Tensor:
        """Add the update of `x` (..., d) by gates to `base` (..., d), bit for bit as `add_gated_update` does."""
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if rows.dtype is self.dtype else rows.to(self.dtype)
        inner = rows @ self._columns
        lead = gates.ndim - 2
        if lead == x.ndim - 1 and lead:
            inner = times_own(inner, self._cores, self._expert_factor, gates, alpha=self._alpha)
        else:
            core = self._mixed(gates)
            inner = inner @ core if lead == 0 else by_sample(inner, core)
        if base is not x:
            rows = base.reshape(rows.shape).to(self.dtype)
        return torch.addmm(rows, inner, self._turned).view(base.shape)

    def _mixed(self, gates: Tensor) -> Tensor:
        """Mix the cores, (..., r, r), unless the last call had the same gates."""
        last, version = self._last, version_of(gates)
        if last is not None and last[0] is gates and last[1] == version:
            return last[2]
        core = mixed(self._cores, self._expert_factor, gates)
        core = (core if self._alpha == 1 else self._alpha * core).to(self.dtype)
        self._last = (gates, version, core)
        return core
