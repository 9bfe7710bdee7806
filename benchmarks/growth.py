"""Measure how overhead grows with layers, groups, rank, tokens and samples: ``python -m benchmarks.growth``.

It writes ``benchmarks/results/growth-<device>.json``, its tables and its figure, in which the measured times stand
beside the formula's. It takes about a quarter of an hour, keeps its times after each round, and goes on with them when
it is started again on the same commit.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from benchmarks.adapted_models import Stack, frozen
from benchmarks.growth_report import AXES, BASE, KINDS, PEER, text, write
from benchmarks.provenance import provenance
from benchmarks.turns import Turns, Work
from tucka.peft import TuckAConfig

RESULTS = Path(__file__).parent / "results"
METHODS = (BASE, PEER, "tucka batch", "tucka sample", "tucka token")


@dataclass(frozen=True)
class Point:
    """Square linear layers, one after the other, an adapter's sizes, and an input; an axis changes one of them."""

    layers: int = 12
    groups: int = 4
    rank: int = 8
    samples: int = 4
    tokens: int = 32  # of one sample


def points(options: argparse.Namespace) -> Iterator[tuple[str, Point]]:
    """Go through all axes, and name each point."""
    for axis in options.axes:
        start = Point(samples=1) if axis == "tokens" else Point()
        for value in AXES[axis]:
            if value <= options.largest:
                yield f"{axis}={value}", replace(start, **{axis: value})


def built(method: str, base: nn.Module, point: Point) -> nn.Module:
    """Adapt all layers by a method."""
    names = [name for name, _ in base.named_children()]
    if method == BASE:
        return frozen(base, names, point.rank)
    config: peft.PeftConfig = peft.LoraConfig(r=point.rank, target_modules=names)
    if method != PEER:
        routing = method.removeprefix("tucka ")
        config = TuckAConfig(r=point.rank, k=point.groups, routing=routing, target_modules=names)  # type: ignore[arg-type]
    return peft.get_peft_model(base, config)


def work(model: nn.Module, x: Tensor, kind: str) -> Work:
    """Say what a model does in a turn; the input gets a gradient too, as it would from layers below."""

    def infer() -> None:
        with torch.inference_mode():
            model(x)

    def train() -> None:
        model(x).float().square().mean().backward()

    def clear() -> None:
        for tensor in (x, *model.parameters()):
            tensor.grad = None

    calls = 1 if x.shape[0] * x.shape[1] > 1000 else 3
    return Work(train if kind == "training step" else infer, clear, calls)


def works(options: argparse.Namespace) -> dict[str, dict[str, Work]]:
    """Make the models of all points, and say what each does."""
    found: dict[str, dict[str, Work]] = {}
    for name, point in points(options):
        x = torch.randn(point.samples, point.tokens, options.width, device=options.device).requires_grad_()
        for method in METHODS:
            torch.manual_seed(0)
            model = built(method, Stack(options.width, point.layers), point).to(options.device)
            for kind in KINDS:
                found.setdefault(f"{name}, {kind}", {})[method] = work(model, x, kind)
    return found


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--largest", type=int, default=4096, help="leaves out larger values of all axes")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=15, help="rounds in which every method takes its turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="where a part of the axes is written; else it is only printed")
    options = parser.parse_args(given)
    warnings.simplefilter("ignore")  # a router that was not started says so
    torch.set_num_threads(options.threads)
    whole = options.axes == list(AXES) and options.largest == parser.get_default("largest")
    output = options.output or (RESULTS / f"growth-{options.device}.json" if whole else None)
    chosen = {name: value for name, value in vars(options).items() if name not in {"output", "repeats"}}
    about: dict[str, Any] = {**provenance(("torch", "peft", "transformers", "tucka")), "options": chosen}
    turns = Turns(about, output)
    if turns.repeats < options.repeats:
        turns.measure(works(options), options.repeats, budget=120, base=BASE)
    report = turns.report(points={name: asdict(point) for name, point in points(options)})
    if output is not None:
        write(output)
    print(text(report))


if __name__ == "__main__":
    main()
