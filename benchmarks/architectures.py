"""The tables of the sweep over architectures, from its result file alone: ``python -m benchmarks.architectures``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "TUCKA", "exceptions", "summary", "write_table"]

RESULTS = Path(__file__).parent / "results" / "architectures.json"
LORA, TUCKA = "lora", ("batch", "sample", "token")
KINDS = {
    "encoder": "Encoders of text",
    "causal": "Decoders of text",
    "encoder-decoder": "Encoder-decoders",
    "vision": "Images and videos",
    "audio": "Sound",
    "multimodal": "Text with images or sound",
    "timm": "timm",
    "diffusers": "diffusers",
    "plain torch": "Plain torch",
}
_WORDS = {"adding": "adding it", "start": "a forward", "training": "training"}


def exceptions(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Return what does not work on one architecture, by method and check."""
    return {method: found[method] for method in (LORA, *TUCKA) if found[method]}


def _works(found: dict[str, Any]) -> bool:
    """Tell whether all routings work; what the base or LoRA raises too is no matter of routings."""
    return not any(found[method] for method in TUCKA)


def headline(report: dict[str, Any]) -> str:
    """Say in how many architectures all works."""
    rows = list(report["families"].values())
    fine, lora = sum(_works(found) for found in rows), sum(not found[LORA] for found in rows)
    refused = [found for found in rows if found["why"]]
    only = sum(not (found[LORA].keys() & _checks(found)) for found in refused)
    return (
        f"Batch, sample and token routing pass all checks on **{fine} of {len(rows)}** architectures, LoRA on {lora}. "
        f"On {len(refused)} some routing or step is refused: an error names the layer and the cure, and it does not "
        f"depend on the sizes of the inputs. On {only} of these {len(refused)} LoRA passes the same step."
    )


def _checks(found: dict[str, Any]) -> set[str]:
    return {check for method in TUCKA for check in found[method]}


def summary(report: dict[str, Any]) -> str:
    """Write how many architectures of each kind work, by method."""
    lines = ["| kind | architectures | LoRA | batch | sample | token | all-linear |", "|---|---|---|---|---|---|---|"]
    for kind, title in KINDS.items():
        if not _has(report, kind):
            continue
        rows = [found for found in report["families"].values() if found["kind"] == kind]
        counts = [sum(not found[method] for found in rows) for method in (LORA, *TUCKA)]
        linear = sum(found.get("all-linear") == "works" for found in rows)
        cells = [str(count) for count in counts] + [str(linear) if kind != "plain torch" else "-"]
        lines.append(f"| {title} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _has(report: dict[str, Any], kind: str) -> bool:
    return any(found["kind"] == kind for found in report["families"].values())


def _section(report: dict[str, Any], kind: str) -> str:
    rows = {name: found for name, found in report["families"].items() if found["kind"] == kind}
    fine = [_named(name, found) for name, found in rows.items() if _works(found)]
    lines = [f"**{KINDS[kind]}.** Batch, sample and token routing pass all checks: {', '.join(fine)}."]
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, found in rows.items():
        if not _works(found):
            for cells in _cells(found):
                groups.setdefault(cells, []).append(name)
    if groups:
        lines += ["", "| architectures | does not work | LoRA | why |", "|---|---|---|---|"]
        lines += [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in groups.items()]
    return "\n".join(lines)


def _named(name: str, found: dict[str, Any]) -> str:
    return f"{name}\\*" if found[LORA] else name


def _cells(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return what does not work, whether LoRA does, and why, in as few lines as there are reasons."""
    by_reason: dict[tuple[str, str], dict[str, list[str]]] = {}
    for method in TUCKA:
        for check in found[method]:
            why = found["why"].get(f"{method}, {check}", "The same error without tucka.")
            lora = found[LORA].get(check, "works")
            lora = lora if lora == "works" else "does not work"
            by_reason.setdefault((lora, why), {}).setdefault(_WORDS.get(check, check), []).append(method)
    lines = []
    for (lora, why), checks in by_reason.items():
        each = "; ".join(f"{check} ({', '.join(methods)})" for check, methods in checks.items())
        lines.append((each, lora, why))
    return lines


def write_table(path: Path = RESULTS) -> None:
    """Write the tables beside a result file."""
    report = json.loads(path.read_text("utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    parts = [headline(report), summary(report), *(_section(report, kind) for kind in KINDS if _has(report, kind))]
    hidden = ", ".join(name for name, found in report["families"].items() if found["hidden"]) or "none"
    absent = f" Not run: {', '.join(report['not run'])} (not installed)." if report["not run"] else ""
    parts.append(f"Of {hidden} the tiny base hides what LoRA and TuckA do: no check of a route can tell there.")
    parts.append(f"\\* LoRA itself fails in some check.{absent}")
    parts.append(f"{versions}; {report['commit']}.")
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n", "utf-8")


if __name__ == "__main__":
    write_table()
