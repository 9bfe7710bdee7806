"""Count the lines and files of the package at two commits, and follow x through the calls of a forward.

python -m benchmarks.structure                  # BEFORE and the last commit, by default
python -m benchmarks.structure --after COMMIT   # writes benchmarks/results/structure.json and structure.md
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import tokenize
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "structure.json"
BEFORE = "ef46406"
KINDS = ("code", "docstring", "comment", "blank")
_LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def lines_by_kind(text: str) -> dict[str, int]:
    """Count a module's lines; a line of a docstring is one even if it is blank."""
    total = len(text.splitlines())
    kinds: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            kinds.setdefault(token.start[0], "comment")
        elif token.type not in _LAYOUT:
            kinds.update(dict.fromkeys(range(token.start[0], token.end[0] + 1), "code"))
    for first, last in _docstrings(ast.parse(text)):
        kinds.update(dict.fromkeys(range(first, last + 1), "docstring"))
    counts = Counter(kinds.get(line, "blank") for line in range(1, total + 1))
    return {kind: counts[kind] for kind in KINDS}


def _docstrings(tree: ast.AST) -> Iterator[tuple[int, int]]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield first.lineno, first.end_lineno or first.lineno


def rooms(package: Path) -> dict[str, dict[str, int]]:
    """Count files and lines of each folder, without those of the folders inside."""
    found: dict[str, dict[str, int]] = {}
    for path in sorted(package.rglob("*.py")):
        room = found.setdefault(str(path.parent.relative_to(package.parent)), dict.fromkeys(("files", *KINDS), 0))
        room["files"] += 1
        for kind, count in lines_by_kind(path.read_text("utf-8")).items():
            room[kind] += count
    return found


def hops() -> list[str]:
    """List the calls between a user's call of an adapted model and the product x U, from the outermost on."""
    import peft
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    import tucka
    from tucka.peft import TuckAConfig

    x, found = torch.randn(2, 7), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            shapes = [tuple(value.shape) for value in args if isinstance(value, torch.Tensor)]
            if shapes == [(2, 7), (7, 3)]:
                found.append([frame for frame, _ in traceback.walk_stack(None)][::-1])
            return operator(*args, **(kwargs or {}))

    config = TuckAConfig(r=3, routing="batch", target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(7, 5)), config).eval()
    with Watch():
        model(x)
    ours = Path(tucka.__file__).parent
    names = ["PeftModel.forward"]
    for frame in found[0]:
        path = Path(frame.f_code.co_filename)
        if ours in path.parents:
            names.append(f"{path.stem}.{frame.f_code.co_qualname}")
    return names


def measure(commit: str) -> dict[str, Any]:
    """Measure the package as it is at a commit."""
    full = subprocess.check_output(["git", "rev-parse", commit], cwd=ROOT, text=True).strip()
    archive = subprocess.check_output(["git", "archive", full, "tucka"], cwd=ROOT)
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(scratch, filter="data")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([scratch, str(ROOT)])}
        command = [sys.executable, "-W", "ignore", "-P", "-m", "benchmarks.structure", "--hops"]
        output = subprocess.check_output(command, cwd=scratch, env=environment, text=True)
        return {"commit": full, "rooms": rooms(Path(scratch) / "tucka"), "hops": json.loads(output)}


def total(measured: dict[str, Any]) -> dict[str, int]:
    """Add up the rooms."""
    return {kind: sum(room[kind] for room in measured["rooms"].values()) for kind in ("files", *KINDS)}


def table(report: dict[str, Any]) -> str:
    """Write the lines of the whole package by kind, then files and lines of code by room."""
    sides = (report["before"], report["after"])
    lines = ["| lines | before | | after | |", "|---|---:|---:|---:|---:|"]
    sums = [total(side) for side in sides]
    wholes = [sum(counts[kind] for kind in KINDS) for counts in sums]
    for kind in KINDS:
        cells = [f"{s[kind]:,} | {s[kind] / whole:.0%}" for s, whole in zip(sums, wholes, strict=True)]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += [f"| all | {wholes[0]:,} | | {wholes[1]:,} | |", ""]
    lines += ["| room | files before | lines of code | files after | lines of code |", "|---|---:|---:|---:|---:|"]
    for room in sorted({*sides[0]["rooms"], *sides[1]["rooms"]}):
        found = [side["rooms"].get(room) for side in sides]
        cells = [f"{one['files']} | {one['code']:,}" if one else " | " for one in found]
        lines.append(f"| `{room}/` | {' | '.join(cells)} |")
    cells = [f"{one['files']} | {one['code']:,}" for one in sums]
    lines.append(f"| all | {' | '.join(cells)} |")
    commits = [side["commit"][:10] for side in sides]
    return "\n".join([*lines, "", f"Commits {commits[0]} (before) and {commits[1]} (after).", ""])


def main() -> None:
    """Measure both commits; write the result and its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE)
    parser.add_argument("--after", default="HEAD")
    parser.add_argument("--hops", action="store_true", help="print the calls of the tucka that is imported, as JSON")
    chosen = parser.parse_args()
    if chosen.hops:
        print(json.dumps(hops()))
        return
    report = {"before": measure(chosen.before), "after": measure(chosen.after)}
    RESULT.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    RESULT.with_suffix(".md").write_text(table(report), "utf-8")


if __name__ == "__main__":
    main()
