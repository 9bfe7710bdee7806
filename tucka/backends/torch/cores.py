"""The mixed cores of one layer or several, as one node of torch's graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tucka.backends.torch.mixing import (
    rotation_cores,
    scale_of,
    scaled,
    squared_lengths,
    weighs_experts,
)
from tucka.backends.torch.private import are_transformations_on, versions_of
from tucka.backends.torch.thin import cast, wide_dtype, without_autocast
from tucka.spec import FactorNorm

__all__ = ["Slices", "cores_together", "dtype_of"]

# Left to automatic differentiation, mixing costs a dozen operators in each layer, each with a node of its own, for few
# numbers. Together, the layers need as many operators as one of them.


def cores_together(
    gates: Tensor | None,  # (..., k, t)
    flat: Sequence[Tensor],  # of one layer after the other: cores (k, p, r, r), expert factor (t, p), basis (d, r)
    alphas: Sequence[float],
    *,
    norm: FactorNorm | None,  # what is still to be done of it: "frobenius" never is
    strengths: Sequence[Tensor] = (),  # of each layer's rotation, ()
) -> list[Tensor]:
    """Mix each layer's cores, with what its basis adds, times α, by the same gates; without any, as for `times_own`."""
    # A compiler and transformations make a backward of their own.
    if torch.is_grad_enabled() and not (torch.compiler.is_compiling() or are_transformations_on()):
        with without_autocast(flat[0].device.type):
            return list(_Mixed.apply(gates, tuple(alphas), norm, tuple(strengths), *flat))
    return Slices(gates, flat, alphas, norm=norm, strengths=strengths).mixed(gates)


def _of_layers(cores: Tensor, gates: Tensor | None) -> tuple[Tensor, ...]:
    """Split cores (L, N, r, r) by layers, and give them the leading axes of their gates; one sample needs none."""
    lead = None if gates is None else tuple(gates.shape[:-2])
    if lead is not None:
        lead = () if lead == (1,) else lead
        cores = cores.reshape(cores.shape[0], *lead, *cores.shape[2:])
    return cores.unbind(0)


class Slices:
    """What the cores of several layers are mixed of: all that does not depend on the numbers of their gates."""

    def __init__(
        self,
        gates: Tensor | None,  # of which only the dtype matters, and whether there are any
        flat: Sequence[Tensor],
        alphas: Sequence[float],
        *,
        norm: FactorNorm | None,
        strengths: Sequence[Tensor],
        scale: Tensor | None = None,  # (L, r), that of the columns, if it is known
        common: Tensor | None = None,  # (L, r, r), what all experts of a layer have in common, if it is known
    ) -> None:
        with without_autocast(flat[0].device.type):
            self.dtype = dtype_of(gates, flat)
            stacked = cast(torch.stack(list(flat[0::3])), self.dtype)  # (L, k, p, r, r)
            layers, self.groups, slices, self.rank = stacked.shape[:4]
            self.numbers = stacked.reshape(layers, self.groups * slices, self.rank**2)  # (L, k·p, r²)
            self.makes_experts = gates is None and weighs_experts(flat[1])
            self.scale, self.common = scale, common
            if norm == "rotation":
                if common is None:
                    self.common = cast(rotation_cores(flat[2::3], strengths), self.dtype)
                self.numbers = self.numbers / self.rank
                if not self.makes_experts:
                    self.numbers = torch.cat([self.numbers, self.common.reshape(layers, 1, -1)], dim=1)  # type: ignore[union-attr]
            if self.makes_experts or gates is not None:
                self.factors = cast(torch.stack(list(flat[1::3])), self.dtype)  # (L, t, p)
            # α, and the scales of the columns on both sides.
            self.between: float | Tensor = alphas[0]
            if len(set(alphas)) > 1:
                self.between = torch.tensor(alphas, dtype=self.dtype, device=stacked.device)[:, None, None, None]
            if norm == "columns":
                if scale is None:  # one after the other: widths differ, and stacking the bases would copy them
                    self.scale = scale_of(torch.stack([squared_lengths(basis) for basis in flat[2::3]]))
                both = self.scale[:, :, None] * self.scale[:, None, :]  # type: ignore[index]
                self.between = scaled(both[:, None], self.between)

    @property
    def by_group(self) -> Tensor:
        """The core slices of each group, (L, k, p, r²), without a common one."""
        layers, _, size = self.numbers.shape
        return self.numbers.reshape(layers, -1, self.factors.shape[-1], size)

    def gates_of(self, gates: Tensor) -> Tensor:
        """Give each group of each route a row, (N·k, t)."""
        return cast(gates.reshape(math.prod(gates.shape[:-2]) * self.groups, gates.shape[-1]), self.dtype)

    def weights_of(self, gates: Tensor) -> Tensor:
        """Weigh the slices of all layers by gates (..., k, t), (L, N, k·p); by their sum too what is in common."""
        layers, sets, rows = len(self.numbers), math.prod(gates.shape[:-2]), self.gates_of(gates)
        weights = torch.bmm(rows.expand(layers, *rows.shape), self.factors)
        weights = weights.reshape(layers, sets, self.groups * self.factors.shape[-1])
        if self.common is None:
            return weights
        totals = rows.reshape(sets, self.groups * rows.shape[-1]).sum(dim=1, keepdim=True)
        return torch.cat([weights, totals.expand(layers, sets, 1)], dim=2)

    def cores(self, weights: Tensor | None) -> Tensor:
        """Mix the cores, (L, N, r, r), by weights; without any, make those of all experts or slices."""
        if weights is not None:
            mixed = torch.bmm(weights, self.numbers)
        else:
            mixed = torch.matmul(self.factors[:, None], self.by_group) if self.makes_experts else self.numbers
        mixed = mixed.reshape(len(self.numbers), math.prod(mixed.shape[1:-1]), self.rank, self.rank)
        if self.makes_experts and self.common is not None:
            mixed = mixed + self.common[:, None]
        return scaled(mixed, self.between)

    def mixed(self, gates: Tensor | None) -> list[Tensor]:
        """Mix each layer's cores by gates of the kind that these slices were made for."""
        with without_autocast(self.numbers.device.type):
            return list(_of_layers(self.cores(None if gates is None else self.weights_of(gates)), gates))


