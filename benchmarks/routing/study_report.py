"""Tables and figures of the trainings in ``routing-SET.jsonl``, from that file alone."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.drawing import MUTED, legend_below, panels, save
from benchmarks.routing.balance_report import ceiling
from tucka.core.balance import load_entropy
from tucka.plots import group_by_label

__all__ = ["information", "interval", "write_report"]

Row = dict[str, Any]


def information(table: Iterable[Iterable[int]]) -> float:
    """Return the mutual information of a contingency table's rows and columns, in bits."""
    counts = np.asarray(list(table), dtype=np.float64)
    shares = counts / counts.sum()
    apart = np.outer(shares.sum(axis=1), shares.sum(axis=0))
    seen = shares > 0
    return float((shares[seen] * np.log2(shares[seen] / apart[seen])).sum())


def interval(values: list[float]) -> float:
    """Return half the 95 % confidence interval of a mean, by Student's t; NaN for one value."""
    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def _by_setting(rows: list[Row], names: tuple[str, ...]) -> dict[tuple[Any, ...], list[Row]]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def _mean(row: Row) -> float:
    return float(np.mean(list(row["accuracy"].values())))


def _with_interval(values: list[float]) -> str:
    half = interval(values)
    return f"{np.mean(values):.2%}" if math.isnan(half) else f"{np.mean(values):.2%} ± {half:.2%}"


def _entropy(values: list[float]) -> str:
    half = interval(values)
    return f"{np.mean(values):.3f}" if math.isnan(half) else f"{np.mean(values):.3f} ± {half:.3f}"


def pays(rows: list[Row]) -> str:
    """Compare accuracy with that of k = 1 on the same batches, seed by seed."""
    singles = {(row["batches"], row["seed"]): _mean(row) for row in rows if row["k"] == 1}
    head = ["k", "routing", "batches", "r", "parameters", "seeds", "accuracy", "minus k = 1", "load entropy"]
    head += ["least share", "information of group and domain, bits (of 2)"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for (k, routing, batches), found in _by_setting(rows, ("k", "routing", "batches")).items():
        gains = [_mean(row) - singles[batches, row["seed"]] for row in found if (batches, row["seed"]) in singles]
        cells = [
            k,
            routing if k > 1 else "",
            batches,
            found[0]["r"],
            f"{found[0]['parameters']:,}",
            len(found),
            _with_interval([_mean(row) for row in found]),
            _with_interval(gains) if k > 1 else "",
            f"{np.mean([row['after']['entropy'] for row in found]):.2f}" if k > 1 else "",
            f"{min(row['after']['least_share'] for row in found):.1%}" if k > 1 else "",
            f"{np.mean([information(row['after']['table']) for row in found]):.3f}" if k > 1 else "",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


_ROUTERS = ("affinity", "router_init", "scale", "balance_rate")


def _router(affinity: str, router_init: str | None, scale: float | None, balance_rate: float) -> str:
    start = router_init or "balanced"
    name = f"{affinity}, {start}" + ("" if scale is None else f" (a = {scale:g})")
    name += f", bias of γ = {balance_rate:g}" if balance_rate else ""
    return f"{name}: the default" if (affinity, router_init, balance_rate) == ("directional", None, 0.0) else name


def balance(rows: list[Row]) -> str:
    head = ["router", "routing", "k", "seeds", "entropy at the start", "after training", "ceiling of chance"]
    head += ["least share after, any seed"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for key, found in _by_setting(rows, (*_ROUTERS, "routing", "k")).items():
        *router, routing, k = key
        cells = [
            _router(*router),
            routing,
            k,
            len(found),
            *(_entropy([load_entropy(row[when]["load"]) for row in found]) for when in ("before", "after")),
            f"{ceiling(sum(found[0]['after']['load']), k):.3f}",
            f"{min(row['after']['least_share'] for row in found):.1%}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def maps(rows: list[Row], path: Path) -> None:
    """Draw which group serves which domain, for k = 4 and one seed, by routing."""
    from examples.data import DOMAINS

    chosen = _by_setting([row for row in rows if row["k"] == 4], ("routing", "batches"))
    if not chosen:
        return
    drawn, grid = panels(-(-len(chosen) // 2), 2, height=3 * -(-len(chosen) // 2))
    for ax in grid.flat[len(chosen) :]:
        ax.axis("off")
    for ax, ((routing, batches), found) in zip(grid.flat, chosen.items(), strict=False):
        group_by_label(dict(zip(DOMAINS, found[0]["after"]["table"], strict=True)), ax=ax)
        bits = np.mean([information(row["after"]["table"]) for row in found])
        ax.set_title(f"{routing} routing, {batches} batches\n{bits:.2f} bits")
    save(drawn, path)


def loads(rows: list[Row], path: Path) -> None:
    """Draw the share of each group after training, the most used first, by start and routing."""
    drawn, (grid,) = panels(1, 2, height=3.2, sharey=True)
    for ax, (routing, chosen) in zip(grid, _by_setting(rows, ("routing",)).items(), strict=True):
        for router, found in _by_setting(chosen, _ROUTERS).items():
            load = np.array([sorted(row["after"]["load"], reverse=True) for row in found], dtype=np.float64)
            shares = load / load.sum(axis=1, keepdims=True)
            places, error = np.arange(1, shares.shape[1] + 1), shares.std(axis=0, ddof=1) if len(found) > 1 else None
            ax.errorbar(places, shares.mean(axis=0), yerr=error, fmt="o-", capsize=2, label=_router(*router))
        ax.axhline(1 / shares.shape[1], color=MUTED, linewidth=0.8, linestyle=":", label="even")
        ax.set(title=f"{routing[0]} routing", xlabel="group, the most used first", xticks=places)
    grid[0].set_ylabel("share of the decisions")
    legend_below(drawn, 2)
    save(drawn, path)


def write_report(path: Path) -> None:
    """Write the table beside the results, and the figure that a set has."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    is_comparison = path.stem == "routing-pays"
    first = rows[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    commits = ", ".join(sorted({row["commit"][:10] for row in rows}))
    text = (
        f"{pays(rows) if is_comparison else balance(rows)}\n\n"
        f"all-MiniLM-L6-v2, four domains of rated sentences, {first['train']} training and {first['test']} test "
        f"sentences each, {first['epochs']} epochs of batches of {first['batch']}, learning rate "
        f"{first['learning_rate']:g}, t = p = 2; ± is a 95 % confidence interval over seeds. {first['device']}, one "
        f"thread; {versions}; commit {commits}.\n"
    )
    path.with_suffix(".md").write_text(text)
    if is_comparison:
        maps(rows, path.with_suffix(".svg"))
    if path.stem == "routing-starts":
        loads(rows, path.with_suffix(".svg"))
    print(text)
