"""Make a model that PEFT's HRA has adapted compute faster, train it, and give PEFT its own layers back.

Run it: python examples/faster_hra.py
It takes seconds on a CPU, because the model is small and its data is made up. Replace `load_model` and `load_data`.
"""

from __future__ import annotations

import time

import torch
from peft import HRAConfig, get_peft_model
from torch import Tensor, nn

from tucka.peft import accelerate_hra, restore_hra


def load_model(width: int) -> nn.Module:
    """Make the base model; yours is any model that PEFT's HRA adapts."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


def load_data(width: int, *, count: int = 128) -> tuple[Tensor, Tensor]:
    """Make inputs, and outputs of a model whose inputs are turned."""
    x = torch.randn(count, width)
    turn = torch.linalg.qr(torch.randn(width, width))[0]
    with torch.no_grad():
        return x, load_model(width)(x @ turn)


def milliseconds(model: nn.Module, x: Tensor, target: Tensor, *, rounds: int) -> float:
    """Return the time of a training step: the least of several rounds."""
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        nn.functional.mse_loss(model(x), target).backward()
        times.append(time.perf_counter() - start)
        model.zero_grad()
    return 1000 * min(times[1:])


def train(model: nn.Module, x: Tensor, target: Tensor, *, steps: int) -> tuple[float, float]:
    """Train the adapter; return the first and the last loss."""
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference of two outputs, as a share of the largest output."""
    return ((one - other).abs().max() / one.abs().max()).item()


def main(width: int = 512, steps: int = 30, rounds: int = 5) -> tuple[tuple[float, float], tuple[float, float]]:
    """Accelerate, train and restore; return the times, and how far the outputs were apart each time."""
    torch.manual_seed(0)
    x, target = load_data(width)
    model = get_peft_model(load_model(width), HRAConfig(r=8, target_modules=["0", "2"]))
    model.print_trainable_parameters()
    before, slow = model(x), milliseconds(model, x, target, rounds=rounds)

    layers = accelerate_hra(model)
    apart, fast = largest_difference(before, model(x)), milliseconds(model, x, target, rounds=rounds)
    print(f"{layers} layers: a training step of {slow:.1f} ms takes {fast:.1f} ms; outputs differ by {apart:.0e}")

    first, last = train(model, x, target, steps=steps)
    print(f"loss {first:.3f} -> {last:.3f}")

    # The model is a PEFT HRA model all the time: it saves and merges as before. PEFT's own layers give the same.
    trained = model(x)
    restore_hra(model)
    apart_after = largest_difference(trained, model(x))
    print(f"PEFT's own layers give the same, up to {apart_after:.0e}")
    return (slow, fast), (apart, apart_after)


if __name__ == "__main__":
    main()
