"""Make the tables and figures of the studies, from their results only.

    python -m benchmarks.quality.run --folder benchmarks/quality/studies/ablation --tasks glosses sounds --seeds 0
    python -m benchmarks.quality.run --folder benchmarks/quality/studies/ranks --tasks sounds --seeds 0
    python -m benchmarks.quality.run --folder benchmarks/quality/studies/curves --tasks glosses --seeds 0
    python -m benchmarks.quality.studies_report

Writes beside the results: ``ablation.md``, and ``ranks-TASK`` and ``curves-TASK`` as ``.md`` and ``.svg``. The last two
redraw the paper's Figures 5 (b) and 6 on the tasks that run here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.drawing import legend_below, panels, save
from benchmarks.quality.experiments import read_all
from benchmarks.quality.report import Row, caption, rows, signed
from benchmarks.quality.run import RESULTS, read_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STUDIES = Path(__file__).parent / "studies"
DEFAULTS = "defaults"


def by_task(records: Sequence[dict[str, Any]], study: str, folder: Path = STUDIES) -> dict[str, list[Row]]:
    """Gather a study's finished experiments by task, of the quick size."""
    experiments = read_all(None, folder / study)
    found = {}
    for task in sorted({record["task"] for record in records}):
        own = [record for record in records if (record["task"], record["scale"]) == (task, "quick")]
        if made := rows(own, experiments)[0]:
            found[task] = made
    return found


def ablation(tasks: dict[str, list[Row]]) -> str:
    """Write how each change of a default changes the test accuracy, the best change first."""
    places = {task: {row.experiment.name: row for row in made} for task, made in tasks.items()}
    rows_of: dict[str, list[Row]] = {}
    changes: dict[str, list[float]] = {}
    for found in places.values():
        for name, row in found.items():
            rows_of.setdefault(name, []).append(row)
            changes.setdefault(name, []).append(row.against(found[DEFAULTS])[0])
    head = ["change", "parameters", *places]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name in sorted(changes, key=lambda name: (-fmean(changes[name]), name)):
        cells = [_cell(found[name], found[DEFAULTS]) if name in found else "" for found in places.values()]
        row = rows_of[name][0]
        lines.append(f"| {row.experiment.label} | {row.parameters:,} | {' | '.join(cells)} |")
    said = "Test accuracy (difference to the defaults' in points, paired by seed)."
    return "\n\n".join(["\n".join(lines), said, *(f"{task}: {caption(made)}" for task, made in tasks.items())])


def _has_defaults(made: Sequence[Row]) -> bool:
    return any(row.experiment.name == DEFAULTS for row in made)


def _cell(row: Row, defaults: Row) -> str:
    return f"{row.mean:.2%}" + (f" ({signed(*row.against(defaults))})" if row is not defaults else "")


def ranks(made: Sequence[Row]) -> tuple[str, Figure]:
    """Write and draw accuracy by rank and number of groups: Figure 5 (b) of the paper."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    cells: dict[tuple[int, int], Row] = {}
    for row in made:
        config = row.experiment.config
        cells[config["r"], config["k"]] = row
    widths, groups = (sorted({place[axis] for place in cells}) for axis in (0, 1))
    lines = ["| | " + " | ".join(f"k = {k}" for k in groups) + " |", "|---" + "|---:" * len(groups) + "|"]
    for r in widths:
        texts = [f"{cells[r, k].mean:.2%} ({cells[r, k].parameters:,})" if (r, k) in cells else "" for k in groups]
        lines.append(f"| r = {r} | {' | '.join(texts)} |")
    figure, ((axes,),) = panels(height=3.8)
    for k in groups:
        line = [cells[r, k] for r in widths if (r, k) in cells]
        axes.plot([row.parameters for row in line], [row.mean for row in line], marker="o", label=f"k = {k}")
    for r in widths:  # on top, where no line crosses them: the points of one rank have almost one size
        place = (fmean(cells[r, k].parameters for k in groups if (r, k) in cells), 1.02)
        axes.annotate(f"r = {r}", place, xycoords=axes.get_xaxis_transform(), ha="center")
    axes.set(xscale="log", xlabel="trainable parameters of the adapters", ylabel="test accuracy")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1e3:.0f}k"))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    legend_below(figure, len(groups))
    return "\n\n".join(["\n".join(lines), f"Test accuracy (parameters). {caption(made)}"]), figure


def curves(made: Sequence[Row]) -> tuple[str, Figure]:
    """Write and draw loss and validation accuracy over the steps: Figure 6 of the paper."""
    figure, ((left, right),) = panels(columns=2, height=3.8)
    lines = [
        "| | parameters | last training loss | best validation accuracy | test accuracy |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in sorted(made, key=lambda row: row.experiment.label):
        record = row.runs[0]
        losses = [(entry["step"], entry["loss"]) for entry in record["log"] if "loss" in entry]
        left.plot(*zip(*losses, strict=True), label=row.experiment.label)
        right.plot(*zip(*record["curve"], strict=True), marker=".", label=row.experiment.label)
        best = max(accuracy for _, accuracy in record["curve"])
        cells = [row.experiment.label, f"{row.parameters:,}", f"{losses[-1][1]:.3f}", f"{best:.2%}", f"{row.mean:.2%}"]
        lines.append(f"| {' | '.join(cells)} |")
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel="validation accuracy")
    legend_below(figure, len(made))
    return "\n\n".join(["\n".join(lines), f"Curves are of the first seed. {caption(made)}"]), figure


def write(results: Path, studies: Path = STUDIES) -> list[Path]:
    """Write the pages of all studies that have results; return where."""
    records = read_results(results)
    written = []
    if (tasks := by_task(records, "ablation", studies)) and all(_has_defaults(made) for made in tasks.values()):
        written.append(results / "ablation.md")
        written[-1].write_text(f"# Ablation\n\n{ablation(tasks)}\n")
    for study, make in (("ranks", ranks), ("curves", curves)):
        for task, made in by_task(records, study, studies).items():
            text, figure = make(made)
            path = results / f"{study}-{task}.md"
            title = made[0].runs[0]["title"]
            path.write_text(f"# {study.capitalize()}: {title}\n\n{text}\n")
            save(figure, path.with_suffix(".svg"))
            written.append(path)
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    for page in write(parser.parse_args().results):
        print(page)
