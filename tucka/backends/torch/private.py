"""What torch and transformers do not promise to keep, in one place; a test for each fails when one of them changes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import CheckpointFunction, _CachingTorchDispatchMode

__all__ = [
    "are_transformations_on",
    "assert_later",
    "at_end_of_backward",
    "audio_mask",
    "buffers_by_name",
    "called",
    "checkpoint_frame",
    "data_parallel_group",
    "has_input_gradients",
    "has_input_hooks",
    "has_master_copy",
    "is_any_autocast_on",
    "is_called_alone",
    "is_computed_again",
    "is_exporting",
    "is_in_pieces",
    "is_replica",
    "is_transformed",
    "modules_by_name",
    "outer_checkpoint_frames",
    "outside_checkpoints",
    "parameters_by_name",
    "pooled_mask",
    "reentrant_checkpoints",
    "running_backward",
    "version_of",
    "versions_of",
    "whole_shape",
]


def checkpoint_frame() -> tuple[Any, bool]:
    """Return torch's object for the checkpointed region around this call, and whether the region is computed again."""
    # The object is the same in forward and recomputation, and lives as long as the graph; None outside of regions.
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return (None, False) if hooks is None else _frame_of(hooks)


def outer_checkpoint_frames() -> list[tuple[Any, bool]]:
    """Return the same of the regions around the innermost one, from inner to outer."""
    stack: Any = torch._C._autograd
    taken: list[Any] = []
    try:
        while (hooks := stack._top_saved_tensors_default_hooks(True)) is not None:
            taken.append(hooks)
            stack._pop_saved_tensors_default_hooks()
    finally:
        for pack, unpack in reversed(taken):
            stack._push_saved_tensors_default_hooks(pack, unpack)
    return [found for found in map(_frame_of, taken[1:]) if found[0] is not None]


def reentrant_checkpoints() -> list[tuple[Any, bool]]:
    """List torch's objects for the reentrant checkpoints around this call, and whether each is computed again."""
    # From inner to outer; each is the same in its forward and its backward. It looks at the callers: there is no other
    # trace of such checkpoints, which run without gradients at first.
    found = []
    caller: Any = inspect.currentframe()
    while caller is not None:
        if caller.f_code in _REENTRANT:
            found.append((caller.f_locals["ctx"], caller.f_code is _REENTRANT[1]))
        caller = caller.f_back
    return found


def is_computed_again() -> bool:
    """Tell whether this call runs in a checkpoint of either kind that a backward computes again."""
    if torch.compiler.is_compiling() or running_backward() == -1:
        return False
    frames = [checkpoint_frame(), *outer_checkpoint_frames(), *reentrant_checkpoints()]
    return any(again for _, again in frames)


def has_input_gradients(region: Any) -> bool:
    """Tell whether a backward may reach a reentrant checkpoint: it has a place in a graph."""
    return bool(region.next_functions)  # none where no input needs a gradient, or all is inside of torch.no_grad


_REENTRANT = (CheckpointFunction.forward.__code__, CheckpointFunction.backward.__code__)


# The number of the backward that runs in this thread, another one for each backward inside of it; -1 outside of all.
running_backward: Callable[[], int] = torch._C._current_graph_task_id


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call a function when the backward that runs now has ended well; what it raises, the backward raises."""
    engine: Any = torch.autograd.Variable._execution_engine
    engine.queue_callback(function)


def _frame_of(hooks: Any) -> tuple[Any, bool]:
    pack: Any = inspect.unwrap(hooks[0])
    names = getattr(getattr(pack, "__code__", None), "co_freevars", ())
    if "frame" in names:
        return pack.__closure__[names.index("frame")].cell_contents, False
    if "target_frame_ref" in names:
        return pack.__closure__[names.index("target_frame_ref")].cell_contents(), True
    return None, False


def is_transformed(tensor: Tensor) -> bool:
    """Tell whether a tensor exists only inside a transformation of `torch.func`, and must not be kept beyond it."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def are_transformations_on() -> bool:
    """Tell whether a transformation of `torch.func` runs, or differentiation in forward mode."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _kept(tensor: Tensor) -> Tensor:
    # Torch restores the graph itself. With it, an output that is kept would hold its own graph for ever.
    return tensor.detach()


def _same(tensor: Tensor) -> Tensor:
    return tensor


@contextlib.contextmanager
def outside_checkpoints() -> Iterator[None]:
    """Keep what is computed inside out of gradient checkpointing: the backward does not compute it again."""
    with contextlib.ExitStack() as stack:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and checkpoint_frame()[0] is not None:
            # Checkpoints see what is saved through the innermost pair of such hooks; torch.func allows none.
            with contextlib.suppress(RuntimeError):
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_kept, _same))
            # Selective checkpoints count the operations themselves, and expect the same ones in the recomputation.
            if any(isinstance(mode, _CachingTorchDispatchMode) for mode in _get_current_dispatch_mode_stack()):
                stack.enter_context(_disable_current_modes())
        yield


# Whether autocast is on for any type of device, in a tenth of the time that asking for one takes.
is_any_autocast_on: Callable[[], bool] = torch._C._is_any_autocast_enabled


def audio_mask(model: Any, mask: Tensor, length: int) -> Tensor | None:
    """Convert a mask of audio samples (B, T) to one of feature frames (B, length) by the model's own function."""
    of_features = getattr(model, "_get_feature_vector_attention_mask", None)
    if callable(of_features):
        return _if_complete(lambda each: of_features(length, each), mask)
    of_output = getattr(model, "_get_output_attention_mask", None)
    return _if_complete(lambda each: of_output(each, length), mask) if callable(of_output) else None


