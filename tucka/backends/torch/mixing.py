"""Mixing cores by gates, and products with mixed cores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tucka.backends.torch.private import is_any_autocast_on, is_exporting
from tucka.backends.torch.thin import cast, has_autocast, wide_dtype, without_autocast
from tucka.core.bases import SOFTNESS
from tucka.spec import mixes_each_row

__all__ = [
    "between_columns",
    "column_scale",
    "core_gradient",
    "has_own_gates",
    "mixed",
    "of_one_sample",
    "rotation_cores",
    "scale_of",
    "scaled",
    "spread_times",
    "squared_lengths",
    "times_core",
    "times_mixed",
    "times_own",
    "weighs_experts",
    "weights_of",
    "with_rotation",
]


def mixed(cores: Tensor, expert_factor: Tensor, gates: Tensor) -> Tensor:
    """Mix cores (k, p, r, r) by an expert factor (t, p) and gates (..., k, t) to (..., r, r)."""
    weights = weights_of(expert_factor, gates)
    rows = cast(cores.reshape(weights.shape[1], -1), weights.dtype)
    return _wide_product(weights, rows).reshape(*gates.shape[:-2], *cores.shape[2:])


def weights_of(expert_factor: Tensor, gates: Tensor) -> Tensor:
    """Contract gates (..., k, t) with the expert factor to the weight of each core slice, (N, k·p)."""
    if expert_factor.dtype is not gates.dtype or expert_factor.dtype in _NARROW:
        dtype = wide_dtype(expert_factor, gates)
        expert_factor, gates = expert_factor.to(dtype), gates.to(dtype)
    groups, experts = gates.shape[-2:]
    weights = _wide_product(gates if gates.ndim == 2 else gates.reshape(-1, experts), expert_factor)
    return weights.reshape(-1, groups * expert_factor.shape[-1])


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
    # The cores are those of all experts, or slices: k·p, and after them what all experts have in common, if anything.
    if weighs_experts(expert_factor):
        weights = gates.reshape(-1, len(cores))
    else:
        weights = weights_of(expert_factor, gates)
        if len(cores) > weights.shape[1]:
            totals = gates.reshape(-1, gates.shape[-2:].numel()).sum(dim=1, keepdim=True, dtype=weights.dtype)
            weights = torch.cat([weights, totals], dim=1)
    times = times_mixed if mixes_each_row(inner.shape[1], len(cores)) else spread_times
    return times(inner, cast(weights, inner.dtype), cast(scaled(cores, alpha), inner.dtype))


def weighs_experts(expert_factor: Tensor) -> bool:
    """Tell whether rows with gates of their own weigh the cores of experts, by a factor (t, p), and not the slices."""
    # The gates are then the weights, and no more cores have to be weighed than there are slices.
    return expert_factor.shape[0] <= expert_factor.shape[1]


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


def rotation_cores(bases: Sequence[Tensor], strengths: Sequence[Tensor]) -> Tensor:
    """Return the core (r, r) of the rotation that each basis (d, r) gives, (L, r, r), by strengths of shape ()."""
    # Widths may differ, so the products UᵀU are made one by one. The derivative of a core B is dB = B dM B / 2, for the
    # products M.
    dtype = wide_dtype(bases[0])
    wide = bases if bases[0].dtype is dtype else [basis.to(dtype) for basis in bases]
    grams = torch.stack([torch.mm(basis.t(), basis) for basis in wide])
    rank = grams.shape[-1]
    exports = is_exporting()
    if exports:
        # Inductor takes a buffer without axes for a constant, which it can multiply but not stack.
        strengths = [cast(strength, dtype) * grams.new_ones(1, 1) for strength in strengths]
    strength, ones = cast(torch.stack(list(strengths)), dtype).view(-1, 1, 1), grams.new_ones(rank // 2)
    pairs = torch.diag(ones, rank - rank // 2) - torch.diag(ones, rank // 2 - rank)  # S / c
    generator = strength * pairs
    product = torch.bmm(generator, grams)
    if exports:
        # Other runtimes have no solver. Without a column left over, S is its own inverse but for -c²; and so
        # B = (S⁻¹ - UᵀU / 2)⁻¹ = -(S / c² + UᵀU / 2)⁻¹.
        has_pair = pairs.abs().sum(dim=0)
        both = torch.outer(has_pair, has_pair)
        core = -both * _inverted(both * grams / 2.0 + pairs / strength + torch.diag(1.0 - has_pair))
    else:
        matrix = torch.sub(torch.eye(rank, dtype=grams.dtype, device=grams.device), product, alpha=0.5)
        # Not `solve`, which looks whether the matrix is singular, and so waits for a GPU. It never is.
        core = torch.linalg.solve_ex(matrix, generator).result
    # The same once more, B = S + S UᵀU B / 2: its first half is then exact where the second half of U is zero.
    return torch.baddbmm(generator, product, core, alpha=0.5)


def _inverted(matrix: Tensor) -> Tensor:
    """Invert (..., r, r) by elimination, for matrices whose diagonal needs no exchange of rows."""
    rank = matrix.shape[-1]
    identity = torch.eye(rank, dtype=matrix.dtype, device=matrix.device)
    both = torch.cat([matrix, identity.expand_as(matrix)], dim=-1)
    for place in range(rank):
        row = both[..., place : place + 1, :] / both[..., place : place + 1, place : place + 1]
        both = both - (both[..., place : place + 1] - identity[:, place : place + 1]) @ row
    return both[..., rank:]


def with_rotation(cores: Tensor, expert_factor: Tensor, common: Tensor) -> tuple[Tensor, Tensor]:
    """Write experts that share the core (r, r) of a rotation as cores (k, p + 1, r, r) and a factor (t, p + 1)."""
    last = common.to(wide_dtype(cores)).expand(cores.shape[0], 1, *common.shape)
    own = cast(cores, last.dtype) / common.shape[0]
    return torch.cat([own, last], dim=1), torch.cat([expert_factor, torch.ones_like(expert_factor[:, :1])], dim=1)


def scaled(numbers: Tensor, alpha: float | Tensor) -> Tensor:
    """Multiply by α; a tensor's value is not looked at."""
    return numbers if not isinstance(alpha, Tensor) and alpha == 1 else alpha * numbers


_NARROW = (torch.float16, torch.bfloat16)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    # Not in autocast's dtype: these are few numbers, and all experts are weighed by them.
    if not is_any_autocast_on() or not has_autocast(left.device.type):
        return torch.mm(left, right)
    with without_autocast(left.device.type):
        return torch.mm(left, right)
