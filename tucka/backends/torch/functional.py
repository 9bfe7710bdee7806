"""The adapter's arithmetic as differentiable torch functions: thin products on activations, never a d×d matrix.

Nothing here reads a tensor back to the host, so all of it runs inside CUDA graphs and ``torch.compile``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tucka.errors import ShapeError, expected

__all__ = ["add_update", "mix_cores", "tucker_adapt", "tucker_adapt_gated"]


def mix_cores(cores: Tensor, expert_factor: Tensor, gates: Tensor) -> Tensor:
    r"""Mix all cores by their gates, :math:`\bar G = \sum_{ijq} \gamma_{ij} C_{jq} \mathcal{G}_i[q]`.

    Runs in float32 at least, whatever autocast says: these are k·p·r² numbers, and routing decides by them.

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
        In the widest dtype of the inputs, float32 at least.

    Examples
    --------
    >>> mix_cores(torch.ones(2, 1, 3, 3), torch.ones(4, 1), torch.ones(5, 2, 4)).shape
    torch.Size([5, 3, 3])
    """
    groups, ranks, rank, _ = cores.shape
    weights = expert_weights(expert_factor, gates)
    with torch.autocast(cores.device.type, enabled=False):
        mixed = weights.reshape(-1, groups * ranks) @ _wide(cores, weights.dtype).reshape(groups * ranks, rank * rank)
    return mixed.reshape(*gates.shape[:-2], rank, rank)


def expert_weights(expert_factor: Tensor, gates: Tensor) -> Tensor:
    """Contract gates with the expert factor: the weight of each core slice.

    Parameters
    ----------
    expert_factor : Tensor, shape (t, p)
        The factor of the expert mode.
    gates : Tensor, shape (..., k, t)
        Any gates.

    Returns
    -------
    Tensor, shape (..., k, p)
        In float32 at least.

    Examples
    --------
    >>> expert_weights(torch.ones(4, 1), torch.ones(2, 4)).shape
    torch.Size([2, 1])
    """
    dtype = torch.promote_types(torch.promote_types(expert_factor.dtype, gates.dtype), torch.float32)
    with torch.autocast(gates.device.type, enabled=False):
        return _wide(gates, dtype) @ _wide(expert_factor, dtype)


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _check(x: Tensor, basis: Tensor, where: str) -> None:
    if x.ndim == 0 or basis.ndim != 2 or x.shape[-1] != basis.shape[0]:
        rule = f"axes (..., d) with d = {basis.shape[0]} to match basis {tuple(basis.shape)}"
        raise ShapeError(expected("x", rule, f"shape {tuple(x.shape)}", where=where))


def _check_lead(name: str, lead: tuple[int, ...], x: Tensor, where: str) -> None:
    if lead != tuple(x.shape[:-1])[: len(lead)]:
        rule = f"leading axes that are the first of x's {tuple(x.shape[:-1])}"
        raise ShapeError(expected(name, rule, f"leading axes {lead}", where=where))


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

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (9), without its W.

    Examples
    --------
    >>> tucker_adapt(torch.ones(2, 5, 4), torch.eye(4)[:, :1], torch.tensor([[2.0]]))[0, 0]
    tensor([3., 1., 1., 1.])
    """
    return add_update(x, x, basis, mixed_core, alpha=alpha)


def add_update(base: Tensor, x: Tensor, basis: Tensor, mixed_core: Tensor, *, alpha: float = 1.0) -> Tensor:
    r"""Add one adapter's update of `x` to `base`, so that the updates of several adapters add up.

    Parameters
    ----------
    base : Tensor, shape (..., d)
        What the update is added to: `x` itself for the first adapter.
    x : Tensor, shape (..., d)
        Activations.
    basis : Tensor, shape (d, r)
        U.
    mixed_core : Tensor, shape (..., r, r)
        Ḡ, aligned as in `tucker_adapt`.
    alpha : float
        The scale of the update.

    Returns
    -------
    Tensor, shape (..., d)
        ``base + alpha * ((x U) Ḡ) Uᵀ``.

    Raises
    ------
    ShapeError
        If the shapes do not fit.

    Examples
    --------
    >>> add_update(torch.zeros(1, 2), torch.ones(1, 2), torch.eye(2), torch.eye(2))
    tensor([[1., 1.]])
    """
    where = "tucker_adapt"
    _check(x, basis, where)
    rank = basis.shape[1]
    if mixed_core.ndim < 2 or mixed_core.shape[-2:] != (rank, rank):
        rule = f"axes (..., r, r) with r = {rank} to match basis {tuple(basis.shape)}"
        raise ShapeError(expected("mixed_core", rule, f"shape {tuple(mixed_core.shape)}", where=where))
    lead = tuple(mixed_core.shape[:-2])
    _check_lead("mixed_core", lead, x, where)
    basis, mixed_core = basis.to(x.dtype), mixed_core.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    inner = rows @ basis
    if lead:
        sets = mixed_core.reshape(-1, rank, rank)
        inner = torch.bmm(inner.reshape(sets.shape[0], -1 if x.numel() else 0, rank), sets).reshape(-1, rank)
    else:
        inner = inner @ mixed_core
    return _finish(base, inner, basis, alpha)


