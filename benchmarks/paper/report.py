"""Print the paper's Tables 1 to 3, with the figures of the result files below the paper's own.

    python -m benchmarks.paper.report [--value final]

A cell without a result says "not run". Averages need all of their tasks.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.paper.experiments import TABLES, Column, Experiment, Row, Variant, read_experiment, read_variants
from benchmarks.paper.results import RESULTS, read_results

NOT_RUN = "not run"


def table(experiment: Experiment, results: Sequence[dict[str, Any]], value: str = "best") -> str:
    """Write one of the paper's tables in Markdown; the value is that of the "best" or the "final" evaluation."""
    heads = ["method", "figures of", "# Par.", *(column.title for column in experiment.columns)]
    lines = [heads, ["---"] * len(heads)]
    own = [result for result in results if _belongs(result, experiment)]
    for row in experiment.rows.values():
        figures = (_shown(column, figure) for column, figure in zip(experiment.columns, row.paper, strict=True))
        lines.append([row.title, "the paper", experiment.count(row).figure, *figures])
        for variant in _variants_of(row):
            name = variant.name if variant else None
            found = [result for result in own if (result["row"], result["variant"]) == (row.name, name)]
            source = f"here, {variant.title}" if variant else "here"
            cells = (_cell(experiment, column, found, value) for column in experiment.columns)
            lines.append(["", source, _parameters(found), *cells])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _belongs(result: dict[str, Any], experiment: Experiment) -> bool:
    if result["experiment"] != experiment.name or result["task"] not in experiment.tasks:
        return False
    return bool(result["learning_rate"] == experiment.tasks[result["task"]].training.learning_rate)


def _variants_of(row: Row) -> list[Variant | None]:
    return [*read_variants().values()] if row.method == "tucka" else [None]


def _shown(column: Column, figure: float) -> str:
    return f"{figure:.0f}" if column.measure == "peak_memory" else f"{figure:.2f}"


def _parameters(found: Sequence[dict[str, Any]]) -> str:
    counts = sorted({result["parameters"]["adapter"] for result in found})
    return " or ".join(f"{count:,}" for count in counts) or NOT_RUN


def _cell(experiment: Experiment, column: Column, found: Sequence[dict[str, Any]], value: str) -> str:
    if column.measure == "average":
        parts = [_measured(part, found, value) for part in experiment.columns if part.is_metric]
        return _shown(column, fmean(map(fmean, parts))) if all(parts) else NOT_RUN
    own = _measured(column, found, value)
    seeds = f" ({len(own)} seeds)" if len(own) > 1 else ""
    return f"{_shown(column, fmean(own))}{seeds}" if own else NOT_RUN


def _measured(column: Column, found: Sequence[dict[str, Any]], value: str) -> list[float]:
    """Return a task's metric in per cent, or its memory in the paper's MB, which are 2**20 bytes, for each seed."""
    own = [result for result in found if result["task"] == column.task]
    if column.is_metric:
        return [100 * float(result["metrics"][column.measure][value]) for result in own]
    return [float(result["peak_memory_bytes"]) / 2**20 for result in own]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--value", choices=["best", "final"], default="best", help="of all evaluations, or the last")
    options = parser.parse_args(argv)
    results = read_results(options.results)
    for name in TABLES:
        experiment = read_experiment(name)
        print(f"Table {experiment.table}: {experiment.model.name}\n\n{table(experiment, results, options.value)}\n")


if __name__ == "__main__":
    main()
