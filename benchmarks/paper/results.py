"""Result files: one for each finished run, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from benchmarks.paper.training import Run
from benchmarks.provenance import provenance

RESULTS = Path(__file__).parents[1] / "results" / "paper"
PACKAGES = ("accelerate", "datasets", "numpy", "peft", "scikit-learn", "torch", "transformers", "tucka")


def path_of(run: Run, folder: Path = RESULTS) -> Path:
    """Say where a run's result is kept."""
    return folder / run.experiment.name / f"{run.name}.json"


def record(run: Run, outcome: dict[str, Any], *, smoke: bool) -> dict[str, Any]:
    """Join the outcome of a run with its settings and the versions that it ran on."""
    return {
        "experiment": run.experiment.name,
        "task": run.task.name,
        "row": run.row.name,
        "variant": run.variant.name if run.variant else None,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "smoke": smoke,
        **provenance(PACKAGES),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        **outcome,
    }


def write(result: dict[str, Any], path: Path) -> None:
    """Write a result beside its place and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    part.replace(path)


def read_results(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Read all results of a folder but those of stand-ins, which say nothing about the paper."""
    found = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*/*/*.json"))]
    return [result for result in found if not result["smoke"]]
