"""Mixing cores by gates: small products in float32 at least, because routing decides by them."""

from __future__ import annotations

import torch
from torch import Tensor

from tucka.backends.torch.checks import check_parts
from tucka.backends.torch.thin import without_autocast

__all__ = ["expert_weights", "mix_checked", "mix_cores"]


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
