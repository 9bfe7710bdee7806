"""Change the library in one place at a time, and see whether the tests that run this place notice.

Cosmic Ray makes the changes. The tests are those that coverage has seen in the changed function, by its contexts:
``make mutants`` measures them and runs this program.
"""

import argparse
import ast
import functools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
PACKAGES = ("tucka/core", "tucka/backends/torch", "tucka/peft")
# Tests for the first try, of as few files as possible, and for a second one of those that survive it.
FEW, FILES, MANY = 40, 3, 250
_SECONDS = 150


@dataclass(frozen=True)
class Mutant:
    """A change of one place: Cosmic Ray's operator, and which of its places in the file."""

    file: str
    line: int
    operator: str
    occurrence: int
    function: str


def mutants(file: Path) -> Iterator[Mutant]:
    """List the changes of a file, without those of annotations, which nothing evaluates, and of messages."""
    from cosmic_ray.commands.init import _all_work_items

    source = file.read_text("utf-8")
    for item in _all_work_items([file], {}):
        (found,) = item.mutations
        line, column = found.start_pos
        if any(start <= (line, column) < end for start, end in _spans(source)):
            continue
        place = str(file.relative_to(ROOT))
        yield Mutant(place, line, found.operator_name, found.occurrence, found.definition_name or "")


