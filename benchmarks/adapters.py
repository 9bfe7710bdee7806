"""Compare adapters around the same frozen layers: time in turns, memory kept, multiply-adds, operators.

    python benchmarks/adapters.py --model stack --depth 4 --rounds 20

writes ``benchmarks/results/<model>-<device>-<dtype>.json``; ``python benchmarks/report.py`` makes the table and the
figure from such files, and only from them.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from measures import RUNS, counts, summary, times_in_turns
from methods import METHODS, Encoder, Stack, built

RESULTS = Path(__file__).parent / "results"
MODELS = {"stack": Stack, "encoder": Encoder}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="stack")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def provenance(options: argparse.Namespace) -> dict[str, Any]:
    """Say what made the numbers."""
    packages = ("torch", "peft", "transformers", "tucka", "numpy")
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--", "../tucka"], capture_output=True, check=False).stdout
    name = torch.cuda.get_device_name() if options.device == "cuda" else _processor()
    return {
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "device": name,
        "commit": commit or None,
        "uncommitted_changes": bool(changed),
        "options": {name: value for name, value in vars(options).items() if name != "output"},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({platform.machine()}, {len(names)} cores)"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build every model from the same seed, and measure all of them."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    models = {}
    for method in dict.fromkeys(["frozen", *options.methods]):
        torch.manual_seed(options.seed)
        models[method] = built(method, MODELS[options.model](options.width, options.depth), options.rank, device, dtype)
    generator = torch.Generator().manual_seed(options.seed)
    x = torch.randn(options.samples, options.tokens, options.width, generator=generator)
    x = x.to(device, dtype).requires_grad_()
    result: dict[str, Any] = {method: counts(model, x) for method, model in models.items()}
    for kind in RUNS:
        times = times_in_turns(models, x, kind, options.rounds)
        for method in models:
            result[method][kind] = summary(times[method], times["frozen"])
    return result


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    output = options.output or RESULTS / f"{options.model}-{options.device}-{options.dtype}.json"
    report = {**provenance(options), "methods": measure(options)}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(output)


if __name__ == "__main__":
    main()
