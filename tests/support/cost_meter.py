"""Measure on real torch code what `tucka.count_...` computes: multiply-adds, and numbers kept for the backward."""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Measured:
    """What one forward and its backward took. Multiply-adds are those of matrix products."""

    forward: int
    backward: int
    kept_bytes: int


class _Saved:
    """Wraps a saved tensor. Autograd drops the wrapper as soon as no result needs the tensor any more."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def measure(compute: Callable[[], torch.Tensor], *, owned: Iterable[torch.Tensor] = ()) -> Measured:
    """Run `compute` and the backward of its sum; tensors in `owned` (parameters, buffers) do not count as kept."""
    boxes: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Saved:
        box = _Saved(tensor)
        boxes.add(box)
        return box

    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor), forward:
        result = compute()
    not_kept = {tensor.untyped_storage().data_ptr() for tensor in owned}
    storages = {box.tensor.untyped_storage().data_ptr(): box.tensor.untyped_storage().nbytes() for box in boxes}
    kept = sum(size for pointer, size in storages.items() if pointer not in not_kept)
    with backward:
        result.sum().backward()
    # The counter reports two operations for each multiply-add.
    return Measured(forward.get_total_flops() // 2, backward.get_total_flops() // 2, kept)
