"""Compare methods in a whole decoder: generation, short and long forwards, training steps, prefill, classification.

    python -m benchmarks.decoding                                           # the committed table: about an hour
    python -m benchmarks.decoding --rows lora batch --regimes generate-1 --repeats 5      # a part of it: printed only

The first command writes ``benchmarks/results/decoding-<sizes>-<device>-<dtype>.json`` with its table and figure. It
keeps its times after each round and goes on with them when it is started again on the same commit.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.decoders import SIZES, adapted, base_of
from benchmarks.decoding_report import text, write
from benchmarks.provenance import provenance
from benchmarks.regimes import REGIMES, work
from benchmarks.turns import Turns, Work

RESULTS = Path(__file__).parent / "results"
# What is written on the command line, and the method it stands for.
ROWS = {
    "base": "frozen",
    "lora": "PEFT LoRA",
    "dora": "PEFT DoRA",
    "hra": "PEFT HRA",
    "hra-accelerated": "PEFT HRA, accelerated",
    "lily": "PEFT Lily",
    "batch": "tucka batch",
    "sample": "tucka sample",
    "token": "tucka token",
    "pinned": "tucka pinned",
    "merged": "tucka merged",
}
PACKAGES = ("torch", "peft", "transformers", "tucka", "numpy")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="base and lora always take part")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--repeats", type=int, default=15, help="rounds in which every method takes its turn")
    parser.add_argument("--budget", type=float, default=60, help="seconds after which a method sits rounds out")
    parser.add_argument("--sizes", choices=SIZES, default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, help="where a part of the rows or regimes is written")
    return parser.parse_args(given)


def works(options: argparse.Namespace) -> dict[str, dict[str, Work]]:
    """Make every model, and say what each does in each regime."""
    rows = [row for row in ROWS if row in {*options.rows, "base", "lora"}]
    kinds: dict[str, tuple[nn.Module, dict[str, nn.Module]]] = {}
    found: dict[str, dict[str, Work]] = {}
    for name in options.regimes:
        regime = REGIMES[name]
        if regime.model not in kinds:
            torch.manual_seed(0)
            with torch.device(options.device):
                base = base_of(regime.model, options.sizes, options.layers).requires_grad_(False)
            base = base.to(getattr(torch, options.dtype))
            models = {ROWS[row]: adapted(base, ROWS[row], options.rank).eval() for row in rows}
            kinds[regime.model] = base, models
        base, models = kinds[regime.model]
        # A merged model has nothing to train.
        found[name] = {
            method: work(regime, base, model)
            for method, model in models.items()
            if regime.kind != "train" or method != ROWS["merged"]
        }
    return found


def measure(options: argparse.Namespace, output: Path | None, deadline: float | None = None) -> dict[str, Any]:
    """Measure what is not in the output yet, and return the report."""
    torch.set_num_threads(options.threads)
    chosen = {name: value for name, value in vars(options).items() if name not in {"output", "repeats"}}
    turns = Turns({**provenance(PACKAGES), "options": chosen}, output)
    if turns.repeats < options.repeats:
        turns.measure(works(options), options.repeats, options.budget, base=ROWS["base"], deadline=deadline)
    return turns.report()


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    warnings.simplefilter("ignore")  # a router that was not started says so
    whole = set(options.rows) == set(ROWS) and set(options.regimes) == set(REGIMES)
    name = f"decoding-{options.sizes}-{options.device}-{options.dtype}.json"
    output = options.output or (RESULTS / name if whole else None)
    report = measure(options, output)
    if output is not None:
        write(output)
    print(text(report))


if __name__ == "__main__":
    main()
