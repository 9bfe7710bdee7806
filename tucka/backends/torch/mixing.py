"""Mixing cores by gates, and products with mixed cores."""

from __future__ import annotations

import torch
from torch import Tensor

from tucka.backends.torch.private import is_any_autocast_on
from tucka.backends.torch.thin import cast, has_autocast, wide_dtype, without_autocast
from tucka.core.bases import SOFTNESS
from tucka.spec import mixes_each_row

__all__ = [
    "between_columns",
    "column_scale",
    "core_gradient",
    "cores_of_experts",
    "has_own_gates",
    "mixed",
    "mixed_by",
    "of_one_sample",
    "scale_of",
    "scaled",
    "spread_times",
    "squared_lengths",
    "times_core",
    "times_mixed",
    "times_own",
    "weights_of",
]


def mixed(cores: Tensor, expert_factor: Tensor, gates: Tensor) -> Tensor:
    """Mix cores (k, p, r, r) by an expert factor (t, p) and gates (..., k, t) to (..., r, r)."""
    return mixed_by(weights_of(expert_factor, gates), cores).reshape(*gates.shape[:-2], *cores.shape[2:])


def weights_of(expert_factor: Tensor, gates: Tensor) -> Tensor:
    """Contract gates (..., k, t) with the expert factor to the weight of each core slice, (N, k·p)."""
    if expert_factor.dtype is not gates.dtype or expert_factor.dtype in _NARROW:
        dtype = wide_dtype(expert_factor, gates)
        expert_factor, gates = expert_factor.to(dtype), gates.to(dtype)
    groups, experts = gates.shape[-2:]
    weights = _wide_product(gates if gates.ndim == 2 else gates.reshape(-1, experts), expert_factor)
    return weights.reshape(-1, groups * expert_factor.shape[-1])


def cores_of_experts(cores: Tensor, expert_factor: Tensor) -> Tensor:
    """Mix each group's cores (k, p, r, r) by the expert factor (t, p), to one core for each expert (k·t, r²)."""
    dtype = wide_dtype(cores, expert_factor)
    with without_autocast(cores.device.type):
        each = torch.matmul(cast(expert_factor, dtype), cast(cores, dtype).flatten(2))
    return each.reshape(-1, each.shape[-1])


def mixed_by(weights: Tensor, cores: Tensor) -> Tensor:
    """Sum cores (k, p, r, r) by weights (N, k·p) to (N, r²)."""
    return _wide_product(weights, cast(_stacked(cores), weights.dtype))


def times_core(inner: Tensor, core: Tensor) -> Tensor:
    """Multiply rows (N, r) by one core (r, r), or by the core (B, ..., r, r) of their sample."""
    if core.ndim == 2:
        return torch.mm(inner, core)
    rank = core.shape[-1]
    sets = core.reshape(-1, rank, rank)
    return torch.bmm(inner.reshape(sets.shape[0], -1 if inner.numel() else 0, rank), sets).reshape(-1, rank)


def core_gradient(inner: Tensor, of_product: Tensor, core: Tensor) -> Tensor:
    """Return the gradient of a core (..., r, r) for one of `times_core` (N, r)."""
    if core.ndim == 2:
        return torch.mm(inner.t(), of_product)
    rank = core.shape[-1]
    sets = core.shape[:-2].numel(), -1 if inner.numel() else 0, rank
    return torch.bmm(inner.reshape(sets).transpose(1, 2), of_product.reshape(sets)).reshape(core.shape)


def of_one_sample(core: Tensor) -> Tensor:
    """Return the core (r, r) of a batch (1, r, r) of one sample, which needs no batched product; others as they are."""
    return core[0] if core.ndim == 3 and core.shape[0] == 1 else core


def times_own(inner: Tensor, cores: Tensor, expert_factor: Tensor, gates: Tensor, *, alpha: float | Tensor) -> Tensor:
    """Multiply rows (N, r), each of which has gates of its own, (..., k, t), by their mixed cores."""
    groups, slices, rank, _ = cores.shape
    weights = cast(scaled(weights_of(expert_factor, gates), alpha), inner.dtype)
    stacked = cast(cores, inner.dtype).reshape(-1, rank, rank)
    times = times_mixed if mixes_each_row(rank, groups, slices) else spread_times
    return times(inner, weights, stacked)


def times_mixed(inner: Tensor, weights: Tensor, cores: Tensor) -> Tensor:
    """Multiply rows (N, r) by cores mixed for each, with weights (N, kp) of the cores (kp, r, r)."""
    rank = cores.shape[-1]
    own = torch.mm(weights, cores.reshape(-1, rank * rank)).reshape(-1, rank, rank)
    return torch.bmm(inner[:, None, :], own).squeeze(1)


def spread_times(inner: Tensor, weights: Tensor, cores: Tensor) -> Tensor:
    """Multiply rows (N, r), spread by their weights (N, kp), by all cores (kp, r, r) in one product."""
    rank = cores.shape[-1]
    spread = weights[:, :, None] * inner[:, None, :]
    return torch.mm(spread.reshape(-1, cores.shape[0] * rank), cores.reshape(-1, rank))


def has_own_gates(x: Tensor, gates: Tensor) -> bool:
    """Tell whether each row of `x` (..., d) has gates (..., k, t) of its own, and not one core with others."""
    return gates.ndim - 2 == x.ndim - 1 > 0


def column_scale(basis: Tensor) -> Tensor:
    """Return by what `tucka.soft_unit_columns` multiplies each column of a basis (d, r), (r,), in float32 at least."""
    return scale_of(squared_lengths(basis))


def squared_lengths(basis: Tensor) -> Tensor:
    """Return the squared length of each column of a basis (d, r), (r,), in float32 at least."""
    wide = cast(basis, wide_dtype(basis))
    return (wide * wide).sum(dim=0)


def scale_of(squares: Tensor) -> Tensor:
    """Return by what columns are multiplied, from their squared lengths."""
    return (squares + SOFTNESS**2).rsqrt()


def between_columns(cores: Tensor, scale: Tensor) -> Tensor:
    """Scale cores (..., r, r) as a basis whose columns are scaled does, by (r,)."""
    return cores * torch.outer(scale, scale)


def scaled(numbers: Tensor, alpha: float | Tensor) -> Tensor:
    """Multiply by α; a tensor's value is not looked at."""
    return numbers if not isinstance(alpha, Tensor) and alpha == 1 else alpha * numbers


def _stacked(cores: Tensor) -> Tensor:
    """View cores (k, p, r, r) as the rows (k·p, r²) of one matrix."""
    groups, slices, rank, _ = cores.shape
    return cores.reshape(groups * slices, rank * rank)


_NARROW = (torch.float16, torch.bfloat16)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    # Not in autocast's dtype: these are few numbers, and all experts are weighed by them.
    if not is_any_autocast_on() or not has_autocast(left.device.type):
        return torch.mm(left, right)
    with without_autocast(left.device.type):
        return torch.mm(left, right)
