"""Tables of the trainings in ``routing-tasks.jsonl``, from that file alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks.provenance import short

Row = dict[str, Any]

PEER = "lora_r8"
TITLES = {
    "four": "Four tasks, a head for each",
    "opposite": "Two opposite policies, one head for both",
}
WAYS = {
    "head": "one LoRA r=8, frozen; a new head",
    "adapter": "one LoRA r=8, which goes on; a new head",
    "core": "a new core from zero; a new head",
    "mean core": "a new core from the mean of the others; a new head",
}


def best_rate(rows: Sequence[Row], name: str, method: str) -> float:
    """Return the learning rate with the best mean on validation texts with the first seed; the smaller of equals."""
    tried = {
        row["rate"]: fmean(row["validation"].values())
        for row in rows
        if (row["set"], row["method"], row["seed"]) == (name, method, 0)
    }
    if not tried:
        raise SystemExit(f"{name}: run {method} first, because its learning rate is not known")
    return max(sorted(tried), key=lambda rate: tried[rate])


def with_error(values: Sequence[float], *, sign: bool = False) -> str:
    """Write a mean in points with its standard error, which one value does not have."""
    mean = f"{100 * fmean(values):{'+' if sign else ''}.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * stdev(values) / len(values) ** 0.5:.1f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def together(rows: Sequence[Row], name: str, labels: dict[str, str]) -> str:
    """Compare all methods on one set of tasks, each at its own rate, with one shared LoRA seed by seed."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["set"] == name and row["rate"] == best_rate(rows, name, row["method"]):
            found.setdefault(row["method"], {})[row["seed"]] = row
    peers = {seed: fmean(row["test"].values()) for seed, row in found[PEER].items()}
    tasks = list(found[PEER][0]["test"])
    head = ["method", "parameters", "rate", "seeds", *tasks, "mean", f"minus {labels[PEER]}"]
    lines = []
    for method in (method for method in labels if method in found):
        own = found[method]
        means = {seed: fmean(row["test"].values()) for seed, row in own.items()}
        gains = [means[seed] - peers[seed] for seed in means if seed in peers]
        lines.append(
            [
                labels[method],
                f"{own[0]['parameters']:,}",
                f"{own[0]['rate']:g}",
                f"{len(own)}",
                *(f"{100 * fmean(row['test'][task] for row in own.values()):.1f}" for task in tasks),
                with_error(list(means.values())),
                with_error(gains, sign=True) if method != PEER and len(gains) == len(own) else "",
            ]
        )
    return _table(head, lines)


def later(rows: Sequence[Row], name: str, labels: dict[str, str]) -> str:
    """Compare the ways to add a task, with the task's own LoRA and its head alone from the set of four."""
    task = name.removeprefix("later: ")
    head = ["what trains on the new task", "parameters", "seeds", task, "change of the other three"]
    lines = []
    for method, label in (("head", "its head alone, no adapter"), ("loras_r8", "a LoRA r=8 of its own; a new head")):
        own = [
            r
            for r in rows
            if (r["set"], r["method"]) == ("four", method) and r["rate"] == best_rate(rows, "four", method)
        ]
        parameters = own[0]["parameters"] // len(own[0]["test"])
        scores = [row["test"][task] for row in own]
        lines.append([label, f"{parameters:,}", f"{len(own)}", with_error(scores), "none: apart"])
    chosen = [row for row in rows if row["set"] == name]
    for method in (method for method in labels if any(row["method"] == method for row in chosen)):
        own = [row for row in chosen if row["method"] == method]
        for way in own[0]["ways"]:
            after = [row["ways"][way]["after"] for row in own]
            changes = [
                fmean(there[other] - row["before"][other] for other in row["before"])
                for row, there in zip(own, after, strict=True)
            ]
            lines.append(
                [
                    WAYS[way] if method == PEER else f"{labels[method]}: {WAYS[way]}",
                    f"{own[0]['ways'][way]['parameters']:,}",
                    f"{len(own)}",
                    with_error([there[task] for there in after]),
                    with_error(changes, sign=True),
                ]
            )
    return _table(head, lines)


def write_report(path: Path) -> str:
    """Write the page beside the results and return it."""
    from benchmarks.routing.tasks import METHODS

    rows = [json.loads(line) for line in path.read_text().splitlines()]
    labels = {name: method.label for name, method in METHODS.items()}
    sets = list(dict.fromkeys(row["set"] for row in rows))
    parts = []
    for name in sorted(sets, key=lambda one: (one.startswith("later"), sets.index(one))):
        is_later = name.startswith("later: ")
        title = f'The task "{name.removeprefix("later: ")}" is added later' if is_later else TITLES[name]
        parts.append(f"**{title}**\n\n{(later if is_later else together)(rows, name, labels)}")
    first, sizes = rows[0], rows[0]["sizes"]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    parts.append(
        f"Test accuracy in %, means over seeds; ± is the standard error over seeds, of differences that of pairs with "
        f"equal seeds. all-MiniLM-L6-v2; of each task {sizes['train']} texts to train on, {sizes['validation']} to "
        f"choose the learning rate with and {sizes['test']} to test with; {sizes['epochs']} epochs; a step has "
        f"{sizes['batch_size']} texts of each task. Parameters are those of the adapters, without heads. "
        f"{first['device']}, one thread; {versions}; commits {', '.join(sorted({short(r['commit']) for r in rows}))}."
    )
    text = "\n\n".join(parts) + "\n"
    path.with_suffix(".md").write_text(text)
    return text
