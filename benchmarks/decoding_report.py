"""Make the tables and the figure of a run of `benchmarks.decoding` from its result file alone.

python -m benchmarks.decoding_report benchmarks/results/decoding-smollm2-135m-cpu-float32.json
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.adapted_models import METHODS
from benchmarks.drawing import OTHERS, panels, save
from benchmarks.drawing import OURS as OUR_COLOUR
from benchmarks.provenance import short
from benchmarks.regimes import NEW, PROMPT, REGIMES
from benchmarks.turns import CLOCKS, OVER, warning, write_again, write_beside

BASE, PEER, OURS = "frozen", "PEFT LoRA", "tucka"
SLOW, FAST = "PEFT HRA", "PEFT HRA, accelerated"
DRAWS = 2000  # of rounds, with replacement
SHOWN = (0.05, 20)  # in the figure; what is larger is written there as a number

Ratio = tuple[float, float, float]  # median; 5th and 95th percentile


def clock_of(report: dict[str, Any]) -> str:
    """Choose the processor's clock on a CPU, which other programs disturb less, and the wall's on a device."""
    return "processor" if report["about"]["options"]["device"] == "cpu" else "wall"


def _column(report: dict[str, Any], regime: str, method: str, place: int) -> dict[str, float]:
    place += CLOCKS.index(clock_of(report))
    return {number: turn[place] for number, turn in report["times"][regime][method].items()}


def overhead(report: dict[str, Any], regime: str, method: str) -> dict[str, float]:
    """Return a method's time beyond the base's, in seconds, for each of its rounds."""
    return _column(report, regime, method, OVER)


def ratio(report: dict[str, Any], regime: str, method: str) -> Ratio:
    """Divide the median overhead by LoRA's; the spread is that of the ratio over rounds drawn at random."""
    sides = [overhead(report, regime, name) for name in (method, PEER)]
    both = [number for number in sides[0] if number in sides[1]]
    own, peer = (np.array([side[number] for number in both]) for side in sides)
    drawn = np.random.default_rng(0).integers(len(both), size=(DRAWS, len(both)))
    ratios = np.median(own[drawn], axis=1) / np.median(peer[drawn], axis=1)
    low, high = np.percentile(ratios, [5, 95])
    return float(np.median(own) / np.median(peer)), float(low), float(high)


def methods_of(report: dict[str, Any]) -> list[str]:
    """List what was compared; the base beside itself shows what the noise is."""
    return [name for name in METHODS if any(name in one for one in report["times"].values())]