def _if_complete(convert: Callable[[Tensor], Tensor], mask: Tensor) -> Tensor | None:
    """Convert a mask, unless one of a sound without padding would leave frames out: those are of an earlier layer."""
    whole = convert(torch.ones(1, mask.shape[1], dtype=mask.dtype))  # on the CPU, where looking at it waits for nothing
    return convert(mask) if bool((whole != 0).all()) else None


def pooled_mask(model: Any, mask: Tensor, length: int) -> Tensor | None:
    """Convert a mask of characters (B, S) to one of pooled characters (B, length) by the model's own function."""
    convert = getattr(model, "_downsample_attention_mask", None)
    if not callable(convert):
        return None
    pooled: Tensor = convert(mask, downsampling_rate=model.config.downsampling_rate)
    return pooled if pooled.shape[1] == length else None


def data_parallel_group() -> Any:
    """Return the group of ranks of the DistributedDataParallel whose forward runs; None outside of one."""
    running = DistributedDataParallel._active_ddp_module
    return None if running is None else running.process_group


def is_exporting() -> bool:
    """Tell whether torch.export records this call: what a program writes to has to be given to it."""
    told: Any = getattr(torch.compiler, "is_exporting", None)  # from torch 2.7 on
    return bool(told is not None and told())


_VERSION = attrgetter("_version")


def version_of(tensor: Tensor) -> int:
    """Count how often a tensor has been written to; torch does not count for tensors made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def versions_of(tensors: Iterable[Tensor]) -> list[int]:
    """Count how often each tensor has been written to."""
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:  # some were made in inference mode
        return [version_of(each) for each in tensors]


def pointers_of(tensors: Iterable[Tensor]) -> list[int]:
    """Say where each tensor's numbers are."""
    return list(map(Tensor.data_ptr, tensors))


def assert_later(condition: Tensor, message: str) -> None:
    """Raise if a condition is false once it is computed, without waiting for it: for code that is being compiled."""
    torch._assert_async(condition, message)


def has_input_hooks(module: nn.Module) -> bool:
    """Tell whether anything may change a module's input before its forward sees it."""
    return bool(module._forward_pre_hooks)


def modules_by_name(container: nn.Module) -> Any:
    """Return what a container holds as a plain dictionary, which is read in a tenth of the time."""
    return container._modules


def parameters_by_name(module: nn.Module) -> dict[str, Any]:
    """Return a module's own parameters as a plain dictionary."""
    return module._parameters


def buffers_by_name(module: nn.Module) -> dict[str, Any]:
    """Return a module's own buffers as a plain dictionary."""
    return module._buffers


def is_replica(module: nn.Module) -> bool:
    """Tell whether a module is one of the copies that nn.DataParallel makes for each call."""
    return bool(getattr(module, "_is_replica", False))


def called(base: nn.Module, x: Tensor) -> Any:
    """Call a layer; a plain linear layer in whose calls nobody takes part, without what a module's call looks for."""
    if type(base) is nn.Linear and not (any(_HOOKS(base)) or "forward" in vars(base) or any(_HOOKS_OF_ALL)):
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
        if weight is not None:
            return nn.functional.linear(x, weight, bias)
    return base(x)


_HOOKS = attrgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS_OF_ALL = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
)


def is_called_alone(module: nn.Module) -> bool:
    """Tell whether nobody else takes part in a module's calls, as Accelerate does to bring parameters to a device."""
    return not (module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module))


# Marks of DeepSpeed: of parameters that ZeRO-3 has cut, and of those whose optimiser trains a copy, from ZeRO-1 on.


def is_in_pieces(parameter: Tensor) -> bool:
    """Tell whether each process has one piece of a parameter only, and none of its shape."""
    return hasattr(parameter, "ds_id")


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return a parameter's shape, also where each process has one piece of it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def has_master_copy(parameter: Tensor) -> bool:
    """Tell whether an optimiser trains a copy of a parameter, and overwrites the parameter in each step."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")
