"""The adapter's arithmetic as differentiable torch functions: thin products on activations, never a d×d matrix."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tucka.backends.torch.checks import check_lead, check_parts, check_rank, check_tensors, check_thin
from tucka.backends.torch.cores import cores_together
from tucka.backends.torch.mixing import has_own_gates, mixed, times_own
from tucka.backends.torch.thin import rows_of
from tucka.backends.torch.update import add_product, add_update, project
from tucka.spec import FactorNorm

__all__ = ["add_gated_update", "add_own_update", "mix_cores", "tucker_adapt", "tucker_adapt_gated"]

# Nothing here reads a tensor back to the host, so all of it runs inside CUDA graphs and `torch.compile`. All functions
# have second derivatives and forward-mode ones, and work under `torch.func`.


def tucker_adapt(x: Tensor, basis: Tensor, mixed_core: Tensor, *, alpha: float | Tensor = 1.0) -> Tensor:
    r"""Adapt activations, :math:`x' = x + \alpha\, ((x U) \bar G)\, U^\top`.

    Parameters
    ----------
    x : Tensor, shape (..., d)
        Activations; any layout, zero rows allowed.
    basis : Tensor, shape (d, r)
        U. Cast to the dtype of `x`.
    mixed_core : Tensor, shape (r, r), (B, r, r), (B, S, r, r), ...
        Ḡ from `mix_cores`. Its leading axes align with those of `x` from the left. Cast to the dtype of `x`.
    alpha : float, or Tensor of shape ()
        The scale of the update; a tensor may have a gradient, and its value is not looked at.

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
    >>> import torch
    >>> tucker_adapt(torch.ones(2, 5, 4), torch.eye(4)[:, :1], torch.tensor([[2.0]]))[0, 0]
    tensor([3., 1., 1., 1.])
    """
    where = "tucker_adapt"
    check_tensors(where, x=x, basis=basis, mixed_core=mixed_core)
    check_thin("basis", basis, x, where)
    check_rank("mixed_core", mixed_core, basis, where)
    check_lead("mixed_core", tuple(mixed_core.shape[:-2]), x, where)
    return add_update(x, x, basis, mixed_core, alpha=alpha)


def tucker_adapt_gated(
    x: Tensor, basis: Tensor, cores: Tensor, expert_factor: Tensor, gates: Tensor, *, alpha: float | Tensor = 1.0
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
    alpha : float, or Tensor of shape ()
        The scale of the update; a tensor may have a gradient, and its value is not looked at.

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
    >>> import torch
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
    >>> import torch
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
    alpha: float | Tensor,
    norm: FactorNorm | None = None,  # what the basis adds to the cores, or by what it scales them
    strengths: Sequence[Tensor] = (),  # of a rotation, ()
) -> Tensor:
    """Add one adapter's gated update of `x` to `base`, so that the updates of several adapters add up."""
    flat = cores, expert_factor, basis
    if not has_own_gates(x, gates):
        core = cores_together(gates, flat, (1.0,), norm=norm, strengths=strengths)[0]
        return add_update(base, x, basis, core, alpha=alpha)
    own = cores_together(None, flat, (1.0,), norm=norm, strengths=strengths)[0]
    return add_own_update(base, x, basis, own, expert_factor, gates, alpha=alpha)


def add_own_update(
    base: Tensor,  # (..., d)
    x: Tensor,  # (..., d)
    basis: Tensor,  # (d, r)
    cores: Tensor,  # as `times_own` takes them
    expert_factor: Tensor,  # (t, p)
    gates: Tensor,  # (..., k, t), a set for each row of x
    *,
    alpha: float | Tensor = 1.0,
) -> Tensor:
    """Add the update of rows that have gates of their own."""
    inner, rows = project(x, basis)
    inner = times_own(inner, cores, expert_factor, gates, alpha=alpha)
    rows = rows if base is x else rows_of(base, rows.dtype)
    return add_product(rows, inner, basis).reshape(base.shape)
