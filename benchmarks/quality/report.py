"""Make the tables and figures of finished runs, from their results only.

    python -m benchmarks.quality.report

Writes beside the results: ``tables.md``, and for each task and size a figure of accuracy against parameters.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.drawing import MUTED, legend_below, panels, save
from benchmarks.quality.experiments import FOLDER, Experiment, read_all
from benchmarks.quality.run import RESULTS, best_rate, read_results, score

PEER = "lora_r8"
TEXTS = ("sentences", "reviews")
SIZES_COUNT = {"images": 10}  # each of its ten classes has as many images as the sizes say


@dataclass(frozen=True)
class Row:
    """What all seeds of one experiment say of one task."""

    experiment: Experiment  # what was run
    runs: tuple[dict[str, Any], ...]  # one record for each seed, at the learning rate that the validation part chose

    @property
    def scores(self) -> dict[int, float]:
        """Test accuracy by seed."""
        return {record["seed"]: score(record, "test") for record in self.runs}

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return fmean(self.scores.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds, if there are several."""
        return stdev(self.scores.values()) if len(self.runs) > 1 else None

    @property
    def parameters(self) -> int:
        """Trainable parameters of the adapters."""
        return int(self.runs[0]["parameters"])

    def against(self, other: Row) -> tuple[float, float | None]:
        """Return the mean paired difference to another row, and its standard error over the common seeds."""
        common = self.scores.keys() & other.scores.keys()
        differences = [self.scores[seed] - other.scores[seed] for seed in sorted(common)]
        error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
        return fmean(differences), error


def of_experiment(records: Sequence[dict[str, Any]], experiment: Experiment) -> list[dict[str, Any]]:
    """Return the finished runs of one experiment as its file is now."""
    return [one for one in records if (one["experiment"], one["key"]) == (experiment.name, experiment.key)]


def rows(records: Sequence[dict[str, Any]], experiments: Sequence[Experiment]) -> tuple[list[Row], dict[str, str]]:
    """Gather one task's records by experiment; also say which experiments the task's model does not support."""
    made, refused = [], {}
    for experiment in experiments:
        own = [one for one in of_experiment(records, experiment) if one["learning_rate"] in experiment.learning_rates]
        if unsupported := [one for one in own if "unsupported" in one]:
            refused[experiment.label] = unsupported[0]["unsupported"]
            continue
        first = [one for one in own if one["seed"] == min((one["seed"] for one in own), default=0)]
        if len({one["learning_rate"] for one in first}) < len(experiment.learning_rates):
            continue  # the search is not finished
        rate = best_rate(first)
        made.append(Row(experiment, tuple(one for one in own if one["learning_rate"] == rate)))
    return sorted(made, key=lambda row: -row.mean), refused


