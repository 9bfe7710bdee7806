"""What adapters have to know of engines that cut parameters into pieces: torch's older FSDP and DeepSpeed's ZeRO-3.

torch's newer FSDP (`fully_shard`) needs nothing of this.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch.distributed as dist
from torch import nn

__all__ = ["plain_name", "whole_parameters"]


def plain_name(name: str) -> str:
    """Name a module or tensor as the model without its wrappers does, and as FSDP's own state dicts do.

    Parameters
    ----------
    name : str
        The full name.

    Returns
    -------
    str
        Without the wrappers.

    Examples
    --------
    >>> plain_name("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.weight")
    'layers.0.weight'
    """
    return name.replace("_fsdp_wrapped_module.", "")


@contextmanager
def whole_parameters(model: nn.Module, module: nn.Module) -> Iterator[None]:
    """Let the parameters of one module be whole inside the block, and keep what is written to them.

    Parameters
    ----------
    model : Module
        The model, sharded or not; all ranks have to call this.
    module : Module
        A part of it.

    Yields
    ------
    None
        Nothing.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> with whole_parameters(model, model[0]):
    ...     model[0].weight.shape
    torch.Size([2, 2])
    """
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
