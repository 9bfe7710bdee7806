"""Make the tables of `benchmarks.gpu.run` from its result file alone: ``python -m benchmarks.gpu.report FILE``."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import decoding_report
from benchmarks.provenance import short
from benchmarks.turns import OVER

TARGET = 1.10  # of a training step, beside the frozen one
MIB = 2**20


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(head)
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _tests(found: dict[str, Any]) -> str:
    return f"{'All passed' if found['passed'] else '**Failed**'}: {found['output'][-1] if found['output'] else ''}"


def _decoder(found: dict[str, Any]) -> str:
    return decoding_report.text(found).strip()


def _step(found: dict[str, Any]) -> str:
    samples, tokens = found["shape"]
    rows = []
    for name, turns in found["times"].items():
        ratio = statistics.median(turn[0] / (turn[0] - turn[OVER]) for turn in turns.values())
        peak = found["peak"].get(name)
        verdict = "" if name == "frozen" else "met" if ratio <= TARGET else "**missed**"
        milliseconds = 1e3 * statistics.median(turn[0] for turn in turns.values())
        cells = [name, f"{milliseconds:.1f}", f"{ratio:.3f}", verdict, f"{peak / MIB:.0f}" if peak else "not run"]
        rows.append(cells)
    head = (f"{samples}×{tokens} tokens", "step, ms", "÷ frozen step", f"target {TARGET:.2f}", "peak memory, MiB")
    return _table(head, rows)


def _memory(found: dict[str, Any]) -> str:
    rows = []
    for name, one in found.items():
        kept, peak = (
            f"{one[key] / MIB:.0f}" if key in one else one.get("not run", "not run") for key in ("kept", "peak")
        )
        rows.append([name, kept, peak, f"{one['paper']}" if "paper" in one else ""])
    return _table(("row of Table 2", "kept for the backward, MiB", "peak of a step, MiB", "the paper's peak, MB"), rows)


def _reads(found: dict[str, Any]) -> str:
    rows = []
    for name in next(iter(found.values())):
        cells = [name]
        for counts in found.values():
            beyond = [own - base for own, base in zip(counts[name], counts["frozen"], strict=True)]
            cells.append(", ".join(map(str, beyond)))
        rows.append(cells)
    head = ("numbers read, and on CUDA waits, beyond the base", *found)
    return _table(head, rows)


def _pairs(found: dict[str, Any], second: str) -> str:
    rows = []
    for name, one in found.items():
        if "not run" in one:
            rows.append([name, "not run", one["not run"], "", "", ""])
            continue
        cells = [f"{1e3 * one['eager']:.2f}", f"{1e3 * one[second]:.2f}", f"{one['eager'] / one[second]:.2f}"]
        rows.append([name, *cells, f"{one['difference']:.1e}", str(one.get("breaks", ""))])
    head = ("forward, 1×32", "eager, ms", f"{second}, ms", "times faster", "largest difference", "graph breaks")
    return _table(head, rows)


def _quality(found: dict[str, Any]) -> str:
    lines = "\n".join(found["output"])
    return f"{found['finished']} runs finished:\n\n```text\n{lines}\n```"


_WRITERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tests": _tests,
    "decoder": _decoder,
    "step": _step,
    "memory": _memory,
    "reads": _reads,
    "graphs": lambda found: _pairs(found, "graph"),
    "compiled": lambda found: _pairs(found, "compiled"),
    "quality": _quality,
}
TITLES = {
    "tests": "Tests marked for CUDA",
    "step": "A training step beside the frozen one: Llama-2-7B's layers, r = 32 on query and value",
    "memory": "Memory of a training step: ViT-base, batches of 32, the rows of the paper's Table 2",
    "reads": "What is read back to the host",
    "graphs": "CUDA graphs",
    "compiled": "torch.compile",
    "quality": "Quality at full size",
}


def text(report: dict[str, Any]) -> str:
    """Write all sections; what was not run or failed is said in the place of its table."""
    about = report["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    parts = [f"{about['device']}; {versions}; {short(about['commit'])}."]
    if about["options"]["tiny"]:
        parts.append("**Tiny sizes, to see that the code works: no number here says anything about speed.**")
    for name, one in report["sections"].items():
        parts.append(f"**{TITLES.get(name, name)}**")
        if "found" in one:
            parts.append(_WRITERS[name.split()[0]](one["found"]))
        else:
            parts += [f"{key.capitalize()}: {value}" for key, value in one.items()]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    path.with_suffix(".md").write_text(text(json.loads(path.read_text("utf-8"))), "utf-8")


if __name__ == "__main__":
    main()
