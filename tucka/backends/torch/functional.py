"""The adapter's arithmetic as differentiable torch functions: thin products on activations, never a d×d matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tucka.backends.torch.checks import check_lead, check_parts, check_rank, check_tensors, check_thin
from tucka.backends.torch.private import version_of
from tucka.backends.torch.thin import add_product, compute_dtype, project, turned, wide_dtype, without_autocast

__all__ = ["LaidOut", "add_gated_update", "mix_cores", "tucker_adapt", "tucker_adapt_gated"]

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
    x: Tensor, basis: Tensor, cores: Tensor, expert_factor: Tensor, gates: Tensor, *, alpha: float | Tensor = 1.0
) -> Tensor:
    r"""Adapt activations by any gates, from one set for all rows to one for each.

    Where each row has gates of its own, per-row cores are not formed: all rows take one
    (N, k·p·r) × (k·p·r, r) product.

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
    return _mixed(cores, expert_factor, gates)


def add_gated_update(
    base: Tensor,  # (..., d): what the update is added to, x itself or the sum so far
    x: Tensor,  # (..., d)
    basis: Tensor,  # (d, r)
    cores: Tensor,  # (k, p, r, r)
    expert_factor: Tensor,  # (t, p)
    gates: Tensor,  # (..., k, t), aligned with x from the left
    *,
    alpha: float | Tensor,
) -> Tensor:
    """Add one adapter's gated update of `x` to `base`, so that the updates of several adapters add up."""
    lead = gates.ndim - 2
    if lead < x.ndim - 1 or not lead:
        return _add_update(base, x, basis, _mixed(cores, expert_factor, gates), alpha=alpha)
    inner, rows = project(x, basis)
    rank, slices = basis.shape[1], cores.shape[0] * cores.shape[1]
    stacked = cores.to(inner.dtype).reshape(-1, rank)
    weights = _expert_weights(expert_factor, gates)
    weights = _scaled(weights, alpha).to(inner.dtype).reshape(-1, slices, 1)
    spread = (weights * inner[:, None, :]).reshape(-1, slices * rank)
    return _finish(base, x, rows, spread @ stacked, basis)


class LaidOut:
    """What all calls with one route have in common: the mixed core and the turned basis, in the dtype of the input."""

    def __init__(
        self,
        cores: Tensor,  # (k, p, r, r)
        expert_factor: Tensor,  # (t, p)
        basis: Tensor,  # (d, r)
        gates: Tensor,  # (k, t) or (B, k, t)
        x: Tensor,  # (..., d)
        *,
        alpha: float,
    ) -> None:
        dtype = compute_dtype(x)
        self._sources = (cores, expert_factor, basis, gates)
        self._state = self._state_of(x, alpha)
        self._turned = turned(basis, dtype)
        mixed = _mixed(cores, expert_factor, gates)
        self._core = _scaled(mixed, alpha).to(dtype)

    def _state_of(self, x: Tensor, alpha: float) -> tuple[Any, ...]:
        return (compute_dtype(x), alpha, *((version_of(part), part.data_ptr()) for part in self._sources))

    def is_of(
        self, cores: Tensor, expert_factor: Tensor, basis: Tensor, gates: Tensor, x: Tensor, *, alpha: float
    ) -> bool:
        """Tell whether the parts are the ones that this was made of, and have not changed since."""
        known = self._sources
        same = known[0] is cores and known[1] is expert_factor and known[2] is basis and known[3] is gates
        return same and self._state == self._state_of(x, alpha)

    def add_update(self, base: Tensor, x: Tensor) -> Tensor:
        """Add the update of `x` (..., d) to `base` (..., d), bit for bit as `add_gated_update` does."""
        core, basis = self._core, self._turned
        rows = x.reshape(-1, x.shape[-1]).to(core.dtype)
        inner = rows @ basis.t()
        inner = inner @ core if core.ndim == 2 else _by_sample(inner, core)
        return torch.addmm(rows if base is x else base.reshape(rows.shape).to(core.dtype), inner, basis).reshape(
            base.shape
        )


def _by_sample(inner: Tensor, core: Tensor) -> Tensor:
    """Multiply rows (N, r) by the core (B, ..., r, r) of their sample."""
    rank = core.shape[-1]
    sets = core.reshape(-1, rank, rank)
    return torch.bmm(inner.reshape(sets.shape[0], -1 if inner.numel() else 0, rank), sets).reshape(-1, rank)


def _scaled(numbers: Tensor, alpha: float | Tensor) -> Tensor:
    """Multiply by α; a tensor's value is not looked at."""
    return numbers if not isinstance(alpha, Tensor) and alpha == 1 else alpha * numbers


def _add_update(base: Tensor, x: Tensor, basis: Tensor, mixed_core: Tensor, *, alpha: float | Tensor) -> Tensor:
    """Add the update of `x` (..., d) by a mixed core (..., r, r) to `base` (..., d)."""
    inner, rows = project(x, basis)
    # Scaled here, where there are r² numbers and not N·r or N·d.
    core = _scaled(mixed_core, alpha).to(inner.dtype)
    inner = inner @ core if core.ndim == 2 else _by_sample(inner, core)
    return _finish(base, x, rows, inner, basis)


def _finish(base: Tensor, x: Tensor, rows: Tensor, inner: Tensor, basis: Tensor) -> Tensor:
    """Return ``base + inner Uᵀ``, where `rows` is what `project` made of `x`."""
    if base is not x:
        rows = base.reshape(rows.shape).to(rows.dtype)
    return add_product(rows, inner, basis).reshape(base.shape)


def _mixed(cores: Tensor, expert_factor: Tensor, gates: Tensor) -> Tensor:
    """Mix cores by gates (..., k, t) to (..., r, r)."""
    groups, slices, rank, _ = cores.shape
    weights = _expert_weights(expert_factor, gates).reshape(-1, groups * slices)
    mixed = _wide_product(weights, cores.to(weights.dtype).reshape(groups * slices, rank * rank))
    return mixed.reshape(*gates.shape[:-2], rank, rank)


def _expert_weights(expert_factor: Tensor, gates: Tensor) -> Tensor:
    """Contract gates (..., k, t) with the expert factor to the weight of each core slice, (..., k, p)."""
    dtype = wide_dtype(expert_factor, gates)
    return _wide_product(gates.to(dtype), expert_factor.to(dtype))


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    # Not in autocast's dtype: these are few numbers, and all experts are weighed by them.
    with without_autocast(left.device.type):
        return left @ right