def dtype_of(gates: Tensor | None, flat: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype in which cores are mixed."""
    return wide_dtype(*flat[:2], *(() if gates is None else (gates,)))


class _Mixed(torch.autograd.Function):
    """The mixed cores of `Slices` with a gradient: none for layers that were not used."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: Tensor | None,
        alphas: tuple[float, ...],
        norm: FactorNorm | None,
        strengths: tuple[Tensor, ...],
        *flat: Tensor,
    ) -> tuple[Tensor, ...]:
        made = Slices(gates, flat, alphas, norm=norm, strengths=strengths)
        weights = None if gates is None else made.weights_of(gates)
        cores = made.cores(weights)
        ctx.options = alphas, norm, strengths
        # Torch frees what it saves in the first backward, but layers may be in graphs of their own. So factors are kept
        # as they are, and the rest is made again there.
        ctx.inputs, ctx.versions = (gates, flat), versions_of(_without_none(gates, *strengths, *flat))
        # The gates are among them for those who count what is kept.
        ctx.save_for_backward(cores if norm == "columns" else None, weights, made.scale, made.common, gates)
        ctx.set_materialize_grads(False)
        return _of_layers(cores, gates)

    @staticmethod
    def backward(ctx: Any, *of_cores: Tensor | None) -> tuple[Any, ...]:
        (gates, flat), (alphas, norm, strengths) = ctx.inputs, ctx.options
        if versions_of(_without_none(gates, *strengths, *flat)) != ctx.versions:
            msg = "a variable that a gradient needs has been modified by an inplace operation: an adapter's parameter"
            raise RuntimeError(msg)
        result: list[Any] = [None] * len(flat)
        used = [place for place, gradient in enumerate(of_cores) if gradient is not None]
        if not used:
            return None, None, None, None, *result
        cores, weights, scale, common = _saved(ctx)
        made = Slices(gates, flat, alphas, norm=norm, strengths=strengths, scale=scale, common=common)
        if gates is not None and weights is None:
            weights = made.weights_of(gates)

        def of_used(tensor: Any) -> Any:
            is_all = len(used) == len(of_cores) or not isinstance(tensor, Tensor)
            return tensor if is_all else tensor[used]

        of_core = torch.stack([gradient for gradient in of_cores if gradient is not None])
        rank = of_core.shape[-1]
        of_core = of_core.reshape(len(used), -1, rank, rank)  # (U, N, r, r)
        sets = of_core.shape[1]
        of_slices = scaled(of_core, of_used(made.between)).reshape(len(used), sets, rank * rank)
        of_factors = of_gates = pulls = of_grams = None
        if gates is not None:
            of_mixed = of_slices
            of_slices = torch.bmm(of_used(weights).transpose(1, 2), of_mixed)
            of_weights = torch.bmm(of_mixed, of_used(made.numbers).transpose(1, 2))
            if made.common is not None:
                of_totals, of_weights = of_weights[:, :, -1], of_weights[:, :, :-1]
            rows = made.gates_of(gates)
            of_weights = of_weights.reshape(len(used), len(rows), flat[1].shape[-1])  # (U, N·k, p)
            of_factors = torch.matmul(rows.t(), of_weights)
            if ctx.needs_input_grad[0]:
                of_gates = torch.bmm(of_weights, of_used(made.factors).transpose(1, 2)).sum(dim=0)
                if made.common is not None:
                    of_gates = of_gates.reshape(sets, gates.shape[-2:].numel()) + of_totals.sum(dim=0)[:, None]
                of_gates = cast(of_gates.reshape(gates.shape), gates.dtype)
        of_common: Tensor | None = None
        if made.makes_experts:
            of_common = None if made.common is None else of_slices.sum(dim=1)
            of_experts, by_group = of_slices, of_used(made.by_group)
            of_experts = of_experts.reshape(*by_group.shape[:2], -1, rank * rank)  # (U, k, t, r²)
            of_factors = torch.matmul(of_experts, by_group.transpose(2, 3)).sum(dim=1)
            of_slices = torch.matmul(of_used(made.factors).transpose(1, 2)[:, None], of_experts)
        elif made.common is not None:
            of_common, of_slices = of_slices[:, -1], of_slices[:, :-1]
        if made.common is not None and of_common is not None:
            of_slices = of_slices / rank
            # dB = B dM B / 2 for the products M = UᵀU, and both factors of M have a share.
            turned = of_used(made.common).transpose(1, 2)
            of_grams = 0.5 * turned @ of_common.reshape(turned.shape) @ turned
            of_grams = of_grams + of_grams.transpose(1, 2)
        if made.scale is not None:
            # With s = 1/√(‖u‖² + c), ds/du = -s³ u, and the core is s_i s_j times one that does not depend on u.
            if cores is None:
                cores = made.cores(weights)
            share, factor = (of_core * of_used(cores)).sum(dim=1), of_used(made.scale)
            pulls = -(share.sum(dim=1) + share.sum(dim=2)) * factor * factor
        bases: list[Tensor] = [flat[3 * index + 2] for index in used]
        of_bases: list[Tensor] = []
        if pulls is not None and any(ctx.needs_input_grad[6::3]):
            of_bases = [cast(basis * pull, basis.dtype) for basis, pull in zip(bases, pulls.unbind(0), strict=True)]
        elif of_grams is not None and any(ctx.needs_input_grad[6::3]):
            is_wide = bases[0].dtype is of_grams.dtype
            wide = bases if is_wide else [basis.to(of_grams.dtype) for basis in bases]
            of_bases = [torch.mm(basis, of_gram) for basis, of_gram in zip(wide, of_grams.unbind(0), strict=True)]
            of_bases = of_bases if is_wide else [of_basis.to(flat[2].dtype) for of_basis in of_bases]
        for place, of_all in enumerate((of_slices, of_factors)):
            if of_all is not None:
                like = flat[place]
                gradients = cast(of_all.reshape(len(used), *like.shape), like.dtype).unbind(0)
                for index, gradient in zip(used, gradients, strict=True):
                    result[3 * index + place] = gradient
        if of_bases:
            for index, gradient in zip(used, of_bases, strict=True):
                result[3 * index + 2] = gradient
        return of_gates, None, None, None, *result


def _saved(ctx: Any) -> tuple[Tensor | None, ...]:
    """Return what a mixing has saved; nothing where a graph of it is wanted, or a backward has freed it."""
    if torch.is_grad_enabled():  # for second derivatives
        return None, None, None, None
    try:
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors[:4]
    except RuntimeError:
        return None, None, None, None
    return saved


def _without_none(gates: Tensor | None, *flat: Tensor) -> tuple[Tensor, ...]:
    return flat if gates is None else (gates, *flat)
