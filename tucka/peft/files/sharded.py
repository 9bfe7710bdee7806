"""Parameters that torch's older FSDP or DeepSpeed's ZeRO-3 have cut into pieces; `fully_shard` needs none of this."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn

from tucka.backends.torch.private import has_master_copy, is_in_pieces

__all__ = ["whole_copy", "whole_parameters"]


@contextmanager
def whole_parameters(model: nn.Module, module: nn.Module, *, written: bool) -> Iterator[None]:
    """Let the parameters of one module be whole inside the block, which may write if it says so; all ranks call it."""
    with _gathered(model, module, written=written):
        yield
    if written:
        _renew_master_copies(list(module.parameters()))


def whole_copy(model: nn.Module, module: nn.Module, name: str) -> Tensor:
    """Copy one parameter of a module of a model, in float32 and as a whole; all ranks call this."""
    with whole_parameters(model, module, written=False):
        parameter = getattr(module, name)
        gather = getattr(parameter, "full_tensor", None)  # of `fully_shard`
        whole = parameter if gather is None else cast(Tensor, gather())
        return whole.detach().float().clone()


def _gathered(model: nn.Module, module: nn.Module, *, written: bool) -> AbstractContextManager[Any]:
    """Find the engine that has cut the parameters of a module."""
    pieces = list(module.parameters())
    if any(map(is_in_pieces, pieces)):
        zero: Any = importlib.import_module("deepspeed").zero
        # The first rank's values reach the others; None for no writing.
        source = 0 if written else None
        return cast("AbstractContextManager[Any]", zero.GatheredParameters(pieces, modifier_rank=source))
    if not dist.is_available() or not dist.is_initialized():
        return nullcontext()
    from torch.distributed.fsdp import FullyShardedDataParallel

    units = [unit for unit in model.modules() if isinstance(unit, FullyShardedDataParallel)]
    around = [unit for unit in units if any(part is module for part in unit.modules())]
    if not around:
        return nullcontext()
    summon: Any = FullyShardedDataParallel.summon_full_params
    return cast("AbstractContextManager[Any]", summon(around[-1], recurse=False, writeback=written))


def _renew_master_copies(parameters: list[nn.Parameter]) -> None:
    """Let DeepSpeed's optimiser, in every stage of ZeRO, take over what was written: it trains a copy of its own."""
    copied = [parameter for parameter in parameters if has_master_copy(parameter)]
    utils: Any = importlib.import_module("deepspeed.utils") if copied else None
    for parameter in copied:
        if is_in_pieces(parameter):  # each rank its own piece, with the padding that it has
            utils.safe_set_local_fp32_param(parameter, cast(Any, parameter).ds_tensor)
        else:
            utils.safe_set_full_fp32_param(parameter, parameter.detach())
