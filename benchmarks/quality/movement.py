"""How far adapters move the outputs of their layers in training, and which of their parts grow.

    python -m benchmarks.quality.movement --rates 1e-3 4e-3

Trains on the reviews with one seed and looks every few steps: at the movement of each adapted layer's output relative
to what the frozen layer makes of the same input, on texts of the validation part, and at the lengths of the parts of
TuckA. Writes ``movement.json`` and ``movement.md`` beside the results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState

from benchmarks.provenance import provenance
from benchmarks.quality.experiments import read_all
from benchmarks.quality.problem import Problem
from benchmarks.quality.report import short
from benchmarks.quality.run import PACKAGES, RESULTS
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.training import adapt, predict, train
from tucka.backends.torch.modules import ExpertParts

TASK, METHODS = "reviews", ("lora_r8", "tucka", "tucka_r8_columns")
_PROBED, _LOOKS = 64, 6  # validation texts, and how many times a training is looked at


@torch.no_grad()
def movement(model: nn.Module, problem: Problem) -> list[float]:
    """Measure each adapted layer's output relative to what its frozen layer makes of the same input, sorted."""
    found: dict[str, list[float]] = {}

    def watch(name: str) -> Any:
        def look(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            frozen = layer.base_layer(inputs[0])
            found.setdefault(name, []).append(float((output - frozen).norm() / frozen.norm()))

        return look

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    handles = [
        layer.register_forward_hook(watch(name))
        for name, layer in layers
        if isinstance(layer, nn.Module) and hasattr(layer, "base_layer")
    ]
    was_training = model.training
    items = [item for part in problem.validation.values() for item in part][:_PROBED]
    predict(model.eval(), items, problem)
    model.train(was_training)
    for handle in handles:
        handle.remove()
    return sorted(map(fmean, found.values()))


@torch.no_grad()
def lengths(model: nn.Module) -> dict[str, float]:
    """Return the longest of TuckA's parts in any layer: columns that read and write at first, and cores."""
    found: dict[str, list[float]] = {"reading columns": [], "writing columns": [], "cores": []}
    for parts in model.modules():
        if isinstance(parts, ExpertParts):
            read = parts.spec.rank - parts.spec.rank // 2
            columns = parts.basis.norm(dim=0)
            found["reading columns"].append(float(columns[:read].max()))
            found["writing columns"].append(float(columns[read:].max()))
            found["cores"].append(float(parts.cores.abs().max()))
    return {name: max(values) for name, values in found.items() if values}


class _Look(TrainerCallback):
    """Measures a model a few times while it is trained."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.seen: list[dict[str, Any]] = []

    def on_step_end(self, _args: object, state: TrainerState, _control: object, **kwargs: Any) -> None:
        if state.global_step % max(1, state.max_steps // _LOOKS) and state.global_step != state.max_steps:
            return
        moved = movement(kwargs["model"], self._problem)
        self.seen.append(
            {"step": state.global_step, "median": median(moved), "worst": moved[-1], **lengths(kwargs["model"])}
        )


def measure(name: str, rate: float, problem: Problem, sizes: Any, head_rate: float) -> dict[str, Any]:
    """Train one method with one learning rate and say what was seen."""
    (experiment,) = read_all([name])
    model, look = adapt(problem.model(0), experiment, problem, 0), _Look(problem)
    train(model, experiment, problem, sizes, learning_rate=rate, head_rate=head_rate, seed=0, callbacks=[look])
    return {"method": experiment.label, "learning_rate": rate, "seen": look.seen}


def page(report: dict[str, Any]) -> str:
    """Write the table: what was seen at some steps of each training."""
    steps = sorted({seen["step"] for run in report["runs"] for seen in run["seen"]})
    head = ["method", "rate", *(f"step {step}" for step in steps), "reading", "writing", "cores"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for run in report["runs"]:
        moved = [f"{seen['median']:.3f} / {seen['worst']:.2f}" for seen in run["seen"]]
        last = run["seen"][-1]
        parts = [
            f"{last[part]:.2f}" if part in last else "" for part in ("reading columns", "writing columns", "cores")
        ]
        lines.append(f"| {' | '.join([run['method'], format(run['learning_rate'], 'g'), *moved, *parts])} |")
    said = (
        "Movement of the outputs of adapted layers, relative to the frozen layer's: median / largest over the layers, "
        f"on {_PROBED} validation texts. Lengths are the longest in any layer after the last step, of the trained "
        f"numbers. {report['device']}, one seed; commit {short(report['commit'])}."
    )
    return "\n\n".join(["# Movement", "\n".join(lines), said]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 4e-3])
    parser.add_argument("--output", type=Path, default=RESULTS / "movement.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[TASK]()
    problem = task.load(task.quick)
    runs = [measure(name, rate, problem, task.quick, task.head_rate) for rate in chosen.rates for name in METHODS]
    report = {**provenance(PACKAGES), "runs": runs}
    chosen.output.write_text(json.dumps(report, indent=1) + "\n")
    chosen.output.with_suffix(".md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main()
