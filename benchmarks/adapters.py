"""Compare adapters around the same frozen layers: time in turns, memory kept, multiply-adds, operators.

    python -m benchmarks.adapters --model stack --threads 1
    python -m benchmarks.adapters --model encoder --threads 1

writes ``benchmarks/results/<model>-<device>-<dtype>.json``; ``python -m benchmarks.report`` makes the table and the
figure from such files, and only from them.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks.adapted_models import METHODS, Encoder, Stack, built, formula_of, widths_of
from benchmarks.measures import RUNS, counts, operators, summary, times_in_turns, training_step
from benchmarks.provenance import provenance

RESULTS = Path(__file__).parent / "results"
MODELS = {"stack": Stack, "encoder": Encoder}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="stack")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, help="layers of the stack (2) or blocks of the encoder (1)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget", type=float, default=10, help="seconds for the steps of one method, of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.depth = options.depth or {"stack": 2, "encoder": 1}[options.model]
    return options


def operators_of(method: str, options: argparse.Namespace) -> dict[str, int]:
    """Count the operators of a training step: those of each block, and the others. They do not depend on sizes."""
    x = torch.randn(2, 8, 64, requires_grad=True)
    found = []
    for depth in (1, 2):
        torch.manual_seed(options.seed)
        model = built(method, MODELS[options.model](64, depth), 8, torch.device("cpu"), torch.float32)
        training_step(model, x)
        found.append(operators(model, x))
    block = found[1] - found[0]
    return {"operators_per_block": block, "operators_once": found[0] - block}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build every model from the same seed, and measure all of them."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    base = MODELS[options.model](options.width, options.depth)
    sizes = {"tokens": options.samples * options.tokens, "samples": options.samples}
    generator = torch.Generator().manual_seed(options.seed)
    x = torch.randn(options.samples, options.tokens, options.width, generator=generator)
    x = x.to(device, dtype).requires_grad_()
    models, result = {}, {}
    for method in dict.fromkeys(["frozen", *options.methods]):
        torch.manual_seed(options.seed)
        models[method] = built(method, MODELS[options.model](options.width, options.depth), options.rank, device, dtype)
        result[method] = {
            **counts(models[method], x),
            **operators_of(method, options),
            "formula": formula_of(method, base, options.rank, **sizes),
        }
    for kind in RUNS:
        times = times_in_turns(models, x, kind, options.rounds, options.budget)
        for method in models:
            result[method][kind] = summary(times[method], times["frozen"])
    return result


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    output = options.output or RESULTS / f"{options.model}-{options.device}-{options.dtype}.json"
    layers = len(widths_of(MODELS[options.model](64, options.depth)))
    about = {
        **provenance(("torch", "peft", "transformers", "tucka", "numpy")),
        "options": {name: value for name, value in vars(options).items() if name != "output"},
    }
    if output.exists() and json.loads(output.read_text()).items() >= about.items():
        print(f"{output}: measured on this commit already")
        return
    load = os.getloadavg()[0]  # the mean of the last minute
    report = {**about, "load_average": load, "adapted_layers": layers, "methods": measure(options)}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(output)


if __name__ == "__main__":
    main()
