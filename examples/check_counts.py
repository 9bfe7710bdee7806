"""Count what an adapter costs before it is built, then build it and check each count against what torch does.

Run it: python examples/check_counts.py
It takes seconds on a CPU. Replace `Network` and `LAYERS`.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tucka import compare_methods, count_activation_bytes, count_flops, count_parameters
from tucka.peft import TuckAConfig

# The widths of the adapted layers, in the order of the names below.
LAYERS, NAMES = [(64, 256), (256, 64)], ["up", "down"]
Counts = dict[str, tuple[int, int]]


class Network(nn.Module):
    """Your model; here a frozen block of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def multiply_adds(model: nn.Module, x: Tensor) -> int:
    """Count those of one forward; torch counts two operations for each."""
    with FlopCounterMode(display=False) as counter:
        model(x)
    return counter.get_total_flops() // 2


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Sum the bytes that a forward keeps for its backward, without the model's own tensors."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # by storage, so that a tensor that is kept twice counts once

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _output = model(x)
        return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)


def check(r: int, k: int, t: int, p: int, *, samples: int, tokens: int) -> Counts:
    """Return what is counted beside what is measured: parameters, multiply-adds and kept bytes."""
    sizes: dict[str, Any] = {"r": r, "k": k, "t": t, "p": p}
    base = Network().requires_grad_(False)
    x = torch.randn(samples, tokens, 64)
    frozen = multiply_adds(base, x), kept_bytes(base, x)
    model = get_peft_model(base, TuckAConfig(**sizes, routing="sample", target_modules=NAMES))
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    # The adapter's default has a rotation that all experts share.
    calls: dict[str, Any] = {"tokens": samples * tokens, "samples": samples, "routing": "sample", "rotation": True}
    return {
        "parameters": (count_parameters("tucka", LAYERS, **sizes), trained),
        "multiply-adds": (count_flops("tucka", LAYERS, **calls, **sizes), multiply_adds(model, x) - frozen[0]),
        "kept bytes": (count_activation_bytes("tucka", LAYERS, **calls, **sizes), kept_bytes(model, x) - frozen[1]),
    }


def main() -> list[Counts]:
    """Check several sizes, print the terms of the formula, and compare with LoRA; return the counts."""
    torch.manual_seed(0)
    found = []
    for r, k, t, p in ((8, 2, 2, 2), (4, 3, 5, 2), (16, 4, 2, 1)):
        counts = check(r, k, t, p, samples=4, tokens=32)
        print(f"r={r} k={k} t={t} p={p}")
        for name, (counted, measured) in counts.items():
            print(f"  {name:14} counted {counted:9,}  measured {measured:9,}")
        found.append(counts)

    # Each term of t·p + k·p·r² + d·r: raise one size by one, and see what it adds to a layer.
    sizes: dict[str, Any] = {"r": 8, "k": 2, "t": 2, "p": 2}
    one = count_parameters("tucka", [(64, 64)], **sizes, pinned=True)
    for name, size in sizes.items():
        more = count_parameters("tucka", [(64, 64)], **{**sizes, name: size + 1}, pinned=True)
        print(f"one more {name}: {more - one} parameters")
    for row in compare_methods(LAYERS, {"lora": {"r": 8}, "hra": {"r": 8}, "tucka": sizes}, tokens=128, samples=4):
        print(f"{row.method:6} {row.parameters:6,} parameters, {row.forward:11,} multiply-adds")
    return found


if __name__ == "__main__":
    main()
