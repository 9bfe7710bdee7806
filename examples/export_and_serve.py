"""Train groups of experts for several tasks, export each group as a LoRA adapter, and serve them with PEFT alone.

Run it: python examples/export_and_serve.py
It takes seconds on a CPU, because the model is tiny and its data is made up. Replace `load_model` and `load_task`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tucka.peft import TuckAConfig, export_lora, given_route, pin_route

WIDTH = 16
# The seed of what each task is: a turn of the inputs that its group has to undo.
TASKS = {"first": 0, "second": 1}


def load_model() -> nn.Module:
    """Make the base model, the same one each time; yours is loaded from its folder."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, 4))


def load_task(name: str, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Make inputs, and outputs of a base model whose inputs are turned, differently in each task."""
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(TASKS[name])))[0]
    x = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return x, load_model()(x @ turn)


def train(model: nn.Module, steps: int) -> tuple[float, float]:
    """Train all groups, on batches that mix the tasks; return the first and the last loss."""
    data = [load_task(name, 256, seed=1) for name in TASKS]
    x, target = (torch.cat(parts) for parts in zip(*data, strict=True))
    groups = [name for name in TASKS for _ in range(256)]  # one for each sample
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        with given_route(model, groups=groups):
            loss = nn.functional.mse_loss(model(x), target)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


@torch.no_grad()
def export(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Write a LoRA adapter for each group; return what each task's test inputs give with its group."""
    wanted = {}
    for name in TASKS:
        pin_route(model, group=name)
        export_lora(model, folder / name)
        wanted[name] = model(load_task(name, 8, seed=2)[0])
    return wanted


@torch.no_grad()
def serve(folder: Path) -> dict[str, Tensor]:
    """Answer one batch of all tasks with plain PEFT; tucka need not be installed where this runs."""
    first, *others = TASKS
    served = PeftModel.from_pretrained(load_model(), folder / first, adapter_name=first)
    for name in others:
        served.load_adapter(folder / name, adapter_name=name)
    served.eval()
    batch = torch.cat([load_task(name, 8, seed=2)[0] for name in TASKS])
    outputs = served(batch, adapter_names=[name for name in TASKS for _ in range(8)])
    return dict(zip(TASKS, outputs.split(8), strict=True))


def main(steps: int = 150) -> tuple[tuple[float, float], dict[str, float]]:
    """Train, export and serve; return the losses, and how far the served outputs are from the trained ones."""
    config = TuckAConfig(r=16, k=len(TASKS), routing="given", group_names=list(TASKS), target_modules=["0", "2"])
    model = get_peft_model(load_model(), config)
    model.print_trainable_parameters()
    first, last = train(model, steps)
    print(f"loss {first:.3f} -> {last:.3f}")
    model.eval()
    with tempfile.TemporaryDirectory() as folder:
        wanted = export(model, Path(folder))
        got = serve(Path(folder))
    apart = {name: (got[name] - wanted[name]).abs().max().item() for name in TASKS}
    print("served outputs differ by", ", ".join(f"{value:.0e} ({name})" for name, value in apart.items()))

    # Or, where one task is served: merge its group into the weights, and keep a plain model.
    pin_route(model, group="first")
    x, target = load_task("first", 64, seed=2)
    merged = model.merge_and_unload()
    with torch.no_grad():
        print(f"merged, {type(merged).__name__}: loss {nn.functional.mse_loss(merged(x), target):.3f} on new inputs")
    return (first, last), apart


if __name__ == "__main__":
    main()
