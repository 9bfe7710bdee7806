"""Mixing cores by gates, and products with mixed cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tucka.backends.torch.private import is_any_autocast_on
from tucka.backends.torch.thin import cast, has_autocast, wide_dtype, without_autocast
from tucka.spec import mixes_each_row

__all__ = [
    "mixed",
    "mixed_gradients",
    "of_one_sample",
    "scaled",
    "spread_times",
    "times_core",
    "times_mixed",
    "times_own",
]


def mixed(cores: Tensor, expert_factor: Tensor, gates: Tensor) -> Tensor:
    """Mix cores (k, p, r, r) by an expert factor (t, p) and gates (..., k, t) to (..., r, r)."""
    weights = _expert_weights(expert_factor, gates)
    core = _wide_product(weights, cast(_stacked(cores), weights.dtype))
    return core.reshape(*gates.shape[:-2], *cores.shape[-2:])


def mixed_gradients(
    of_core: Tensor, cores: Tensor, expert_factor: Tensor, gates: Tensor, *, alpha: float, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of cores, expert factor and gates, of those that are needed, for one of α times `mixed`."""
    dtype = wide_dtype(expert_factor, gates)
    of_core = scaled(cast(of_core.reshape(-1, cores.shape[-1] ** 2), dtype), alpha)
    of_cores = of_factor = of_gates = None
    if needed[0]:
        weights = _expert_weights(expert_factor, gates)
        of_cores = cast(_wide_product(weights.t(), of_core).reshape(cores.shape), cores.dtype)
    if needed[1] or needed[2]:
        of_weights = _wide_product(of_core, cast(_stacked(cores), dtype).t()).reshape(-1, expert_factor.shape[-1])
        flat = cast(gates.reshape(-1, gates.shape[-1]), dtype)
        of_factor = cast(_wide_product(flat.t(), of_weights), expert_factor.dtype) if needed[1] else None
        if needed[2]:
            of_gates = cast(_wide_product(of_weights, cast(expert_factor, dtype).t()).reshape(gates.shape), gates.dtype)
    return of_cores, of_factor, of_gates


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
    weights = cast(scaled(_expert_weights(expert_factor, gates), alpha), inner.dtype)
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


def scaled(numbers: Tensor, alpha: float | Tensor) -> Tensor:
    """Multiply by α; a tensor's value is not looked at."""
    return numbers if not isinstance(alpha, Tensor) and alpha == 1 else alpha * numbers


def _stacked(cores: Tensor) -> Tensor:
    """View cores (k, p, r, r) as the rows (k·p, r²) of one matrix."""
    groups, slices, rank, _ = cores.shape
    return cores.reshape(groups * slices, rank * rank)


def _expert_weights(expert_factor: Tensor, gates: Tensor) -> Tensor:
    """Contract gates (..., k, t) with the expert factor to the weight of each core slice, (N, k·p)."""
    if expert_factor.dtype is not gates.dtype or expert_factor.dtype in _NARROW:
        dtype = wide_dtype(expert_factor, gates)
        expert_factor, gates = expert_factor.to(dtype), gates.to(dtype)
    groups, experts = gates.shape[-2:]
    weights = _wide_product(gates if gates.ndim == 2 else gates.reshape(-1, experts), expert_factor)
    return weights.reshape(-1, groups * expert_factor.shape[-1])


_NARROW = (torch.float16, torch.bfloat16)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    # Not in autocast's dtype: these are few numbers, and all experts are weighed by them.
    if not is_any_autocast_on() or not has_autocast(left.device.type):
        return torch.mm(left, right)
    with without_autocast(left.device.type):
        return torch.mm(left, right)
