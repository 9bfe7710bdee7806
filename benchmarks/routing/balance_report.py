"""The table and the figure of the load at the start, from its result file alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.drawing import OTHERS, SERIES, panels, save
from tucka.core.balance import load_entropy

__all__ = ["ceiling", "write_report"]


def ceiling(routings: int, k: int) -> float:
    """Return the mean load entropy of so many choices at random."""
    return 1 - (k - 1) / (2 * routings * math.log(k))


def summary(report: dict[str, Any]) -> dict[tuple[str, str], dict[tuple[str, int], tuple[float, float, float]]]:
    """Return mean entropy, least entropy and least share of a group, by router and routing, then by source and k."""
    found: dict[tuple[str, str], dict[tuple[str, int], tuple[float, float, float]]] = {}
    for row in report["rows"]:
        found.setdefault((row["router"], row["routing"]), {})[row["source"], row["k"]] = _figures(row["loads"])
    return found


def _figures(loads: list[list[int]]) -> tuple[float, float, float]:
    entropies = [load_entropy(load) for load in loads]
    return float(np.mean(entropies)), min(entropies), min(min(load) / sum(load) for load in loads)


def table(report: dict[str, Any], routing: str) -> str:
    found = {router: cells for (router, kind), cells in summary(report).items() if kind == routing}
    places = list(next(iter(found.values())))
    lines = [f"| router | {' | '.join(f'{source}, k = {k}' for source, k in places)} |"]
    lines.append("|---" * (len(places) + 1) + "|")
    for router, cells in found.items():
        lines.append(f"| {router} | {' | '.join(f'{cells[place][0]:.3f}' for place in places)} |")
    routed = {(row["source"], row["k"]): sum(row["loads"][0]) for row in report["rows"] if row["routing"] == routing}
    chance = " | ".join(f"{ceiling(routed[place], place[1]):.3f}" for place in places)
    lines.append(f"| *ceiling of chance* | {chance} |")
    default = next(router for router in found if "default" in router)
    worst = [f"{found[default][place][1]:.3f} / {found[default][place][2]:.1%}" for place in places]
    lines.append(f"| *default: least entropy / least share of a group, any seed* | {' | '.join(worst)} |")
    return "\n".join(lines)


def ranges(report: dict[str, Any]) -> str:
    """Write for each router the least and the largest mean entropy over sources and k."""
    found = summary(report)
    lines = ["| router | batch routing | sample routing |", "|---|---|---|"]
    for router in dict.fromkeys(router for router, _ in found):
        lines.append(f"| {router} | {_range(found[router, 'batch'])} | {_range(found[router, 'sample'])} |")
    by_chance = {routing: [] for routing in ("batch", "sample")}
    for row in report["rows"]:
        by_chance[row["routing"]].append(ceiling(sum(row["loads"][0]), row["k"]))
    cells = (f"{min(values):.3f} to {max(values):.3f}" for values in by_chance.values())
    return "\n".join([*lines, f"| *as many choices at random* | {' | '.join(cells)} |"])


def _range(cells: dict[tuple[str, int], tuple[float, float, float]]) -> str:
    means = [mean for mean, _, _ in cells.values()]
    return f"{min(means):.3f} to {max(means):.3f}"


def figure(report: dict[str, Any], path: Path) -> None:
    found = summary(report)
    routers = list(dict.fromkeys(router for router, _ in found))
    drawn, (places,) = panels(columns=2, height=0.3 * len(routers) + 1.3, sharey=True)
    for ax, routing in zip(places, ("batch", "sample"), strict=True):
        for row, router in enumerate(routers):
            values = [cell[0] for cell in found[router, routing].values()]
            shade = SERIES[0] if "default" in router else OTHERS
            ax.plot(values, [row] * len(values), "|", color=shade, markersize=9, markeredgewidth=1.6, alpha=0.8)
            ax.plot(np.mean(values), row, "o", color=shade, markersize=6)
        ax.axvline(0.9 if routing == "batch" else 0.95, color=SERIES[1], linestyle="--", linewidth=1)
        ax.set(title=f"{routing} routing", xlim=(0, 1.02))
        ax.set_yticks(range(len(routers)), routers)
        ax.grid(axis="x", alpha=0.3, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    ax.invert_yaxis()
    drawn.supxlabel("mean load entropy at the start", fontsize="medium")
    save(drawn, path)


def write_report(path: Path) -> None:
    """Write the table and the figure beside the results."""
    report = json.loads(path.read_text())
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    text = [f"Mean load entropy over {report['seeds']} seeds, at the start, on samples that no router has seen."]
    for routing in ("batch", "sample"):
        text += [f"\n{routing.capitalize()} routing:\n", table(report, routing)]
    text.append(
        f"\nRouters start from {report['batches']} batches of {report['batch']} samples; the others are routed, in "
        f"batches of {report['batch']} that mix labels for batch routing. {report['device']}; {versions}; commit "
        f"{report['commit'][:10]}."
    )
    path.with_name(f"{path.stem}-ranges.md").write_text(ranges(report) + "\n")
    path.with_suffix(".md").write_text("\n".join(text) + "\n")
    figure(report, path.with_suffix(".svg"))
    print("\n".join(text))
