"""What is measured of one model: times in turns with others, and counts that are the same in every run."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode


def training_step(model: nn.Module, x: Tensor) -> None:
    """Run a forward and a backward that reaches the input too, as below other layers."""
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


def times_in_turns(models: Mapping[str, nn.Module], x: Tensor, kind: str, rounds: int) -> dict[str, list[list[float]]]:
    """Time all models once in every round, each round starting with another one; wall and processor seconds."""
    names, run = list(models), RUNS[kind]
    for name in names * 2:
        run(models[name], x)
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            _wait(x)
            wall, processor = time.perf_counter(), time.process_time()
            run(models[name], x)
            _wait(x)
            times[name].append([time.perf_counter() - wall, time.process_time() - processor])
    return times


def summary(times: list[list[float]], base: list[list[float]]) -> dict[str, float]:
    """Summarise one model's times, and by how much they exceed the frozen base's of the same round."""
    result = {}
    for clock, name in enumerate(("wall", "processor")):
        own = [pair[clock] for pair in times]
        result[f"{name}_ms"] = 1e3 * statistics.median(own)
        result[f"{name}_least_ms"] = 1e3 * min(own)
        over = [pair[clock] - other[clock] for pair, other in zip(times, base, strict=True)]
        result[f"{name}_overhead_ms"] = 1e3 * statistics.median(over)
        result[f"{name}_overhead_least_ms"] = 1e3 * (min(own) - min(pair[clock] for pair in base))
    return result


class _Kept:
    """Wraps a saved tensor; autograd drops the wrapper when nothing needs the tensor any more."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_for_backward(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Count bytes and storages that a forward keeps, parameters and buffers apart."""
    kept: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        box = _Kept(tensor)
        kept.add(box)
        return box

    owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        result = model(x)
    storages = {box.tensor.untyped_storage().data_ptr(): box.tensor.untyped_storage().nbytes() for box in kept}
    del result
    sizes = [size for pointer, size in storages.items() if pointer not in owned]
    return sum(sizes), len(sizes)


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(x)
    return int(counter.get_total_flops()) // 2


# fmt: off
_VIEWS = frozenset([
    "alias", "as_strided", "contiguous", "detach", "detach_", "empty", "empty_like", "empty_strided", "expand",
    "is_nonzero", "lift_fresh", "permute", "promote_types", "reshape", "resolve_conj", "resolve_neg", "result_type",
    "select", "slice", "split", "squeeze", "t", "to", "transpose", "unbind", "unsqueeze", "view", "view_as",
    "_local_scalar_dense", "_reshape_alias", "_unsafe_view",
])
# fmt: on


def operators(model: nn.Module, x: Tensor) -> int:
    """Count the operators of a training step that compute or copy: those that call no other, views left out."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        training_step(model, x)
    named = [(event.name.removeprefix("aten::"), event) for event in profiler.events() if "aten::" in event.name]
    working = [event for name, event in named if name not in _VIEWS]
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
    return {
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "kept_bytes": kept,
        "kept_storages": storages,
        "multiply_adds": multiply_adds(model, x),
        "operators": operators(model, x),
        "peak_memory": peak_memory(model, x),
    }
