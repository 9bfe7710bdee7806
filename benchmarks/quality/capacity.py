"""Accuracy against parameters where capacity decides, from finished runs only: as the paper's Figure 1 (a).

    python -m benchmarks.quality.run --folder benchmarks/quality/studies/capacity --tasks glosses sounds languages \
        --seeds 0 1 2
    python -m benchmarks.quality.capacity

Writes ``capacity.md`` and ``capacity.svg`` beside the results. LoRA's ranks are a curve, and every other method is
compared with it at the method's own number of parameters.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.drawing import SERIES, legend_below, panels, save
from benchmarks.quality.report import Row, caption, signed
from benchmarks.quality.run import RESULTS, read_results
from benchmarks.quality.studies_report import by_task

TASKS = ("glosses", "sounds", "languages")
# By the names of its experiments: what a line connects. Variants of TuckA are points.
FAMILIES = {"LoRA": re.compile(r"lora_r\d+"), "TuckA": re.compile(r"tucka_r\d+")}


def curve(made: Sequence[Row]) -> list[Row]:
    """Return LoRA's rows, the smallest first."""
    return _family(made, "LoRA")


def _family(made: Sequence[Row], name: str) -> list[Row]:
    own = [row for row in made if FAMILIES[name].fullmatch(row.experiment.name)]
    return sorted(own, key=lambda row: row.parameters)


def between(curve: Sequence[Row], parameters: int, seed: int) -> float | None:
    """Return LoRA's accuracy at a number of parameters, on straight lines over the logarithm; None outside them."""
    for low, high in pairwise(curve):
        if low.parameters <= parameters <= high.parameters and {seed} <= low.scores.keys() & high.scores.keys():
            share = math.log(parameters / low.parameters) / math.log(high.parameters / low.parameters)
            return (1 - share) * low.scores[seed] + share * high.scores[seed]
    return None


def against(row: Row, curve: Sequence[Row]) -> tuple[float, float | None] | None:
    """Return the mean difference to LoRA at equal parameters, and its standard error over seeds."""
    pairs = [(own, between(curve, row.parameters, seed)) for seed, own in sorted(row.scores.items())]
    differences = [own - peer for own, peer in pairs if peer is not None]
    if not differences:
        return None
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return fmean(differences), error


def steps(made: Sequence[Row]) -> list[str]:
    """Say by how much each rank of LoRA is ahead of the rank before it, paired by seed."""
    ranks = curve(made)
    return [
        f"{high.experiment.label} minus {low.experiment.label}: {signed(*high.against(low))}"
        for low, high in pairwise(ranks)
    ]


def table(tasks: Mapping[str, Sequence[Row]]) -> str:
    """Write accuracy and the difference to LoRA at equal parameters, the fewest parameters first."""
    head = ["method", "parameters", *(cell for task in tasks for cell in (task, "minus LoRA"))]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    places = [{row.experiment.name: row for row in made} for made in tasks.values()]
    found = {name: row for place in places for name, row in place.items()}
    for name, any_row in sorted(found.items(), key=lambda pair: (pair[1].parameters, pair[0])):
        cells = [any_row.experiment.label, f"{any_row.parameters:,}"]
        for place, made in zip(places, tasks.values(), strict=True):
            row = place.get(name)
            difference = against(row, curve(made)) if row and not FAMILIES["LoRA"].fullmatch(name) else None
            cells += [_accuracy(row) if row else "", signed(*difference) if difference else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _accuracy(row: Row) -> str:
    spread = f" ± {row.spread:.1%}" if row.spread is not None else ""
    seeds = "" if len(row.runs) > 1 else ", one seed"
    return f"{row.mean:.1%}{spread} ({row.runs[0]['learning_rate']:g}{seeds})"


def draw(tasks: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw a panel for each task: LoRA and TuckA as lines over their sizes, other methods as points."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, grid = panels(1, len(tasks), height=3.8)
    names = sorted({row.experiment.name for made in tasks.values() for row in made})
    alone = [name for name in names if not any(family.fullmatch(name) for family in FAMILIES.values())]
    peers = [name for name in alone if not name.startswith("tucka")]
    for axes, (task, made) in zip(grid[0], tasks.items(), strict=True):
        for place, family in enumerate(FAMILIES):
            _points(axes, _family(made, family), family, "o-", SERIES[place])
        for place, name in enumerate(alone):
            own = [row for row in made if row.experiment.name == name]
            colour = SERIES[2 + peers.index(name)] if name in peers else SERIES[1]  # variants have that of their family
            _points(axes, own, own[0].experiment.label if own else "", "sD^v<>P*"[place % 8], colour)
        axes.set(xscale="log", xlabel="trainable parameters", title=task)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        axes.xaxis.set_major_formatter(lambda size, _place: f"{size / 1e3:g}k")
        axes.xaxis.set_minor_formatter(NullFormatter())
    grid[0][0].set_ylabel("test accuracy")
    legend_below(figure, 3)
    save(figure, path)


def _points(axes: Any, made: Sequence[Row], label: str, style: str, colour: str) -> None:
    if made:
        sizes, means = [row.parameters for row in made], [row.mean for row in made]
        axes.errorbar(
            sizes, means, [row.spread or 0.0 for row in made], fmt=style, capsize=2, label=label, color=colour
        )


def write(folder: Path) -> str:
    """Write the table and the figure; return the table's page."""
    found = by_task(read_results(folder), "capacity")
    tasks = {task: found[task] for task in TASKS if task in found}
    if not tasks:
        return "No task has finished.\n"
    separations = "\n".join(f"- {task}: {'; '.join(steps(made))}." for task, made in tasks.items() if steps(made))
    said = (
        "Test accuracy (learning rate); ± is the standard deviation over seeds. *Minus LoRA* is the difference in "
        "points to LoRA at the same number of parameters, between its ranks on straight lines over the logarithm, "
        "paired by seed, with its standard error. It is empty outside LoRA's sizes."
    )
    notes = [f"{task}: {caption(made)}" for task, made in tasks.items()]
    text = "\n\n".join(["# Where capacity decides", table(tasks), said, separations, *notes]) + "\n"
    (folder / "capacity.md").write_text(text)
    draw(tasks, folder / "capacity.svg")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    print(write(parser.parse_args().results))
