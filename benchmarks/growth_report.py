"""Make the tables and the figure of `benchmarks.growth` from its result file alone.

python -m benchmarks.growth_report benchmarks/results/growth-cpu.json
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.drawing import OTHERS, OURS, SERIES, legend_below, panels, save
from benchmarks.provenance import short
from benchmarks.turns import CLOCKS, OVER, warning, write_again, write_beside
from tucka import count_flops, count_parameters

AXES: dict[str, tuple[int, ...]] = {
    "layers": (2, 4, 8, 16, 32, 48),
    "groups": (1, 2, 4, 8, 16, 32, 64),
    "rank": (2, 4, 8, 16, 32, 64, 128),
    "tokens": (1, 4, 16, 64, 256, 1024, 4096),
    "samples": (1, 2, 4, 8, 16, 32, 64),
}
SYMBOLS = {"layers": "L", "groups": "k", "rank": "r", "tokens": "tokens", "samples": "batch"}
KINDS = ("forward", "training step")
BASE, PEER = "frozen", "PEFT LoRA"
COLORS = {PEER: OTHERS, "tucka batch": OURS, "tucka sample": SERIES[1], "tucka token": SERIES[6]}


def overhead(report: dict[str, Any], name: str, kind: str, method: str) -> float:
    """Return the median time beyond the base's, in milliseconds."""
    clock = CLOCKS.index("processor" if report["about"]["options"]["device"] == "cpu" else "wall")
    turns = report["times"][f"{name}, {kind}"][method].values()
    return 1e3 * statistics.median(turn[OVER + clock] for turn in turns)


def sizes_of(point: dict[str, int], width: int, method: str) -> tuple[str, list[tuple[int, int]], dict[str, Any]]:
    """Say what `tucka.count_...` is to count."""
    layers = [(width, width)] * point["layers"]
    if method == PEER:
        return "lora", layers, {"r": point["rank"]}
    routing = method.removeprefix("tucka ")
    return "tucka", layers, {"r": point["rank"], "k": point["groups"], "routing": routing}


def multiply_adds(report: dict[str, Any], name: str, kind: str, method: str) -> int:
    """Count what a method adds to the base, by `tucka.count_flops`."""
    point = report["points"][name]
    counted, layers, sizes = sizes_of(point, report["about"]["options"]["width"], method)
    sizes |= {"tokens": point["samples"] * point["tokens"], "samples": point["samples"]}
    total = count_flops(counted, layers, **sizes)
    return total + count_flops(counted, layers, backward=True, **sizes) if kind == "training step" else total


def fitted(report: dict[str, Any], kind: str, method: str) -> tuple[list[float], dict[str, float], float]:
    """Fit the times of all points by four costs: once, per layer, per million of inputs' numbers and multiply-adds."""
    # Returns the costs in milliseconds, the fitted times, and by what factor half of the points differ from theirs.
    width, rows, times = report["about"]["options"]["width"], [], []
    for name, point in report["points"].items():
        numbers = point["layers"] * point["samples"] * point["tokens"] * width
        rows.append([1, point["layers"], 1e-6 * numbers, 1e-6 * multiply_adds(report, name, kind, method)])
        times.append(max(overhead(report, name, kind, method), 1e-3))
    costs, _ = nnls(np.array(rows) / np.array(times)[:, None], np.ones(len(times)))  # the relative errors
    lines = np.array(rows) @ costs
    factor = float(np.exp(np.median(np.abs(np.log(np.maximum(lines, 1e-9) / times)))))
    return costs.tolist(), dict(zip(report["points"], lines.tolist(), strict=True)), factor


def _methods(report: dict[str, Any]) -> list[str]:
    return [name for name in COLORS if name in next(iter(report["times"].values()))]


def tables(report: dict[str, Any]) -> str:
    """Write for each axis the counts and the measured overheads."""
    methods, width, parts = _methods(report), report["about"]["options"]["width"], []
    for axis in dict.fromkeys(name.partition("=")[0] for name in report["points"]):
        head = [SYMBOLS[axis], "parameters", "M multiply-adds, sample", "token"]
        head += [f"{kind}, ms: {name}" if name == PEER else name for kind in KINDS for name in methods]
        lines = ["| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
        for name, point in report["points"].items():
            if name.partition("=")[0] != axis:
                continue
            counted, layers, sizes = sizes_of(point, width, "tucka sample")
            cells = [str(point[axis]), f"{count_parameters(counted, layers, **sizes):,}"]
            cells += [
                f"{1e-6 * multiply_adds(report, name, KINDS[0], f'tucka {one}'):.2f}" for one in ("sample", "token")
            ]
            cells += [f"{overhead(report, name, kind, method):.2f}" for kind in KINDS for method in methods]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def fits(report: dict[str, Any]) -> str:
    """Write which part of the time is fixed, which each layer takes, and which grows with the input and the sizes."""
    head = ["", "method", "once, ms", "each layer, µs", "each million of numbers of the layers' inputs, µs"]
    head += ["each million of multiply-adds, µs", "half of the points within"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for kind in KINDS:
        for method in _methods(report):
            (once, *others), _, factor = fitted(report, kind, method)
            cells = [kind, method, f"{once:.2f}", *(f"{1e3 * cost:.0f}" for cost in others), f"×{factor:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def caption(report: dict[str, Any]) -> str:
    """Say what was measured, on which machine and with which versions."""
    about = report["about"]
    options, versions = about["options"], about["versions"]
    return (
        f"Time beyond the base. 12 square layers of width {options['width']}, k = 4, t = p = 2, r = 8, 4 samples of 32 "
        f"tokens (1 sample along tokens), but for what the axis changes. {about['device']}, {options['threads']} "
        f"thread(s), medians of {report['repeats']} rounds, load {report['load_average']}; torch {versions['torch']}, "
        f"peft {versions['peft']}; {short(about['commit'])}."
    )


def text(report: dict[str, Any]) -> str:
    """Write all tables."""
    return warning(report) + "\n\n".join((fits(report), tables(report), caption(report))) + "\n"


def figure(report: dict[str, Any], path: Path) -> None:
    """Draw the measured overheads as points and the fitted ones as lines, one panel for each axis and kind."""
    axes = list(dict.fromkeys(name.partition("=")[0] for name in report["points"]))
    drawn, grid = panels(len(axes), 2, height=2 * len(axes) + 0.9, sharex="row", sharey="col")
    for column, kind in zip(grid.T, KINDS, strict=True):
        for method in _methods(report):
            _, lines, _ = fitted(report, kind, method)
            for panel, axis in zip(column, axes, strict=True):
                names = [name for name in report["points"] if name.partition("=")[0] == axis]
                values = [report["points"][name][axis] for name in names]
                measured = [overhead(report, name, kind, method) for name in names]
                panel.plot(values, measured, "o", color=COLORS[method], markersize=4, label=method)
                panel.plot(values, [lines[name] for name in names], color=COLORS[method], linewidth=1)
                panel.set(xscale="log", yscale="log")
                panel.spines[["top", "right"]].set_visible(False)
        column[0].set_title(f"{kind}, ms beyond the base")
    for row, axis in zip(grid, axes, strict=True):
        for panel in row:
            panel.set_xscale("log", base=2)
            panel.set_xlabel(SYMBOLS[axis])
    legend_below(drawn, len(COLORS))
    save(drawn, path)


def write(path: Path) -> None:
    """Write tables and figure beside a result file."""
    write_beside(path, text, figure)


if __name__ == "__main__":
    write_again((__doc__ or "").splitlines()[0], write)