def _rows(report: dict[str, Any], cell: Callable[[Ratio], str]) -> str:
    """Write one line for each regime, with a cell for each method."""
    methods = methods_of(report)
    names = ["base again" if name == BASE else name for name in methods]
    head = ["", "base, ms", "LoRA beyond it, ms", *names]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for regime, times in report["times"].items():
        base = 1e3 * statistics.median(_column(report, regime, BASE, 0).values())
        beyond = 1e3 * statistics.median(overhead(report, regime, PEER).values())
        cells = [cell(ratio(report, regime, name)) if name in times else "" for name in methods]
        lines.append(f"| {REGIMES[regime].title} | {base:.1f} | {beyond:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(report: dict[str, Any]) -> str:
    """Write the time of each method beyond the base, divided by LoRA's: medians."""
    return _rows(report, lambda found: f"{found[0]:.2f}")


def spread(report: dict[str, Any]) -> str:
    """Write the 5th and the 95th percentile of the same ratios."""
    return _rows(report, lambda found: f"{found[1]:.2f} to {found[2]:.2f}")


def losses(report: dict[str, Any]) -> str:
    """Name every regime in which a tucka adapter takes longer than LoRA."""
    lines = []
    for method in methods_of(report):
        if method.startswith(OURS):
            found = {name: ratio(report, name, method)[0] for name, one in report["times"].items() if method in one}
            slow = [f"{REGIMES[name].title} ({value:.2f})" for name, value in found.items() if value > 1]
            lines.append(f"- {method} is slower than LoRA in: {'; '.join(slow) or 'no regime'}")
    return "\n".join([*lines, *_accelerated(report)])


def _accelerated(report: dict[str, Any]) -> list[str]:
    """Say how many times as long PEFT's own HRA takes in all, the base included."""
    found = []
    for regime, times in report["times"].items():
        if SLOW in times and FAST in times:
            own, fast = (statistics.median(_column(report, regime, name, 0).values()) for name in (SLOW, FAST))
            found.append(f"{REGIMES[regime].title} ({own / fast:.1f})")
    return [f"- {SLOW} takes this many times as long as {FAST}, the base included: {'; '.join(found)}"] if found else []


def caption(report: dict[str, Any]) -> str:
    """Say what was measured, on which machine and with which versions."""
    about = report["about"]
    options, versions = about["options"], about["versions"]
    model = (
        f"Llama, {options['sizes']} sizes, {options['layers']} layers, all linear layers adapted, r = {options['rank']}"
    )
    where = f"{about['device']}, {options['threads']} thread(s), {options['dtype']}, {clock_of(report)} time"
    rounds = f"up to {report['repeats']} rounds, load {report['load_average']:.1f}"
    with_ = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
    generated = f"A generation has {PROMPT} tokens of prompt and {NEW} new ones"
    return (
        f"Time beyond the base, ÷ LoRA's, medians. {generated}. {model}. {where}; {rounds}; "
        f"{with_}; commit {short(about['commit'])}."
    )


def figure(report: dict[str, Any], path: Path) -> None:
    """Draw the ratios with their spread, one panel for each regime, on a logarithmic axis."""
    regimes, methods = list(report["times"]), [name for name in methods_of(report) if name not in (BASE, PEER)]
    columns = min(3, len(regimes))
    rows = -(-len(regimes) // columns)
    drawn, axes = panels(rows, columns, height=rows * (0.24 * len(methods) + 0.6) + 0.5, sharex=True, sharey=True)
    for ax in axes.flat[len(regimes) :]:
        ax.axis("off")
    for ax, regime in zip(axes.flat, regimes, strict=False):
        for place, method in enumerate(methods):
            if method not in report["times"][regime]:
                continue
            found = ratio(report, regime, method)
            middle, low, high = (min(max(value, SHOWN[0]), SHOWN[1]) for value in found)
            color = OUR_COLOUR if method.startswith(OURS) else OTHERS
            ax.plot([low, high], [place, place], color=color, linewidth=2, alpha=0.5)
            ax.plot(middle, place, "o", color=color, markersize=5, clip_on=False)
            if found[0] > SHOWN[1]:
                ax.text(middle * 0.8, place, f"{found[0]:.0f}", ha="right", va="center")
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set(xscale="log", xlim=SHOWN, yticks=range(len(methods)), yticklabels=methods)
        ax.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
        ax.set_title(REGIMES[regime].title.replace(", two", ",\ntwo"))
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes.flat[max(0, len(regimes) - columns) : len(regimes)]:  # those with no panel below them
        ax.tick_params(labelbottom=True)
    axes[0, 0].invert_yaxis()
    drawn.supxlabel("time beyond the base, ÷ LoRA's", fontsize="medium")
    save(drawn, path)


def text(report: dict[str, Any]) -> str:
    """Write all tables."""
    parts = [table(report), losses(report), caption(report), "5th to 95th percentile:", spread(report)]
    if report["too_large"]:
        parts.insert(2, f"Too large for the device's memory: {'; '.join(report['too_large'])}.")
    return warning(report) + "\n\n".join(parts) + "\n"


def write(path: Path) -> None:
    """Write tables and figure beside a result file."""
    write_beside(path, text, figure)


if __name__ == "__main__":
    write_again((__doc__ or "").splitlines()[0], write)