@functools.lru_cache(maxsize=4)
def _spans(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the beginnings and ends of annotations, of what only a type checker reads, and of messages."""
    found: list[Any] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(node.returns)
        elif isinstance(node, (ast.arg, ast.AnnAssign)):
            found.append(node.annotation)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            found.append(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("cast", "TypeVar", "expected"):
            found += node.args[:1] if ast.unparse(node.func) == "cast" else [node]
    return [
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)) for node in found if node is not None
    ]


class Covered:
    """Which tests have run which lines."""

    def __init__(self, file: Path) -> None:
        from coverage import CoverageData

        self.data = CoverageData(str(file))
        self.data.read()
        self.files = {name[name.rindex("/tucka/") + 1 :]: name for name in self.data.measured_files()}

    @functools.cache  # noqa: B019
    def tests_by_line(self, file: str) -> dict[int, set[str]]:
        """Return the tests of each line of a file."""
        lines = self.data.contexts_by_lineno(self.files[file]) if file in self.files else {}
        return {
            line: {each.partition("|")[0] for each in contexts if each.endswith("|run")}
            for line, contexts in lines.items()
        }

    def tests(self, mutant: Mutant) -> list[str]:
        """Return the tests of a changed line; of its function or file, where the line runs at import alone."""
        by_line = self.tests_by_line(mutant.file)
        found = by_line.get(mutant.line, set())
        if not found:
            found = {test for line in _function_around(mutant.file, mutant.line) for test in by_line.get(line, ())}
        return sorted(found)


@functools.cache
def _function_around(file: str, line: int) -> range:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    innermost = max(around, key=lambda node: node.lineno, default=None)
    return range(1, 10**6) if innermost is None else range(innermost.lineno, (innermost.end_lineno or 0) + 1)


def chosen(tests: list[str], generator: random.Random, *, few: bool) -> list[str]:
    """Choose some tests; for the first try of as few files as possible, each of which takes time to collect."""
    if not few:
        return generator.sample(tests, min(MANY, len(tests)))
    by_file: dict[str, list[str]] = {}
    for test in tests:
        by_file.setdefault(test.partition("::")[0], []).append(test)
    files = sorted(by_file, key=lambda file: (-len(by_file[file]), file))[: FILES - 1]
    files += generator.sample(sorted(set(by_file) - set(files)), min(1, len(by_file) - len(files)))
    pool = [test for file in files for test in by_file[file]]
    return generator.sample(pool, min(FEW, len(pool)))


class Copy:
    """A copy of the tracked files, in which places are changed; nothing is left of a change afterwards."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="mutants-"))
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
        for name in listed.stdout.split("\n"):
            if name and (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.root / name)

    def run(self, mutant: Mutant | None, tests: list[str]) -> tuple[int, str]:
        """Run tests with a change, or with none; return pytest's code, -1 after too long a time, and what failed."""
        file = None if mutant is None else self.root / mutant.file
        before = None if file is None else file.read_text("utf-8")
        if mutant is not None and file is not None:
            changed = _changed(file, mutant)
            if changed is None:
                return 0, ""
            file.write_text(changed, "utf-8")
        try:
            return self._forked(tests)
        finally:
            if file is not None and before is not None:
                file.write_text(before, "utf-8")

    def _forked(self, tests: list[str]) -> tuple[int, str]:
        """Run pytest in a fork of this process, which has imported what tests import, and nothing of the library."""
        output = self.root / "output.txt"
        child = os.fork()
        if child == 0:
            _run_here(self.root, output, tests)
        began = time.monotonic()
        while time.monotonic() - began < _SECONDS:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                failed = [
                    line for line in output.read_text("utf-8").splitlines() if line.startswith(("FAILED", "ERROR"))
                ]
                return os.waitstatus_to_exitcode(status), failed[0] if failed else ""
            time.sleep(0.02)
        os.kill(child, 9)
        os.waitpid(child, 0)
        return -1, "too long"


def _run_here(root: Path, output: Path, tests: list[str]) -> None:
    code = 3
    try:
        os.chdir(root)
        os.environ["PYTHONPATH"] = str(root)
        sys.dont_write_bytecode = True
        sys.path[:] = [str(root), *(place for place in sys.path if Path(place or ".").resolve() != ROOT)]
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        import pytest

        code = int(
            pytest.main(["-x", "-q", "-rfE", "--assert=plain", "-p", "no:cacheprovider", "--no-cov", "-m", "", *tests])
        )
    except BaseException:  # a fork ends here, whatever happens
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _changed(file: Path, mutant: Mutant) -> str | None:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    changed: str | None = mutate_code(file.read_text("utf-8"), get_operator(mutant.operator)(), mutant.occurrence)
    return changed


def preload() -> None:
    """Import what tests import, but for the library and JAX, which does not survive a fork."""
    import hypothesis
    import peft
    import pytest
    import scipy.linalg
    import torch

    sys.path.insert(0, str(ROOT / "tests"))
    import support.tiny_models

    torch.set_num_threads(1)
    assert all((hypothesis, peft, pytest, scipy, support))
    assert not any(name.partition(".")[0] in ("tucka", "jax") for name in sys.modules)


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coverage", type=Path, default=ROOT / ".coverage")
    parser.add_argument("--sample", type=int, default=200, help="how many changes to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="after which no new one is tried")
    given = parser.parse_args(arguments)
    covered, generator = Covered(given.coverage), random.Random(given.seed)
    files = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
    everything = [mutant for file in files for mutant in mutants(file)]
    sample = generator.sample(everything, min(given.sample, len(everything)))
    preload()
    copy, began, found = Copy(), time.monotonic(), []
    for mutant in sample:
        if time.monotonic() - began > 60 * given.minutes:
            break
        tests = covered.tests(mutant)
        result = {**asdict(mutant), "tests": len(tests), "outcome": "no tests", "by": ""}
        for few in (True, False) if tests else ():
            picked = chosen(tests, generator, few=few)
            code, by = copy.run(mutant, picked)
            outcome = {0: "survived", 1: "killed", 2: "killed", -1: "killed"}.get(code, f"code {code}")
            result.update(outcome=outcome, by=by, tried=len(picked))
            if outcome != "survived" or len(tests) <= len(picked):
                break
        found.append(result)
        print(
            f"{len(found):4d} {result['outcome']:9s} {mutant.file}:{mutant.line} {mutant.operator} {result['by'][:90]}",
            flush=True,
        )
    write(found, len(everything), given)
    shutil.rmtree(copy.root)


def write(found: list[dict[str, Any]], everything: int, given: argparse.Namespace) -> None:
    """Write what was found."""
    counts = Counter(result["outcome"] for result in found)
    record = {
        **provenance(["cosmic-ray", "coverage", "pytest", "torch"]),
        "seed": given.seed,
        "mutants": everything,
        "tried": len(found),
        "share": round(len(found) / everything, 4),
        "outcomes": dict(counts),
        "score": round(counts["killed"] / max(1, len(found)), 4),
        "not killed": [result for result in found if result["outcome"] != "killed"],
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: value for key, value in record.items() if key != "not killed"}, indent=1))


if __name__ == "__main__":
    main()
