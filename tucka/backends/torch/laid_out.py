"""A layer's factors as products without gradients take them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from tucka.backends.torch.cores import cores_together
from tucka.backends.torch.mixing import has_own_gates, times_core, times_own, weighs_experts
from tucka.backends.torch.private import version_of
from tucka.backends.torch.thin import FEW, cast, into, is_token, turned
from tucka.spec import FactorNorm

__all__ = ["LaidOut", "update_of"]

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
        core = None if has_own_gates(x, gates) else self.mixed(gates)
        update = _update_of(self, x.shape, core, gates)
        return update.add_update(cast(x, self.dtype), base=None if base is x else cast(base, self.dtype))

    def times_own(self, inner: Tensor, gates: Tensor) -> Tensor:
        """Multiply rows (N, r), each of which has gates of its own, (..., k, t), by their mixed cores."""
        own = self.own_cores(inner.shape[0], gates)
        if own is not None:
            return torch.mm(inner, own[0]) if len(own) == 1 else times_core(inner, own)
        return times_own(inner, self._own, self._factor, gates, alpha=1.0)  # type: ignore[arg-type]

    def own_cores(self, rows: int, gates: Tensor) -> Tensor | None:
        """Mix the core of each of few rows by their gates (..., k, t), to (N, r, r), if that takes one product."""
        if self._own is None:
            self._own = cast(self._made(None), self.dtype)
        if not 0 < rows <= FEW or not weighs_experts(self._factor):
            return None
        rank = self._own.shape[-1]
        own = torch.mm(cast(gates.reshape(rows, -1), self.dtype), self._own.view(-1, rank * rank))
        return own.view(rows, rank, rank)

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


def update_of(laid: LaidOut, shape: tuple[int, ...], gates: Tensor | None) -> Callable[..., Tensor]:
    """Return what adds the update to inputs of a shape, by gates that stay as they are or by each input's own."""
    core = None if gates is None or gates.ndim - 1 == len(shape) > 1 else laid.mixed(gates)
    return _update_of(laid, shape, core, gates).add_update


def _update_of(
    laid: LaidOut, shape: tuple[int, ...], core: Tensor | None, gates: Tensor | None
) -> _RowUpdate | _TokenUpdate:
    if is_token(shape):
        return _TokenUpdate(laid, shape[0], core, gates)
    return _RowUpdate(laid, shape, core, gates)


class _RowUpdate:
    """The update of inputs of one shape, by one core, one for each sample, or gates of their own."""

    __slots__ = ("_core", "_gates", "_laid", "_reading", "_shape", "_turned")

    def __init__(self, laid: LaidOut, shape: tuple[int, ...], core: Tensor | None, gates: Tensor | None) -> None:
        rows = math.prod(shape[:-1])
        self._laid, self._shape, self._core, self._gates = laid, shape, core, gates
        self._turned = laid.turned(rows)
        reading = None if core is None else laid.reading(core, rows)
        self._reading = None if reading is None else reading.t()  # (d, r)

    def add_update(self, x: Tensor, gates: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        """Add the update of an input of the shape to it or to `base`, by gates if they do not stay as they are."""
        rows, core = x.reshape(-1, self._shape[-1]), self._core
        if self._reading is not None:
            inner = torch.mm(rows, self._reading)
        elif core is not None:
            inner = times_core(into(rows, self._turned), core)
        else:
            own = self._gates if gates is None else gates
            inner = self._laid.times_own(into(rows, self._turned), own)  # type: ignore[arg-type]
        rows = rows if base is None else base.reshape(rows.shape)
        return torch.addmm(rows, inner, self._turned).view(self._shape)


class _TokenUpdate:
    """The update of one token of each of few samples, by one core, one for each, or gates of their own."""

    __slots__ = ("_back", "_core", "_gates", "_into", "_laid")

    def __init__(self, laid: LaidOut, samples: int, core: Tensor | None, gates: Tensor | None) -> None:
        turned = laid.turned(samples)
        reading = None if core is None else laid.reading(core, samples)
        self._laid, self._gates = (laid if core is None else None), gates
        self._core = None if core is None or reading is not None else core.expand(samples, *core.shape[-2:])
        self._into = (turned if reading is None else reading).t().expand(samples, -1, -1)
        self._back = turned.expand(samples, -1, -1)

    def add_update(self, x: Tensor, gates: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        """Add the update of `x` (B, 1, d) to it or to `base`, by gates (B, 1, k, t) if they do not stay as they are."""
        inner = torch.bmm(x, self._into)
        if self._core is not None:
            inner = torch.bmm(inner, self._core)
        elif self._laid is not None:
            inner = self._times_own(inner, self._gates if gates is None else gates)  # type: ignore[arg-type]
        return torch.baddbmm(x if base is None else base, inner, self._back)

    def _times_own(self, inner: Tensor, gates: Tensor) -> Tensor:
        own = self._laid.own_cores(len(inner), gates)  # type: ignore[union-attr]
        if own is not None:
            return torch.bmm(inner, own)
        return self._laid.times_own(inner[:, 0], gates)[:, None]  # type: ignore[union-attr]
