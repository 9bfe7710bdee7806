"""What the demo shows in the end: tables, a figure and a file with every number."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from tucka.core.balance import load_entropy
from tucka.demo.data import DOMAINS
from tucka.demo.disk import whole_file
from tucka.demo.plan import Outcome, Plan
from tucka.peft import AdaptedModule
from tucka.plots import TradeoffPoint, group_by_label, tradeoff

__all__ = ["accuracy_table", "load_table", "modules_table", "write_figure", "write_json"]


def _table(title: str, caption: str = "") -> Table:
    """Start a table that is narrow enough for a terminal of 80 columns."""
    table = Table(title=title, caption=caption or None, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.title_justify = table.caption_justify = "left"
    return table


def accuracy_table(outcomes: Sequence[Outcome], plan: Plan, trained: int) -> Table:
    """Compare the methods.

    Parameters
    ----------
    outcomes : sequence of Outcome
        A row for each.
    plan : Plan
        Stated in the caption.
    trained : int
        Training sentences in all.

    Returns
    -------
    Table
        To be printed.
    """
    domains = list(outcomes[0].accuracy)
    rates = ", ".join(f"{row.method} {row.learning_rate:g}" for row in outcomes if row.learning_rate)
    head = max(outcome.head_parameters for outcome in outcomes)
    error = max(outcome.error(plan.test_per_domain) for outcome in outcomes)
    caption = (
        f"{trained:,} training and {plan.test_per_domain} x {len(domains)} test sentences. For all methods the same "
        f"head, {plan.epochs} epochs, batches of {plan.batch_size}, seed {plan.seed}. Learning rates: {rates}. "
        f"Adapter: trainable parameters besides the head's {head:,}. Standard error of a mean: at most {error:.3f}."
    )
    table = _table("Accuracy on test sentences", caption)
    table.add_column("method", no_wrap=True)
    for heading in (*domains, "mean", "adapter", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for outcome in outcomes:
        shares = [f"{outcome.accuracy[domain]:.3f}" for domain in domains]
        cost = [f"{outcome.adapter_parameters:,}", f"{outcome.seconds:.1f}"] if outcome.learning_rate else ["", ""]
        table.add_row(outcome.name, *shares, f"{outcome.mean:.3f}", *cost)
    return table


def load_table(load: Mapping[str, Sequence[float]]) -> Table:
    """Show how often each expert group was chosen.

    Parameters
    ----------
    load : mapping of str to sequence of float
        Counts of the groups, by what was routed.

    Returns
    -------
    Table
        Shares and entropies, to be printed.
    """
    caption = "Entropy: 1 if all groups are used alike, 0 if one takes everything. Each sentence has its own route."
    table = _table("Expert load of TuckA", caption)
    table.add_column("sentences", no_wrap=True)
    for group in range(len(next(iter(load.values())))):
        table.add_column(f"group {group}", justify="right")
    table.add_column("entropy", justify="right")
    for label, counts in load.items():
        shares = [f"{count / sum(counts):.0%}" for count in counts]
        table.add_row(label, *shares, f"{load_entropy(list(counts)):.2f}")
    return table


def modules_table(rows: Sequence[AdaptedModule]) -> Table:
    """Show the adapted layers, those of all blocks that are alike in one line.

    Parameters
    ----------
    rows : sequence of AdaptedModule
        From `tucka.peft.adapted_modules`.

    Returns
    -------
    Table
        To be printed.
    """
    alike: dict[tuple[str, tuple[tuple[str, str], ...]], list[AdaptedModule]] = {}
    for row in rows:
        shapes = tuple((name, "x".join(map(str, shape))) for name, shape in row.shapes.items())
        place = re.split(r"\.\d+\.", row.name)[-1]
        alike.setdefault((place, shapes), []).append(row)
    names = list(dict.fromkeys(name for row in rows for name in row.shapes))
    table = _table(f"{len(rows)} adapted layers, {sum(row.parameters for row in rows):,} parameters")
    for heading in ("layer", "blocks", *names, "parameters"):
        table.add_column(heading.replace("_", "\n"), no_wrap=True, justify="left" if heading == "layer" else "right")
    for (place, shapes), members in sorted(alike.items()):
        cells = [dict(shapes).get(name, "") for name in names]
        total = sum(member.parameters for member in members)
        table.add_row(place, str(len(members)), *cells, f"{total:,}")
    return table


def write_figure(path: Path, outcomes: Sequence[Outcome], plan: Plan) -> None:
    """Draw accuracy against size, and which expert group served which domain.

    Parameters
    ----------
    path : Path
        The PNG to write.
    outcomes : sequence of Outcome
        Of the methods that were trained; one of them is routed.
    plan : Plan
        For the error bars.
    """
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    points = [
        TradeoffPoint(row.name, row.adapter_parameters + row.head_parameters, row.mean, row.error(plan.test_per_domain))
        for row in outcomes
    ]
    tradeoff(points, ax=left)
    left.set_title("Accuracy and size (bars: standard error)")
    routed = next(outcome for outcome in outcomes if outcome.load)
    group_by_label({domain: routed.load[domain] for domain in DOMAINS}, ax=right)
    right.set_title("Which expert group serves which domain")
    with whole_file(path) as part:
        figure.savefig(part, format="png")


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write results to a file, whole or not at all.

    Parameters
    ----------
    path : Path
        The file.
    results : mapping
        Numbers, texts, lists and mappings of them.
    """
    with whole_file(path) as part:
        part.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