def table(made: Sequence[Row]) -> str:
    """Write the table of a task in the order of the differences to LoRA, which are taken seed by seed."""
    head = [
        "method",
        "parameters",
        "learning rate",
        "seeds",
        "accuracy",
        "minus LoRA r=8",
        "load entropy",
        "seconds",
        "memory, MiB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    peer = next((row for row in made if row.experiment.name == PEER), None)
    for row in sorted(made, key=lambda row: -(row.against(peer)[0] if peer else row.mean)):
        entropies = [one["load_entropy"] for one in row.runs if one.get("load_entropy") is not None]
        cells = [
            row.experiment.label,
            f"{row.parameters:,}",
            f"{row.runs[0]['learning_rate']:g}" if row.runs[0]["learning_rate"] else "",
            str(len(row.runs)),
            f"{row.mean:.2%}" + (f" ± {row.spread:.2%}" if row.spread is not None else ""),
            _difference(row, peer),
            f"{fmean(entropies):.2f}" if entropies else "",
            f"{fmean(one['seconds'] for one in row.runs):.0f}",
            f"{fmean(one['peak_memory_bytes'] for one in row.runs) / 2**20:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference(row: Row, peer: Row | None) -> str:
    if peer is None or peer is row:
        return ""
    return signed(*row.against(peer))


def signed(mean: float, error: float | None) -> str:
    """Write a difference in points."""
    return f"{100 * mean:+.2f}" + (f" ± {100 * error:.2f}" if error is not None else "")


def overall(tasks: Mapping[str, Sequence[Row]], seeds: int = 2) -> str:
    """Write the mean over tasks of what has run on all of them with several seeds; empty if nothing has."""
    places = [{row.experiment.name: row for row in made if len(row.runs) >= seeds} for made in tasks.values()]
    names = [name for name in places[0] if all(name in found for found in places)]
    if PEER not in names:
        return ""
    lines = ["| method | parameters | accuracy | minus LoRA r=8 |", "|---|---:|---:|---:|"]
    means = {}
    for name in names:
        found = [place[name] for place in places]
        common = set.intersection(*(set(row.scores) for row in found))
        means[name] = {seed: fmean(row.scores[seed] for row in found) for seed in sorted(common)}
    for name in sorted(names, key=lambda name: -fmean(means[name].values())):
        row, own = places[0][name], means[name]
        differences = [own[seed] - means[PEER][seed] for seed in own.keys() & means[PEER].keys()]
        change = "" if name == PEER else signed(fmean(differences), stdev(differences) / math.sqrt(len(differences)))
        lines.append(f"| {row.experiment.label} | {row.parameters:,} | {fmean(own.values()):.2%} | {change} |")
    return "\n".join(lines)


def caption(made: Sequence[Row]) -> str:
    """Say on which device, sizes and versions the runs of a table ran."""
    records = [one for row in made for one in row.runs]
    sizes, versions = records[0]["sizes"], records[0]["versions"]
    devices = ", ".join(sorted({one["device"] for one in records}))
    commits = ", ".join(sorted({short(one["commit"]) for one in records}))
    tested = len(records[0]["test"]) * sizes["test"] * SIZES_COUNT.get(records[0]["task"], 1)
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        "± is the standard deviation over seeds; of a difference, the standard error of its mean, paired by seed. "
        f"Device: {devices}; {sizes['epochs']} epochs, batches of {sizes['batch_size']}; about {tested:,} test items. "
        f"Seconds are of training, other runs beside it. {named}; commit {commits}."
    )


def short(commit: str) -> str:
    """Shorten a commit, and keep what says that files were changed."""
    return commit[:10] + "-dirty" * commit.endswith("-dirty")


def draw(made: Sequence[Row], title: str, path: Path) -> None:
    """Draw accuracy against trainable parameters; methods that train only a head are lines."""
    from tucka.plots import tradeoff

    points = [(row.experiment.label, row.parameters, row.mean) for row in made if row.parameters]
    if not points:
        return
    figure, ((axes,),) = panels(height=4 + 0.11 * len(points))
    tradeoff(points, ax=axes).set_title(title)
    axes.get_legend().remove()
    for line in axes.lines:  # names alone, since the table has the numbers
        line.set_label(line.get_label().partition(":")[0])
    for row in made:
        if not row.parameters:
            axes.axhline(row.mean, color=MUTED, linewidth=0.8, linestyle=":", label="_")
            axes.annotate(
                row.experiment.label,
                (0.01, row.mean),
                xycoords=("axes fraction", "data"),
                va="bottom",
                color=MUTED,
            )
    legend_below(figure, 2)
    save(figure, path)


def write(folder: Path, experiments: Sequence[Experiment]) -> str:
    """Write tables and figures of all finished runs into their folder; return the tables."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for record in read_results(folder):
        groups[record["task"], record["scale"]].append(record)
    pages, tasks = [], {}
    for (task, scale), records in sorted(groups.items()):
        made, refused = rows(records, experiments)
        if not made:
            continue
        if task in TEXTS and scale == "quick":
            tasks[task] = made
        title = records[0]["title"] + (", all data" if scale == "full" else "")
        notes = [f"Not supported by {label}: {reason}" for label, reason in refused.items()]
        pages.append("\n\n".join([f"## {title[0].upper()}{title[1:]}", table(made), caption(made), *notes]))
        draw(made, title, folder / f"{task}-{scale}.svg")
    if len(tasks) == len(TEXTS) and (both := overall(tasks)):
        said = f"Mean over {' and '.join(TEXTS)}, of what has run with several seeds on both."
        pages.insert(0, f"## Both tasks of classifying texts\n\n{both}\n\n{said}")
    text = "# Quality of the methods\n\n" + "\n\n".join(pages) + "\n"
    (folder / "tables.md").write_text(text)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the experiments' files are")
    chosen = parser.parse_args()
    print(write(chosen.results, read_all(None, chosen.folder)))