def _finish(base: Tensor, inner: Tensor, basis: Tensor, alpha: float) -> Tensor:
    """Return ``base + alpha * inner Uᵀ``: one kernel, which keeps neither `base` nor the result for backward."""
    rows = base.reshape(-1, base.shape[-1])
    return torch.addmm(rows, inner, basis.t(), alpha=alpha).reshape(base.shape)


def tucker_adapt_gated(
    x: Tensor, basis: Tensor, cores: Tensor, expert_factor: Tensor, gates: Tensor, *, alpha: float = 1.0
) -> Tensor:
    r"""Adapt activations by any gates, from one set for all rows to one for each.

    Where each row has gates of its own, per-row cores are not formed: all rows take one
    (N, k·p·r) × (k·p·r, r) product.

    Parameters
    ----------
    x : Tensor, shape (..., d)
        Activations.
    basis : Tensor, shape (d, r)
        U.
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
        The adapted activations.

    Raises
    ------
    ShapeError
        If the shapes do not fit.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (9), without its W.

    Examples
    --------
    >>> cores, factor, gates = torch.zeros(2, 1, 3, 3), torch.ones(2, 1), torch.ones(5, 2, 2)
    >>> torch.equal(tucker_adapt_gated(torch.ones(5, 4), torch.eye(4)[:, :3], cores, factor, gates), torch.ones(5, 4))
    True
    """
    return add_gated_update(x, x, basis, cores, expert_factor, gates, alpha=alpha)


def add_gated_update(
    base: Tensor, x: Tensor, basis: Tensor, cores: Tensor, expert_factor: Tensor, gates: Tensor, *, alpha: float = 1.0
) -> Tensor:
    """Add one adapter's gated update of `x` to `base`.

    Parameters
    ----------
    base, x : Tensor, shape (..., d)
        As in `add_update`.
    basis, cores, expert_factor, gates : Tensor
        As in `tucker_adapt_gated`.
    alpha : float
        The scale of the update.

    Returns
    -------
    Tensor, shape (..., d)
        `base` plus the update.

    Raises
    ------
    ShapeError
        If the shapes do not fit.

    Examples
    --------
    >>> base, x, basis, cores = torch.zeros(1, 2), torch.ones(1, 2), torch.eye(2), torch.eye(2)[None, None]
    >>> add_gated_update(base, x, basis, cores, torch.ones(1, 1), torch.tensor([[[0.5]]]))
    tensor([[0.5000, 0.5000]])
    """
    where = "tucker_adapt_gated"
    _check(x, basis, where)
    if gates.ndim < 2 or gates.shape[-2:] != (cores.shape[0], expert_factor.shape[0]):
        rule = f"axes (..., k, t) with (k, t) = {(cores.shape[0], expert_factor.shape[0])}"
        raise ShapeError(expected("gates", rule, f"shape {tuple(gates.shape)}", where=where))
    lead = tuple(gates.shape[:-2])
    _check_lead("gates", lead, x, where)
    if len(lead) < x.ndim - 1 or not lead:
        return add_update(base, x, basis, mix_cores(cores, expert_factor, gates), alpha=alpha)
    basis = basis.to(x.dtype)
    rank = basis.shape[1]
    inner = x.reshape(-1, x.shape[-1]) @ basis
    weights = expert_weights(expert_factor, gates).flatten(-2).to(inner.dtype)
    slices = weights.shape[-1]
    spread = (weights.reshape(-1, slices, 1) * inner[:, None, :]).reshape(-1, slices * rank)
    return _finish(base, spread @ cores.to(x.dtype).reshape(slices * rank, rank), basis, alpha)
