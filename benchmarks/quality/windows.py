"""How wide the window of good learning rates is, of each method on each task, from finished runs only.

    python -m benchmarks.quality.run --experiments lora_r8 tucka_r8 --rates 1e-3 2e-3 4e-3 6e-3 1e-2 --seeds 0 1 2
    python -m benchmarks.quality.windows

Writes ``windows.md`` and ``windows.svg`` beside the results. A window reaches from the smallest to the largest rate,
without a gap, whose mean accuracy is at most so many points below that of the best rate: the method's own, and LoRA's.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.drawing import SERIES, legend_below, panels, save
from benchmarks.quality.experiments import Experiment, read_all
from benchmarks.quality.report import of_experiment, short
from benchmarks.quality.run import RESULTS, read_results, score

# Compared at equal seeds; what has run with at least so many rates takes part.
METHODS = (
    "lora_r8",
    "tucka_r8",
    "tucka_r8_columns",
    "tucka",
    "lora_r4",
    "tucka_r2_default",
    "tucka_one_default",
    "hra_r8",
    "oft_b32",
)
LEAST_RATES, WITHIN = 4, (0.01, 0.03)
PEER = "lora_r8"


@dataclass(frozen=True)
class Window:
    """Accuracy by learning rate of one method on one task."""

    experiment: Experiment
    scores: Mapping[float, tuple[float, ...]]  # by rate: test accuracy of each seed

    @property
    def means(self) -> dict[float, float]:
        """Mean accuracy of each rate, the smallest rate first."""
        return {rate: fmean(self.scores[rate]) for rate in sorted(self.scores)}

    @property
    def best(self) -> float:
        """The rate with the best mean."""
        return max(self.means, key=lambda rate: (self.means[rate], -rate))

    def ends(self, within: float) -> tuple[float, float]:
        """Return the smallest and the largest rate around the best one, without a gap, whose mean is near the best."""
        ends = self.reaching(self.means[self.best] - within)
        assert ends is not None
        return ends

    def reaching(self, accuracy: float) -> tuple[float, float] | None:
        """Return the smallest and the largest rate around the best, without a gap, whose mean is so good, if any."""
        means, rates = self.means, list(self.means)
        low = high = rates.index(self.best)
        least = accuracy - 1e-9
        if means[self.best] < least:
            return None
        while low > 0 and means[rates[low - 1]] >= least:
            low -= 1
        while high < len(rates) - 1 and means[rates[high + 1]] >= least:
            high += 1
        return rates[low], rates[high]


def windows(records: Sequence[dict[str, Any]], experiments: Sequence[Experiment]) -> list[Window]:
    """Gather one task's runs by method and rate; rates that fewer seeds than others have run are left out."""
    found = []
    for experiment in experiments:
        scores: dict[float, dict[int, float]] = defaultdict(dict)
        for record in of_experiment(records, experiment):
            if "test" in record:
                scores[record["learning_rate"]][record["seed"]] = score(record, "test")
        # All rates with the same seeds, else a rate would be compared with other trainings than its neighbours.
        most = max((seed + 1 for own in scores.values() for seed in own), default=0)
        grids = [{rate: own for rate, own in scores.items() if own.keys() >= set(range(n))} for n in range(1, most + 1)]
        grids = [grid for grid in grids if len(grid) >= LEAST_RATES]
        if grids:
            seeds, grid = max(enumerate(grids, 1), key=lambda pair: (pair[0] * len(pair[1]), pair[0]))
            found.append(Window(experiment, {rate: tuple(own[n] for n in range(seeds)) for rate, own in grid.items()}))
    return found


def table(made: Sequence[Window]) -> str:
    """Write one task's accuracy by rate, and the windows."""
    rates = sorted({rate for window in made for rate in window.scores})
    peer = next((window for window in made if window.experiment.name == PEER), None)
    near = [f"within {within:.0%}" for within in WITHIN]
    if peer is not None:
        near += [f"within {within:.0%} of {peer.experiment.label}" for within in WITHIN]
    head = ["method", *(f"{rate:g}" for rate in rates), "best", *near, "seeds"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for window in made:
        cells = [f"{window.means[rate]:.1%}" if rate in window.scores else "" for rate in rates]
        own = window.scores[window.best]
        best = f"{fmean(own):.1%}" + (f" ± {stdev(own):.1%}" if len(own) > 1 else "")
        tops = [each.means[each.best] for each in (window, peer) if each is not None]
        found = [window.reaching(top - within) for top in tops for within in WITHIN]
        texts = [
            "none" if ends is None else f"{ends[0]:g} to {ends[1]:g}, {ends[1] / ends[0]:.1f} times" for ends in found
        ]
        row = [window.experiment.label, *cells, best, *texts, str(len(own))]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def draw(tasks: Mapping[str, Sequence[Window]], path: Path) -> None:
    """Draw accuracy against the learning rate, a panel for each task."""
    figure, (row,) = panels(columns=len(tasks), height=3.6)
    # A method has one colour, also where a panel lacks others.
    drawn = {window.experiment.name for made in tasks.values() for window in made}
    colours = dict(zip([name for name in METHODS if name in drawn], SERIES, strict=False))
    for axes, (task, made) in zip(row, tasks.items(), strict=True):
        for window in made:
            means, name = window.means, window.experiment.name
            axes.plot(list(means), list(means.values()), marker="o", label=window.experiment.label, color=colours[name])
        axes.set(xscale="log", xlabel="learning rate", title=task)
    row[0].set_ylabel("test accuracy")
    legend_below(figure, 3)
    save(figure, path)


def write(folder: Path) -> str:
    """Write the table and the figure of all tasks with runs at several rates; return the table's page."""
    experiments = read_all(list(METHODS))
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in read_results(folder):
        if record["scale"] == "quick":
            groups[record["task"]].append(record)
    tasks, pages, commits = {}, [], set()
    for task, records in sorted(groups.items()):
        if made := windows(records, experiments):
            tasks[task] = made
            title = records[0]["title"]
            pages.append(f"### {title[0].upper()}{title[1:]}\n\n{table(made)}")
            named = {window.experiment.name for window in made}
            commits |= {short(record["commit"]) for record in records if record["experiment"] in named}
    if not tasks:
        return "No method has run with several learning rates yet.\n"
    said = (
        "Test accuracy by learning rate, the mean over seeds; ± is the standard deviation over seeds. *Within 1 %* is "
        "the window whose accuracy is at most one point below the method's best, and *within 1 % of LoRA r=8* that "
        "of at most one point below LoRA's best. "
        f"CPU, one thread; commits {', '.join(sorted(commits))}."
    )
    text = "\n\n".join(["# Learning rates", *pages, said]) + "\n"
    (folder / "windows.md").write_text(text)
    draw(tasks, folder / "windows.svg")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    print(write(parser.parse_args().results))
