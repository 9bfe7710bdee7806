"""One routing decision for all data-parallel ranks, on torch's own collectives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tucka.backends.torch.routing.router import Router
from tucka.core.routing import routing_feature

__all__ = [
    "broadcast_from_first",
    "gates_over_ranks",
    "gather_rows",
    "shard_like",
    "sum_over_ranks",
    "takes_common_decision",
]


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def takes_common_decision(router: Router) -> bool:
    """Tell whether a route made now is to be made together with the other ranks.

    Parameters
    ----------
    router : Router
        Which makes it.

    Returns
    -------
    bool
        True for batch routing with gradients, in a group of several ranks. One rank may evaluate or generate alone:
        it must not wait for the others.

    Examples
    --------
    >>> from tucka.spec import TuckerSpec
    >>> takes_common_decision(Router(TuckerSpec(), 4))
    False
    """
    return router.spec.routing == "batch" and torch.is_grad_enabled() and _has_ranks()


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks; each rank's part gets the sum of all ranks' gradients."""

    @staticmethod
    def forward(_ctx: Any, vector: Tensor) -> Tensor:
        total = vector.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def gates_over_ranks(router: Router, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Route the batches of all ranks as one batch: d + 1 numbers are exchanged.

    Parameters
    ----------
    router : Router
        The router, for batch routing.
    hidden : Tensor, shape (B, ..., d)
        This rank's inputs; ranks may have different numbers of samples.
    mask : Tensor, shape (B, ...), or None
        Which tokens count.

    Returns
    -------
    Tensor, shape (k, t)
        The same gates on all ranks. Differentiable, also into the other ranks' inputs.
    """
    mask = None if router.count_padding else mask
    with torch.autocast(hidden.device.type, enabled=False):
        wide = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
        mask = None if router.count_padding else mask
        samples = routing_feature(wide, mask=mask, routing="sample")
        present = samples.new_tensor(len(samples)) if mask is None else (mask != 0).flatten(1).any(dim=1).sum()
        total = _SumOverRanks.apply(torch.cat([samples.sum(dim=0), present.to(samples.dtype)[None]]))
        feature = total[:-1] / total[-1].clamp(min=1)
    # By a call of the router, as if this were one sample: hooks that gather its parameters (DeepSpeed's) then see it.
    gates: Tensor = router(feature[None])
    return gates


def gather_rows(rows: Tensor) -> Tensor:
    """Collect the rows of all ranks, in their order; a rank may have none.

    Parameters
    ----------
    rows : Tensor, shape (n, d)
        This rank's.

    Returns
    -------
    Tensor, shape (N, d)
        All ranks'; `rows` itself without other ranks.

    Examples
    --------
    >>> gather_rows(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    if not _has_ranks():
        return rows
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, rows)
    return torch.cat([part for part in parts if len(part)] or [rows])


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up what the ranks counted.

    Parameters
    ----------
    tensor : Tensor
        This rank's; the same shape on all ranks.

    Returns
    -------
    Tensor
        The sum; `tensor` itself without other ranks.

    Examples
    --------
    >>> sum_over_ranks(torch.tensor([1, 2]))
    tensor([1, 2])
    """
    if not _has_ranks():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def broadcast_from_first(*tensors: Tensor) -> None:
    """Overwrite tensors by those of the first rank: what ranks computed alike may differ in its last bits.

    Parameters
    ----------
    *tensors : Tensor
        Changed in place; nothing happens without other ranks.

    Examples
    --------
    >>> broadcast_from_first(torch.ones(2))
    """
    if _has_ranks():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Lay a whole tensor out as a parameter is, which FSDP may have cut into shards.

    Parameters
    ----------
    value : Tensor
        The whole, alike on all ranks.
    parameter : Tensor
        What it is to be copied into.

    Returns
    -------
    Tensor
        `value` itself where the parameter is whole.

    Examples
    --------
    >>> value = torch.ones(2)
    >>> shard_like(value, torch.zeros(2)) is value
    True
    """
    if not dist.is_available():
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.dtype), parameter.device_mesh, parameter.placements)
