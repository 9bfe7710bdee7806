"""Parameters that torch's older FSDP or DeepSpeed's ZeRO-3 have cut into pieces; `fully_shard` needs none of this."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch.distributed as dist
from torch import nn

__all__ = ["whole_parameters"]


@contextmanager
def whole_parameters(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Let the parameters of one module be whole inside the block, and keep what is written; all ranks call this."""
    with _gathered(model, module):
        yield


def _gathered(model: nn.Module, module: nn.Module) -> AbstractContextManager[Any]:
    """Find the engine that has cut the parameters of a module."""
    pieces = list(module.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in pieces):  # DeepSpeed's mark
        zero: Any = importlib.import_module("deepspeed").zero
        return cast("AbstractContextManager[Any]", zero.GatheredParameters(pieces, modifier_rank=0))
    if not dist.is_available() or not dist.is_initialized():
        return nullcontext()
    from torch.distributed.fsdp import FullyShardedDataParallel

    units = [unit for unit in model.modules() if isinstance(unit, FullyShardedDataParallel)]
    around = [unit for unit in units if any(part is module for part in unit.modules())]
    if not around:
        return nullcontext()
    return cast("AbstractContextManager[Any]", FullyShardedDataParallel.summon_full_params(around[-1], recurse=False))
