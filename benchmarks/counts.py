"""Count what a method adds to a decoder, in numbers that every run gives again: ``python -m benchmarks.counts``.

Operators and Python calls of an adapted call, bytes kept for the backward, host reads, graph breaks. It takes a minute,
and writes ``benchmarks/results/counts.json`` and its table. A test counts again, and fails if a number of tucka rises.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.decoders import LINEARS, adapted, base_of
from benchmarks.measures import VIEWS, kept_by
from benchmarks.provenance import provenance, short
from benchmarks.regimes import REGIMES, inputs_of, work
from benchmarks.turns import write_report

RESULT = Path(__file__).parent / "results" / "counts.json"
METHODS = (
    "PEFT LoRA",
    "PEFT DoRA",
    "PEFT HRA",
    "PEFT HRA, accelerated",
    "PEFT Lily",
    "tucka batch",
    "tucka sample",
    "tucka token",
    "tucka pinned",
)
BASE, RANK = "frozen", 8
# What is counted in each kind of step: per adapted call, and once in a step.
STEPS = {"decode": "a decoded token", "forward": "a forward", "train": "a training step"}


class _Operators(TorchDispatchMode):
    """Counts the operators that reach a device, views not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.count += operator.overloadpacket.__name__ not in VIEWS
        return operator(*args, **(kwargs or {}))


def operators(run: Callable[[], None]) -> int:
    """Count the operators that compute or copy."""
    with _Operators() as counter:
        run()
    return counter.count


class _Reads(TorchDispatchMode):
    """Counts the operators that hand numbers of a tensor to Python, or copy it from a device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        given = next((value for value in args if isinstance(value, torch.Tensor)), None)
        reads = operator.overloadpacket.__name__ == "_local_scalar_dense"
        on_host = isinstance(result, torch.Tensor) and result.device.type == "cpu"
        self.count += reads or (on_host and given is not None and given.device.type not in ("cpu", "meta"))
        return result


def host_reads(run: Callable[[], None]) -> int:
    """Count how often a run waits for a number of a tensor."""
    with _Reads() as counter:
        run()
    return counter.count


def calls(run: Callable[[], None]) -> int:
    """Count the Python functions that are entered."""
    count = 0

    def entered(_frame: FrameType, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call"

    known = sys.getprofile()
    gc.disable()
    sys.setprofile(entered)
    try:
        run()
    finally:
        sys.setprofile(known)
        gc.enable()
    return count


def _runs(step: str, base: nn.Module, model: nn.Module) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return two runs whose difference is one step of a kind."""
    if step == "decode":
        longer, shorter = (work(replace(REGIMES["generate-1"], new=new), base, model).run for new in (3, 2))
        return longer, shorter
    inputs = inputs_of(REGIMES[f"{step}-1x32"], base)

    def run() -> None:
        # Without gradients and not in inference mode, where torch shows an operator in place of those it is made of.
        with torch.set_grad_enabled(step == "train"):
            output = model(**inputs)
        if step == "train":
            output.loss.backward()

    return run, lambda: None


WHAT = {"operators": operators, "calls": calls, "host reads": host_reads}


@lru_cache
def _steps(method: str, layers: int) -> dict[str, list[int]]:
    """Count what a step of each kind takes, in a decoder of some layers."""
    base = base_of("decoder", "tiny", layers).requires_grad_(False)
    model = adapted(base, method, RANK)
    found = {}
    for step in STEPS:
        model.train(step == "train")
        longer, shorter = _runs(step, base, model)
        longer()  # what is done once in a model's life
        found[step] = [count(longer) - count(shorter) for count in WHAT.values()]
    return found


@lru_cache
def _kept(method: str, layers: int) -> int:
    """Count the bytes kept for the backward of a forward of 32 tokens."""
    base = base_of("decoder", "smollm2-135m", layers).requires_grad_(False)
    model = adapted(base, method, RANK).train()
    inputs = inputs_of(REGIMES["train-1x32"], base)
    owned = (*model.parameters(), *model.buffers(), *inputs.values())
    model(**inputs).loss.backward()
    return kept_by(lambda: model(**inputs).loss, owned=[value for value in owned if isinstance(value, torch.Tensor)])[0]


