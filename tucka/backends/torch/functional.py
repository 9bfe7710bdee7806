"""The adapter's arithmetic as differentiable torch functions: thin products on activations, never a d×d matrix.

Nothing here reads a tensor back to the host, so all of it runs inside CUDA graphs and ``torch.compile``. All functions
have second derivatives and forward-mode ones, and work under `torch.func`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tucka.backends.torch.checks import Where, check_activations, check_lead, check_parts, check_rank
from tucka.backends.torch.thin import add_product, project, without_autocast

__all__ = [
    "add_gated_update",
    "add_update",
    "expert_weights",
    "mix_checked",
    "mix_cores",
    "tucker_adapt",
    "tucker_adapt_gated",
]


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


def add_update(
    base: Tensor, x: Tensor, basis: Tensor, mixed_core: Tensor, *, alpha: float = 1.0, where: Where = "tucker_adapt"
) -> Tensor:
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
    where : str or callable
        Who asks, for messages.

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
    check_activations(x, basis, where)
    rank = basis.shape[1]
    check_rank("mixed_core", mixed_core, basis, where)
    lead = tuple(mixed_core.shape[:-2])
    check_lead("mixed_core", lead, x, where)
    inner, rows = project(x, basis)
    # Scaled here, where there are r² numbers and not N·r or N·d.
    core = (mixed_core if alpha == 1 else alpha * mixed_core).to(inner.dtype)
    if lead:
        sets = core.reshape(-1, rank, rank)
        inner = torch.bmm(inner.reshape(sets.shape[0], -1 if x.numel() else 0, rank), sets).reshape(-1, rank)
    else:
        inner = inner @ core
    return _finish(base, x, rows, inner, basis)


def _finish(base: Tensor, x: Tensor, rows: Tensor, inner: Tensor, basis: Tensor) -> Tensor:
    """Return ``base + inner Uᵀ``, where `rows` is what `project` made of `x`."""
    if base is not x:
        rows = base.reshape(rows.shape).to(rows.dtype)
    return add_product(rows, inner, basis).reshape(base.shape)


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
    base: Tensor,
    x: Tensor,
    basis: Tensor,
    cores: Tensor,
    expert_factor: Tensor,
    gates: Tensor,
    *,
    alpha: float = 1.0,
    where: Where = "tucker_adapt_gated",
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
    where : str or callable
        Who asks, for messages.

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
    check_activations(x, basis, where)
    check_parts(cores, expert_factor, gates, where)
    rank = basis.shape[1]
    check_rank("cores", cores, basis, where)
    lead = tuple(gates.shape[:-2])
    check_lead("gates", lead, x, where)
    if len(lead) < x.ndim - 1 or not lead:
        return add_update(base, x, basis, mix_checked(cores, expert_factor, gates), alpha=alpha, where=where)
    inner, rows = project(x, basis)
    stacked = cores.to(inner.dtype).reshape(-1, rank)
    slices = cores.shape[0] * cores.shape[1]
    weights = expert_weights(expert_factor, gates)
    weights = (weights if alpha == 1 else alpha * weights).to(inner.dtype).reshape(-1, slices, 1)
    spread = (weights * inner[:, None, :]).reshape(-1, slices * rank)
    return _finish(base, x, rows, spread @ stacked, basis)


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

    Raises
    ------
    ShapeError
        If the shapes do not fit.

    Examples
    --------
    >>> mix_cores(torch.ones(2, 1, 3, 3), torch.ones(4, 1), torch.ones(5, 2, 4)).shape
    torch.Size([5, 3, 3])
    """
    check_parts(cores, expert_factor, gates, "mix_cores")
    return mix_checked(cores, expert_factor, gates)


def mix_checked(cores: Tensor, expert_factor: Tensor, gates: Tensor) -> Tensor:
    """Mix cores whose shapes have been checked, see `mix_cores`.

    Parameters
    ----------
    cores, expert_factor, gates : Tensor
        As in `mix_cores`.

    Returns
    -------
    Tensor, shape (..., r, r)
        The mixed cores.

    Examples
    --------
    >>> mix_checked(torch.ones(2, 1, 3, 3), torch.ones(4, 1), torch.ones(5, 2, 4)).shape
    torch.Size([5, 3, 3])
    """
    groups, slices, rank, _ = cores.shape
    weights = expert_weights(expert_factor, gates).reshape(-1, groups * slices)
    mixed = _product(weights, cores.to(weights.dtype).reshape(groups * slices, rank * rank))
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
    return _product(gates.to(dtype), expert_factor.to(dtype))


def _product(left: Tensor, right: Tensor) -> Tensor:
    with without_autocast(left.device.type):
        return left @ right
