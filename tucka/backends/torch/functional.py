"""The adapter's arithmetic as differentiable torch functions: thin products on activations, never a d×d matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from tucka.backends.torch.checks import check_lead, check_parts, check_rank, check_tensors, check_thin
from tucka.backends.torch.thin import add_product, has_autocast, project, wide_dtype, without_autocast
from tucka.spec import mixes_each_row

__all__ = [
    "add_gated_update",
    "by_sample",
    "mix_cores",
    "mixed",
    "spread_times",
    "times_mixed",
    "times_own",
    "tucker_adapt",
    "tucker_adapt_gated",
]

# Nothing here reads a tensor back to the host, so all of it runs inside CUDA graphs and `torch.compile`. All functions
# have second derivatives and forward-mode ones, and work under `torch.func`.


def tucker_adapt(x: Tensor, basis: Tensor, mixed_core: Tensor, *, alpha: float = 1.0) -> Tensor:
    r"""Adapt activations, :math:`x' = x + \alpha\, ((x U) \bar G)\, U^\top`.

    Parameters
    ----------
    x : Tensor, shape (..., d)
        Activations; any layout, zero rows allowed.
    basis : Tensor, shape (d, r)
        U. Cast to the dtype of `x`.
    mixed_core : Tensor, shape (r, r), (B, r, r), (B, S, r, r), ...
        Ḡ from `mix_cores`. Its leading axes align with those of `x` from the left. Cast to the dtype of `x`.
    alpha : float
        The scale of the update.

    Returns
    -------
    Tensor, shape (..., d)
        In the dtype of `x`, or autocast's.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    ArrayError
        If an argument is no tensor or on another device, or `x` is not real floating-point.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (9), without its W.

    Examples
    --------
    >>> tucker_adapt(torch.ones(2, 5, 4), torch.eye(4)[:, :1], torch.tensor([[2.0]]))[0, 0]
    tensor([3., 1., 1., 1.])
    """
    where = "tucker_adapt"
    check_tensors(where, x=x, basis=basis, mixed_core=mixed_core)
    check_thin("basis", basis, x, where)
    check_rank("mixed_core", mixed_core, basis, where)
    check_lead("mixed_core", tuple(mixed_core.shape[:-2]), x, where)
    return _add_update(x, x, basis, mixed_core, alpha=alpha)


def tucker_adapt_gated(
    x: Tensor, basis: Tensor, cores: Tensor, expert_factor: Tensor, gates: Tensor, *, alpha: float = 1.0
) -> Tensor:
    r"""Adapt activations by any gates, from one set for all rows to one for each.

    Where each row has gates of its own, it takes r·min(r, k·p) numbers beside its d: it gets a mixed core, or all rows
    take one (N, k·p·r) × (k·p·r, r) product.

    Parameters
    ----------
    x : Tensor, shape (..., d)
        Activations; any layout, zero rows allowed.
    basis : Tensor, shape (d, r)
        U. Cast to the dtype of `x`.
    cores : Tensor, shape (k, p, r, r)
        The groups' cores.
    expert_factor : Tensor, shape (t, p)
        The factor of the expert mode.
    gates : Tensor, shape (k, t), (B, k, t), (B, S, k, t), ...
        Their leading axes align with those of `x` from the left.
    alpha : float
        The scale of the update.

    Returns
    -------
    Tensor, shape (..., d)
        In the dtype of `x`, or autocast's.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    ArrayError
        If an argument is no tensor or on another device, or `x` is not real floating-point.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (9), without its W.

    Examples
    --------
    >>> cores, factor, gates = torch.zeros(2, 1, 3, 3), torch.ones(2, 1), torch.ones(5, 2, 2)
    >>> torch.equal(tucker_adapt_gated(torch.ones(5, 4), torch.eye(4)[:, :3], cores, factor, gates), torch.ones(5, 4))
    True
    """
    where = "tucker_adapt_gated"
    check_tensors(where, x=x, basis=basis, cores=cores, expert_factor=expert_factor, gates=gates)
    check_thin("basis", basis, x, where)
    check_parts(cores, expert_factor, gates, where)
    check_rank("cores", cores, basis, where)
    check_lead("gates", tuple(gates.shape[:-2]), x, where)
    return add_gated_update(x, x, basis, cores, expert_factor, gates, alpha=alpha)


def mix_cores(cores: Tensor, expert_factor: Tensor, gates: Tensor) -> Tensor:
    r"""Mix all cores by their gates, :math:`\bar G = \sum_{ijq} \gamma_{ij} C_{jq} \mathcal{G}_i[q]`.

    Parameters
    ----------
    cores : Tensor, shape (k, p, r, r)
        The groups' cores.
    expert_factor : Tensor, shape (t, p)
        The factor of the expert mode.
    gates : Tensor, shape (..., k, t)
        Any gates.

    Returns
    -------
    Tensor, shape (..., r, r)
        In the widest dtype of the inputs, float32 at least, under autocast too.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    ArrayError
        If an argument is no tensor or on another device.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (9): the sum over experts, in the space of the cores.

    Examples
    --------
    >>> mix_cores(torch.ones(2, 1, 3, 3), torch.ones(4, 1), torch.ones(5, 2, 4)).shape
    torch.Size([5, 3, 3])
    """
    check_tensors("mix_cores", cores=cores, expert_factor=expert_factor, gates=gates)
    check_parts(cores, expert_factor, gates, "mix_cores")
    return mixed(cores, expert_factor, gates)


def add_gated_update(
    base: Tensor,  # (..., d): what the update is added to, x itself or the sum so far
    x: Tensor,  # (..., d)
    basis: Tensor,  # (d, r)
    cores: Tensor,  # (k, p, r, r)
    expert_factor: Tensor,  # (t, p)
    gates: Tensor,  # (..., k, t), aligned with x from the left
    *,
    alpha: float,
) -> Tensor:
    """Add one adapter's gated update of `x` to `base`, so that the updates of several adapters add up."""
    lead = gates.ndim - 2
    if lead < x.ndim - 1 or not lead:
        return _add_update(base, x, basis, mixed(cores, expert_factor, gates), alpha=alpha)
    inner, rows = project(x, basis)
    return _finish(base, x, rows, times_own(inner, cores, expert_factor, gates, alpha=alpha), basis)