def graph_breaks(method: str) -> int:
    """Count the graph breaks of a forward of one layer."""
    base = base_of("decoder", "tiny", 1).requires_grad_(False)
    model = adapted(base, method, RANK).eval()
    inputs = inputs_of(REGIMES["forward-1x32"], base)
    torch._dynamo.reset()
    with torch.no_grad():
        model(**inputs)
        count = torch._dynamo.explain(model)(**inputs).graph_break_count
    torch._dynamo.reset()
    return count


def _apart(one: int, two: int) -> tuple[int, int]:
    """Tell what each layer adds from what a step has once."""
    return two - one, 2 * one - two


def counted(method: str) -> dict[str, float]:
    """Count what a method adds to the base: in each adapted call, and once in a step."""
    found: dict[str, float] = {}
    steps = {name: [_steps(name, layers) for layers in (1, 2)] for name in (method, BASE)}
    for step in STEPS:
        for place, what in enumerate(WHAT):
            sides = [_apart(*(layers[step][place] for layers in steps[name])) for name in (method, BASE)]
            layer, once = (own - base for own, base in zip(*sides, strict=True))
            found[f"{step}, {what}"] = layer / len(LINEARS)
            found[f"{step}, {what}, once"] = once
    sides = [_apart(*(_kept(name, layers) for layers in (1, 2))) for name in (method, BASE)]
    layer, once = (own - base for own, base in zip(*sides, strict=True))
    return {**found, "kept": layer / len(LINEARS), "kept, once": once}


def table(report: dict[str, Any]) -> str:
    """Write all counts, one line for each."""
    counts = report["counts"]
    rows = [
        (f"{what} in {title}, {place}", [found[f"{step}, {what}{key}"] for found in counts.values()])
        for step, title in STEPS.items()
        for what in ("operators", "calls")
        for place, key in (("each adapted call", ""), ("once", ", once"))
    ]
    rows += [
        ("host reads in all of these", [_reads(found) for found in counts.values()]),
        ("KiB kept for the backward, each adapted call", [found["kept"] / 1024 for found in counts.values()]),
        ("KiB kept, once", [found["kept, once"] / 1024 for found in counts.values()]),
        ("graph breaks", [found["graph breaks"] for found in counts.values()]),
    ]
    lines = ["| beyond the base | " + " | ".join(counts) + " |", "|---" + "|---:" * len(counts) + "|"]
    for title, values in rows:
        cells = [f"{value:.1f}".removesuffix(".0") for value in values]
        lines.append(f"| {title.replace('calls in', 'Python calls in')} | {' | '.join(cells)} |")
    versions = ", ".join(f"{name} {version}" for name, version in report["about"]["versions"].items())
    sizes = "SmolLM2-135M's widths, 32 tokens, r = 8, k = 4, float32"
    commit = short(report["about"]["commit"])
    lines += ["", f"Operators that only view do not count. Kept: {sizes}. {versions}; {commit}."]
    return "\n".join(lines) + "\n"


def _reads(found: dict[str, float]) -> float:
    return sum(found[f"{step}, host reads"] + abs(found[f"{step}, host reads, once"]) for step in STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # a router that was not started says so
    torch.set_num_threads(1)
    breaks = graph_breaks(BASE)
    counts = {name: {**counted(name), "graph breaks": graph_breaks(name) - breaks} for name in options.methods}
    report = {"about": provenance(("torch", "peft", "transformers", "tucka")), "counts": counts}
    if tuple(options.methods) == METHODS:
        write_report(RESULT, report)
        RESULT.with_suffix(".md").write_text(table(json.loads(RESULT.read_text("utf-8"))), "utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
