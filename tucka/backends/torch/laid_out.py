"""A layer's factors as products without gradients take them."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from tucka.backends.torch.cores import cores_together
from tucka.backends.torch.mixing import has_own_gates, times_core, times_own, weighs_experts
from tucka.backends.torch.private import version_of
from tucka.backends.torch.thin import FEW, cast, into, rows_of, turned
from tucka.spec import FactorNorm

__all__ = ["LaidOut"]

# Up to this rank, the product of basis and core costs no more than the call that it saves in a layer of common width.
_FOLDED = 32


class Factored(Protocol):
    """The parts of a layer."""

    @property
    def alpha(self) -> float:
        """The scale of the update."""

    def unscaled(self) -> tuple[tuple[Tensor, Tensor, Tensor], FactorNorm | None]:
        """Return cores (k, p, r, r), expert factor (t, p) and basis (d, r), and the norm that mixed cores need."""

    @property
    def strengths(self) -> tuple[Tensor, ...]:
        """The strength () of a rotation, if there is one."""


class LaidOut:
    """The factors of one layer for inputs of one dtype, and the last mixed core."""

    __slots__ = (
        "_basis",
        "_factor",
        "_last",
        "_own",
        "_parts",
        "_reading",
        "_turned",
        "count",
        "dtype",
        "is_used_again",
    )

    def __init__(self, parts: Factored, dtype: torch.dtype) -> None:
        self.dtype, self._parts = dtype, parts
        (_, self._factor, basis), _ = parts.unscaled()
        self._basis = basis if basis.dtype is dtype else basis.to(dtype)
        self._turned: Tensor | None = None
        self._own: Tensor | None = None  # the cores that `times_own` takes, with α
        self._last: tuple[Tensor, int, Tensor] | None = None  # gates, their version and their mixed core
        self._reading: tuple[Tensor, Tensor] | None = None  # a mixed core, and the basis times it
        self.count = -1  # of the token that it was last used for, in a generation
        self.is_used_again = False

    def take(self, core: Tensor, gates: Tensor | None) -> None:
        """Take over what the layers of a call share: a core mixed by gates, or all experts' if there are none."""
        if gates is None:
            self._own = cast(core, self.dtype)
        else:
            self._last = gates, version_of(gates), cast(core, self.dtype)

    def knows(self, gates: Tensor) -> bool:
        """Tell whether the core that these gates mix is there."""
        last = self._last
        return last is not None and last[0] is gates and last[1] == version_of(gates)

    def _made(self, gates: Tensor | None) -> Tensor:
        factors, norm = self._parts.unscaled()
        alphas, strengths = (self._parts.alpha,), self._parts.strengths
        return cores_together(gates, factors, alphas, norm=norm, strengths=strengths)[0]

    def turned(self, rows: int) -> Tensor:
        """Return Uᵀ (r, d) for products with a number of rows."""
        if rows > FEW:
            return turned(self._basis, self.dtype, rows)
        if self._turned is None:
            self._turned = turned(self._basis, self.dtype, rows)
        return self._turned

    def add_update(self, base: Tensor, x: Tensor, gates: Tensor) -> Tensor:
        """Add the update of `x` (..., d) by gates (..., k, t) to `base` (..., d)."""
        rows = rows_of(x, self.dtype)
        count = rows.shape[0]
        laid = self.turned(count)
        if has_own_gates(x, gates):
            inner = self.times_own(into(rows, laid), gates)
        else:
            core = self.mixed(gates)
            reading = self.reading(core, count)
            inner = times_core(into(rows, laid), core) if reading is None else into(rows, reading)
        rows = rows if base is x else rows_of(base, self.dtype)
        return torch.addmm(rows, inner, laid).view(base.shape)

    def times_own(self, inner: Tensor, gates: Tensor) -> Tensor:
        """Multiply rows (N, r), each of which has gates of its own, (..., k, t), by their mixed cores."""
        if self._own is None:
            self._own = cast(self._made(None), self.dtype)
        rows, rank = inner.shape
        if not 0 < rows <= FEW or not weighs_experts(self._factor):
            return times_own(inner, self._own, self._factor, gates, alpha=1.0)
        # The same in fewer calls.
        own = torch.mm(cast(gates.reshape(rows, -1), self.dtype), self._own.view(-1, rank * rank))
        return torch.mm(inner, own.view(rank, rank)) if rows == 1 else times_core(inner, own.view(rows, rank, rank))

    def reading(self, core: Tensor, rows: int) -> Tensor | None:
        """Return (U Ḡ)ᵀ (r, d) where few rows have one core (r, r): then two products suffice, and not three."""
        # The same in a generation, which keeps it, and alone: so the numbers are the same to the last bit.
        if core.ndim != 2 or rows > FEW or core.shape[0] > _FOLDED:
            return None
        if self._reading is None or self._reading[0] is not core:
            self._reading = (core, torch.mm(core.t(), self.turned(rows)))
        return self._reading[1]

    def mixed(self, gates: Tensor) -> Tensor:
        """Mix the cores, (..., r, r), unless the last call had the same gates."""
        if self._last is None or not self.knows(gates):
            self._last = gates, version_of(gates), cast(self._made(gates), self.dtype)
        return self._last[2]
