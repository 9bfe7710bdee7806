"""One routing decision for all data-parallel ranks, on torch's own collectives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tucka.backends.torch.private import data_parallel_group
from tucka.backends.torch.routing.router import Router
from tucka.core.routing import routing_feature

__all__ = [
    "broadcast_from_first",
    "gates_over_ranks",
    "gather_rows",
    "has_ranks",
    "ranks_of",
    "shard_like",
    "sum_over_ranks",
]


def ranks_of(group: Any) -> Any:
    """Return the group of ranks that route together: the one given, else that of the running DDP, else all (None)."""
    return data_parallel_group() if group is None else group


def has_ranks(group: Any = None) -> bool:
    """Tell whether a group has other ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


class _SumOverRanks(torch.autograd.Function):
    """The sum over the ranks of a group; each rank's part gets the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, vector: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = vector.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def gates_over_ranks(
    router: Router, hidden: Tensor, mask: Tensor | None, group: Any = None, like: Tensor | None = None
) -> Tensor:
    """Route the batches (B, ..., d) of all ranks as one batch, to gates (k, t): d + 1 numbers are exchanged."""
    mask = None if router.count_padding else mask
    with torch.autocast(hidden.device.type, enabled=False):
        wide = hidden.float() if hidden.dtype in (torch.float16, torch.bfloat16) else hidden
        samples = routing_feature(wide, mask=mask, routing="sample")
        present = samples.new_tensor(len(samples)) if mask is None else (mask != 0).flatten(1).any(dim=1).sum()
        total = _SumOverRanks.apply(torch.cat([samples.sum(dim=0), present.to(samples.dtype)[None]]), group)
        feature = total[:-1] / total[-1].clamp(min=1)
    # By a call of the router, as if this were one sample: hooks that gather its parameters (DeepSpeed's) then see it.
    gates: Tensor = router(feature[None], None, like)
    return gates


def gather_rows(rows: Tensor, group: Any = None) -> Tensor:
    """Collect the rows (n, d) of all ranks, in the order of the ranks; a rank may have none."""
    if not has_ranks(group):
        return rows
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, rows.cpu(), group=group)
    return torch.cat([part for part in parts if len(part)] or [rows.cpu()]).to(rows.device)


def sum_over_ranks(tensor: Tensor, group: Any = None) -> Tensor:
    """Add up what the ranks counted."""
    if not has_ranks(group):
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, group=group)
    return total


def broadcast_from_first(*tensors: Tensor, group: Any = None) -> None:
    """Overwrite tensors by those of the first rank: what ranks computed alike may differ in its last bits."""
    if has_ranks(group):
        for tensor in tensors:
            dist.broadcast(tensor, src=dist.get_global_rank(group, 0) if group is not None else 0, group=group)


def shard_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Lay a whole tensor, alike on all ranks, out as a parameter is, which FSDP may have cut into shards."""
    if not dist.is_available():
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value.to(parameter.dtype), parameter.device_mesh, parameter.placements)
