"""Make the table and the figure of the adapters' benchmark from its result files alone.

python -m benchmarks.report benchmarks/results/stack-cpu-float32.json

Several files also give one table of what they say together, ``single-layers.md`` beside the first of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.drawing import OTHERS, OURS, panels, save

BASE, PEER = "frozen", "PEFT LoRA"


def _ratios(methods: dict[str, Any], kind: str, clock: str) -> dict[str, float]:
    """Divide each method's overhead over the frozen model by LoRA's."""
    key = f"{clock}_overhead_ms"
    return {name: values[kind][key] / methods[PEER][kind][key] for name, values in methods.items() if name != BASE}


HEAD = [
    "method",
    "training step, ms",
    "overhead ÷ LoRA's",
    "inference, ms",
    "overhead ÷ LoRA's",
    "rounds",
    "kept, MiB",
    "kept beyond frozen ÷ LoRA's",
    "Mmult-adds beyond frozen, forward",
    "backward",
    "÷ formula",
    "operators beyond frozen, per layer",
    "once",
]


def _agreement(values: dict[str, Any], base: dict[str, Any]) -> str:
    """Divide the measured multiply-adds beyond the frozen model by the formula's, forward and backward together."""
    if values["formula"] is None:
        return ""
    names = ("multiply_adds", "multiply_adds_backward")
    return f"{sum(values[name] - base[name] for name in names) / sum(values['formula'].values()):.4f}"


def table(report: dict[str, Any], clock: str) -> str:
    """Write the Markdown table of one result file."""
    methods, options = report["methods"], report["options"]
    layers = report["adapted_layers"] / options["depth"]
    ratios = {kind: _ratios(methods, kind, clock) for kind in ("training", "inference")}
    base, peer = methods[BASE], methods[PEER]
    on_device = any(values["peak_memory"] for values in methods.values())
    head = [*HEAD, *(["peak memory, MiB"] if on_device else [])]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, values in methods.items():
        beyond = {key: values[key] - base[key] for key in values if isinstance(values[key], int)}
        row = [name]
        for kind in ("training", "inference"):
            row += [f"{values[kind][f'{clock}_ms']:.1f}", f"{ratios[kind][name]:.2f}" if name != BASE else ""]
        row += [f"{values['training']['rounds']}, {values['inference']['rounds']}"]
        row += [f"{values['kept_bytes'] / 2**20:.1f}"]
        if name == BASE:
            row += [""] * 6
        else:
            row += [f"{beyond['kept_bytes'] / (peer['kept_bytes'] - base['kept_bytes']):.3f}"]
            row += [f"{beyond[key] / 1e6:.1f}" for key in ("multiply_adds", "multiply_adds_backward")]
            row += [_agreement(values, base)]
            row += [f"{beyond['operators_per_block'] / layers:.0f}", f"{beyond['operators_once']}"]
        row += [f"{values['peak_memory'] / 2**20:.0f}"] if on_device else []
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def caption(report: dict[str, Any], clock: str) -> str:
    """Say in one line what was measured, on which device and with which versions."""
    options, versions = report["options"], report["versions"]
    shape = f"{options['samples']}×{options['tokens']} tokens, d = {options['width']}, rank {options['rank']}"
    libraries = f"torch {versions['torch']}, peft {versions['peft']}"
    model = f"{options['model']}, depth {options['depth']}, {options['dtype']}"
    where = f"{report['device']}, {options['threads']} thread(s), {clock} clock, medians"
    return f"{model}; {shape}; {where}; {libraries}; seed {options['seed']}, commit {(report['commit'] or '?')[:10]}"


SUMMARY = {
    "LoRA ÷ frozen": (PEER, BASE),
    **{f"{name} ÷ LoRA": (name, PEER) for name in ("tucka batch", "tucka sample", "tucka token")},
    "PEFT HRA ÷ tucka HRA": ("PEFT HRA", "tucka HRA"),
}


def summary(reports: Sequence[dict[str, Any]], clock: str) -> str:
    """Write how the overheads of the methods compare in all reports; that of the frozen model is its whole time."""
    lines = [f"| | {' | '.join(SUMMARY)} |", "|---|" + "---:|" * len(SUMMARY)]
    for report in sorted(reports, key=lambda one: _size(one)):
        methods, options = report["methods"], report["options"]
        layers = report["adapted_layers"]
        for kind in ("training", "inference"):
            cells = []
            for name, other in SUMMARY.values():
                if name not in methods:
                    cells.append("")
                    continue
                below = methods[other][kind][f"{clock}_ms" if other == BASE else f"{clock}_overhead_ms"]
                cells.append(f"{methods[name][kind][f'{clock}_overhead_ms'] / below:.2f}")
            title = f"{options['model']}, {layers} layers, {options['samples']}×{options['tokens']} tokens, {kind}"
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _size(report: dict[str, Any]) -> tuple[str, int, int]:
    options = report["options"]
    return options["model"], options["samples"] * options["tokens"], report["adapted_layers"]


def figure(report: dict[str, Any], clock: str, path: Path) -> None:
    """Draw overheads of a training step and of inference, as bars on one logarithmic axis."""
    methods = [name for name in report["methods"] if name != BASE]
    drawn, (axes,) = panels(columns=2, height=0.32 * len(methods) + 1.4, sharey=True)
    for ax, kind in zip(axes, ("training", "inference"), strict=True):
        ratios = _ratios(report["methods"], kind, clock)
        colors = [OURS if name.startswith("tucka") else OTHERS for name in methods]
        shown = [max(ratios[name], 0.05) for name in methods]
        ax.barh(methods, shown, color=colors)
        for row, name in enumerate(methods):
            # Right of the axes, where neither a bar nor the line at one crosses a number.
            ax.text(1.02, row, f"{ratios[name]:.2f}", va="center", transform=ax.get_yaxis_transform())
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set(xscale="log", title="training step" if kind == "training" else kind, xlim=(0.05, 1.3 * max(shown)))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    drawn.supxlabel("time beyond the frozen model, ÷ LoRA's", fontsize="medium")
    save(drawn, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    options = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in options.results]
    if len(reports) > 1:
        options.results[0].with_name("single-layers.md").write_text(summary(reports, options.clock))
    for path, report in zip(options.results, reports, strict=True):
        text = f"{table(report, options.clock)}\n\n{caption(report, options.clock)}\n"
        path.with_suffix(".md").write_text(text)
        figure(report, options.clock, path.with_suffix(".svg"))
        print(text)


if __name__ == "__main__":
    main()
