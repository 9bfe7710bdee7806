"""A layer's factors as products without gradients take them."""

from __future__ import annotations

import torch
from torch import Tensor

from tucka.backends.torch.mixing import mixed, of_one_sample, scaled, times_core, times_own
from tucka.backends.torch.private import version_of
from tucka.backends.torch.thin import FEW, cast, into, rows_of, turned

__all__ = ["LaidOut"]


class LaidOut:
    """The factors of one layer for inputs of one dtype, and the last mixed core."""

    __slots__ = ("_basis", "_cores", "_expert_factor", "_last", "_turned", "alpha", "count", "dtype", "is_used_again")

    def __init__(self, factors: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, alpha: float) -> None:
        self.dtype = dtype
        self._cores, self._expert_factor, basis = factors  # (k, p, r, r), (t, p), (d, r)
        self.alpha = alpha
        self._basis = cast(basis, dtype)
        self._turned: Tensor | None = None
        self._last: tuple[Tensor, int, Tensor] | None = None  # gates, their version and their mixed core
        self.count = -1  # of the token that it was last used for, in a generation
        self.is_used_again = False

    def turned(self, rows: int) -> Tensor:
        """Return Uᵀ (r, d) for products with a number of rows."""
        if rows > FEW:
            return turned(self._basis, rows)
        if self._turned is None:
            self._turned = turned(self._basis, rows)
        return self._turned

    def add_update(self, base: Tensor, x: Tensor, gates: Tensor) -> Tensor:
        """Add the update of `x` (..., d) by gates (..., k, t) to `base` (..., d)."""
        rows = rows_of(x, self.dtype)
        laid = self.turned(rows.shape[0])
        inner = into(rows, laid)
        lead = gates.ndim - 2
        if lead and lead == x.ndim - 1:
            inner = times_own(inner, self._cores, self._expert_factor, gates, alpha=self.alpha)
        else:
            inner = times_core(inner, self.mixed(gates))
        rows = rows if base is x else rows_of(base, self.dtype)
        return torch.addmm(rows, inner, laid).view(base.shape)

    def mixed(self, gates: Tensor) -> Tensor:
        """Mix the cores, (..., r, r), unless the last call had the same gates."""
        last, version = self._last, version_of(gates)
        if last is not None and last[0] is gates and last[1] == version:
            return last[2]
        core = scaled(mixed(self._cores, self._expert_factor, gates), self.alpha)
        core = of_one_sample(cast(core, self.dtype))
        self._last = (gates, version, core)
        return core
