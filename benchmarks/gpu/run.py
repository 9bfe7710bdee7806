"""Measure on a GPU all that is worth committing, in less than eight minutes: ``make bench-gpu``.

It writes ``gpu.json``, its tables ``gpu.md`` and finished quality runs to a folder, by default
``benchmarks/results/gpu``. Each section runs in a process of its own and has its seconds; what does not end in time, or
cannot run here, is marked so. ``--device cpu --tiny`` runs the same code at tiny sizes, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.report import text
from benchmarks.gpu.sections import ROOT, SECTIONS, one
from benchmarks.provenance import provenance
from benchmarks.turns import write_report

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
LIMIT, LEAST = 460.0, 10.0  # seconds for all sections, and for one
PACKAGES = ("torch", "peft", "transformers", "tucka", "numpy")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=LIMIT, help="for all sections together")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=SECTIONS, help=argparse.SUPPRESS)  # the process of one section
    return parser.parse_args(given)


def _apart(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a section in its own process, so that none can break or block the others."""
    if seconds < LEAST:
        return {"not run": "no time was left"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.run", "--only", name, "--device", options.device]
    command += ["--seconds", str(seconds), "--folder", str(options.folder.resolve())]
    command += ["--tiny"] if options.tiny else []
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds + 10)
    except subprocess.TimeoutExpired:
        return {"not run": f"took longer than {seconds:.0f} seconds"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return found


def main(given: list[str] | None = None) -> None:
    options = arguments(given)
    if options.only:
        warnings.simplefilter("ignore")
        print(json.dumps(one(options.only, options)))
        return
    ends, results = time.monotonic() + options.seconds, {}
    for name in options.sections:
        seconds = min(SECTIONS[name][1], ends - time.monotonic() - 10)
        absent = options.device == "cuda" and not torch.cuda.is_available()
        results[name] = one(name, options) if absent else _apart(name, options, seconds)
        outcome = next(
            (f"{key}: {results[name][key]}" for key in ("not run", "failed") if key in results[name]), "done"
        )
        print(f"{ends - time.monotonic():4.0f} s left; {name}: {outcome}", flush=True)
        report = {
            "about": {**provenance(PACKAGES), "options": {"device": options.device, "tiny": options.tiny}},
            "sections": results,
        }
        write_report(options.folder / "gpu.json", report)  # after each section: nothing is lost
        (options.folder / "gpu.md").write_text(text(report), "utf-8")


if __name__ == "__main__":
    main()