def times_own(inner: Tensor, cores: Tensor, expert_factor: Tensor, gates: Tensor, *, alpha: float) -> Tensor:
    """Multiply rows (N, r), each of which has gates of its own, (..., k, t), by their mixed cores."""
    groups, slices, rank, _ = cores.shape
    weights = _expert_weights(expert_factor, gates)
    weights = (weights if alpha == 1 else alpha * weights).to(inner.dtype)
    stacked = cores.to(inner.dtype).reshape(-1, rank, rank)
    times = times_mixed if mixes_each_row(rank, groups, slices) else spread_times
    return times(inner, weights, stacked)


def times_mixed(inner: Tensor, weights: Tensor, cores: Tensor) -> Tensor:
    """Multiply rows (N, r) by cores mixed for each, with weights (N, kp) of the cores (kp, r, r)."""
    rank = cores.shape[-1]
    mixed = (weights @ cores.reshape(-1, rank * rank)).reshape(-1, rank, rank)
    return torch.bmm(inner[:, None, :], mixed).squeeze(1)


def spread_times(inner: Tensor, weights: Tensor, cores: Tensor) -> Tensor:
    """Multiply rows (N, r), spread by their weights (N, kp), by all cores (kp, r, r) in one product."""
    rank = cores.shape[-1]
    spread = weights[:, :, None] * inner[:, None, :]
    return spread.reshape(-1, cores.shape[0] * rank) @ cores.reshape(-1, rank)


def by_sample(inner: Tensor, core: Tensor) -> Tensor:
    """Multiply rows (N, r) by the core (B, ..., r, r) of their sample."""
    rank = core.shape[-1]
    sets = core.reshape(-1, rank, rank)
    return torch.bmm(inner.reshape(sets.shape[0], -1 if inner.numel() else 0, rank), sets).reshape(-1, rank)


def _add_update(base: Tensor, x: Tensor, basis: Tensor, mixed_core: Tensor, *, alpha: float) -> Tensor:
    """Add the update of `x` (..., d) by a mixed core (..., r, r) to `base` (..., d)."""
    inner, rows = project(x, basis)
    # Scaled here, where there are r² numbers and not N·r or N·d.
    core = (mixed_core if alpha == 1 else alpha * mixed_core).to(inner.dtype)
    inner = inner @ core if core.ndim == 2 else by_sample(inner, core)
    return _finish(base, x, rows, inner, basis)


def _finish(base: Tensor, x: Tensor, rows: Tensor, inner: Tensor, basis: Tensor) -> Tensor:
    """Return ``base + inner Uᵀ``, where `rows` is what `project` made of `x`."""
    if base is not x:
        rows = base.reshape(rows.shape).to(rows.dtype)
    return add_product(rows, inner, basis).reshape(base.shape)


def mixed(cores: Tensor, expert_factor: Tensor, gates: Tensor) -> Tensor:
    """Mix cores by gates (..., k, t) to (..., r, r)."""
    groups, slices, rank, _ = cores.shape
    weights = _expert_weights(expert_factor, gates)
    stacked = cores.reshape(groups * slices, rank * rank)
    core = _wide_product(weights, stacked if stacked.dtype is weights.dtype else stacked.to(weights.dtype))
    return core.reshape(*gates.shape[:-2], rank, rank)


def _expert_weights(expert_factor: Tensor, gates: Tensor) -> Tensor:
    """Contract gates (..., k, t) with the expert factor to the weight of each core slice, (N, k·p)."""
    if expert_factor.dtype is not gates.dtype or expert_factor.dtype in _NARROW:
        dtype = wide_dtype(expert_factor, gates)
        expert_factor, gates = expert_factor.to(dtype), gates.to(dtype)
    weights = _wide_product(gates.reshape(-1, gates.shape[-1]), expert_factor)
    return weights.reshape(-1, gates.shape[-2] * expert_factor.shape[-1])


_NARROW = (torch.float16, torch.bfloat16)


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    # Not in autocast's dtype: these are few numbers, and all experts are weighed by them.
    if not has_autocast(left.device.type):
        return left @ right
    with without_autocast(left.device.type):
        return left @ right
