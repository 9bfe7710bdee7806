"""What is measured of a model: times, in turns with other models, and counts that are the same in every run."""

from __future__ import annotations

import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def training_step(model: nn.Module, x: Tensor) -> None:
    """Run a forward and a backward; the input gets a gradient too, as it would from layers below."""
    model(x).float().square().mean().backward()
    x.grad = None
    for parameter in model.parameters():
        parameter.grad = None


def inference(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        model(x)


RUNS = {"training": training_step, "inference": inference}


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


Times = dict[int, tuple[float, float]]  # number of the round to wall and processor seconds


def _timed(model: nn.Module, x: Tensor, kind: str) -> tuple[float, float]:
    _wait(x)
    wall, processor = time.perf_counter(), time.process_time()
    RUNS[kind](model, x)
    _wait(x)
    return time.perf_counter() - wall, time.process_time() - processor


def times_in_turns(
    models: Mapping[str, nn.Module], x: Tensor, kind: str, rounds: int, budget: float
) -> dict[str, Times]:
    """Time all models once in every round; a model that used up its seconds takes part in three rounds only."""
    # Each round has an order of its own, so that no model always runs after the same one.
    names = list(models)
    spent = dict.fromkeys(names, 0.0)
    for name in names:
        first = sum(_timed(models[name], x, kind)[:1])
        spent[name] = first if first > budget / 4 else first + _timed(models[name], x, kind)[0]
    times: dict[str, Times] = {name: {} for name in names}
    for turn in range(rounds):
        for name in random.Random(turn).sample(names, len(names)):
            if spent[name] < budget or len(times[name]) < 3:
                times[name][turn] = _timed(models[name], x, kind)
                spent[name] += times[name][turn][0]
    return times


def summary(times: Times, base: Times) -> dict[str, float]:
    """Summarise one model's times, and by how much they exceed the frozen base's of the same round."""
    result: dict[str, float] = {"rounds": len(times)}
    for clock, name in enumerate(("wall", "processor")):
        own = [pair[clock] for pair in times.values()]
        result[f"{name}_ms"] = 1e3 * statistics.median(own)
        result[f"{name}_least_ms"] = 1e3 * min(own)
        over = [pair[clock] - base[turn][clock] for turn, pair in times.items() if turn in base]
        result[f"{name}_overhead_ms"] = 1e3 * statistics.median(over)
        result[f"{name}_overhead_least_ms"] = 1e3 * (min(own) - min(pair[clock] for pair in base.values()))
    return result


class _Kept:
    """Wraps a saved tensor; autograd drops the wrapper when nothing needs the tensor any more."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_by(compute: Callable[[], Any], *, owned: Iterable[Tensor] = ()) -> tuple[int, int]:
    """Count bytes and storages that a computation keeps for its backward, without those of tensors that are owned."""
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        box = _Kept(tensor)
        kept.add(box)
        return box

    known = {tensor.untyped_storage().data_ptr() for tensor in owned}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        result = compute()
    storages = {box.tensor.untyped_storage().data_ptr(): box.tensor.untyped_storage().nbytes() for box in kept}
    del result
    sizes = [size for pointer, size in storages.items() if pointer not in known]
    return sum(sizes), len(sizes)


def kept_for_backward(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Count bytes and storages that a forward keeps for the backward, without parameters and buffers."""
    return kept_by(lambda: model(x), owned=(*model.parameters(), *model.buffers()))


def multiply_adds(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Count the multiply-adds of the matrix products in a forward and in its backward."""
    with FlopCounterMode(display=False) as counter:
        result = model(x)
        forward = int(counter.get_total_flops()) // 2
        result.float().square().mean().backward()
        both = int(counter.get_total_flops()) // 2
    training_step(model, x)  # clears the gradients
    return forward, both - forward


# fmt: off
VIEWS = frozenset([
    "alias", "as_strided", "contiguous", "detach", "detach_", "empty", "empty_like", "empty_strided", "expand",
    "is_nonzero", "lift_fresh", "permute", "promote_types", "reshape", "resolve_conj", "resolve_neg", "result_type",
    "select", "slice", "split", "squeeze", "t", "to", "transpose", "unbind", "unsqueeze", "view", "view_as",
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view",
])
# fmt: on


def operators(model: nn.Module, x: Tensor) -> int:
    """Count the operators of a training step that compute or copy and call no other operator; views do not count."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        training_step(model, x)
    named = [(event.name.removeprefix("aten::"), event) for event in profiler.events() if "aten::" in event.name]
    working = [event for name, event in named if name not in VIEWS]
    callers = {id(event.cpu_parent) for event in working}
    return sum(1 for event in working if id(event) not in callers)


def peak_memory(model: nn.Module, x: Tensor) -> int | None:
    """Measure the most device memory that a training step takes; None on a CPU."""
    if not x.is_cuda:
        return None
    torch.cuda.reset_peak_memory_stats()
    training_step(model, x)
    return int(torch.cuda.max_memory_allocated())


def counts(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Take all measures that do not depend on time."""
    kept, storages = kept_for_backward(model, x)
    forward, backward = multiply_adds(model, x)
    return {
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "kept_bytes": kept,
        "kept_storages": storages,
        "multiply_adds": forward,
        "multiply_adds_backward": backward,
        "peak_memory": peak_memory(model, x),
    }
