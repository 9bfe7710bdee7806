"""Change the library in one place at a time, and see whether the tests that run this place notice.

``python -m benchmarks.mutants`` draws places at random, as many from each package as it has of them all. Cosmic Ray
makes the changes, in a copy of the last commit. The tests are run once without a change, to learn which tests run which
lines, and how long they take. It writes ``benchmarks/results/mutants.json``, and goes on where it was stopped.

``mutants-judged.json`` beside it is written by hand. It says of a change that no test noticed why it changes nothing
that can be seen, or which test was written since that notices it. The program runs such a test with the change and
without it. Where a file has the changed line more than once, the last entry of a change says how many are before it.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mutants.json"
JUDGED = RESULTS.with_name("mutants-judged.json")
PACKAGES = ("tucka/core", "tucka/backends/torch", "tucka/peft")
TESTS = ("tests/core", "tests/arrays", "tests/backends", "tests/peft", "tucka/core", "tucka/backends", "tucka/peft")
# The first tests are those of few files, since collecting a file takes time; then all that there is time for.
FIRST_FILES, FIRST_SECONDS, SECONDS = 3, 4.0, 20.0
MEMORY = 12 << 30
_STEP = 0.02
MISSED = ("survived", "no test runs it")


@dataclass(frozen=True)
class Mutant:
    """A change of one place: Cosmic Ray's operator, and which of its places in the file."""

    file: str
    line: int
    operator: str
    occurrence: int

    @property
    def package(self) -> str:
        return next(each for each in PACKAGES if self.file.startswith(each + "/"))


def mutants(file: Path, name: str) -> Iterator[Mutant]:
    """List the changes of a file, without those of annotations, which nothing evaluates, and of messages."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = file.read_text("utf-8")
    nodes, spans = list(ast_nodes(get_ast(source))), _spans(source)
    for operator in operator_names():
        kind = get_operator(operator)
        if kind.arguments():  # which names to replace: no place is of itself one of these
            continue
        places = [start for node in nodes for start, _ in kind().mutation_positions(node)]
        for occurrence, place in enumerate(places):
            if not any(start <= place < end for start, end in spans):
                yield Mutant(name, place[0], operator, occurrence)


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


def draw(everything: list[Mutant], number: int, seed: int) -> list[Mutant]:
    """Draw from each package its share, in an order in which every beginning is such a sample as well, nearly."""
    generator, drawn = random.Random(seed), []
    for package in PACKAGES:
        own = [mutant for mutant in everything if mutant.package == package]
        drawn += generator.sample(own, min(len(own), round(number * len(own) / len(everything))))
    generator.shuffle(drawn)
    return drawn


@dataclass
class Known:
    """What the run without a change has shown: which tests pass, their seconds, and which of them run which lines."""

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]

    def tests(self, mutant: Mutant, root: Path) -> list[str]:
        """Return the tests of a changed line; of the function around it, where the line runs at import alone."""
        by_line = self.lines.get(mutant.file, {})
        around = [mutant.line] if by_line.get(mutant.line) else _function_around(root / mutant.file, mutant.line)
        return sorted({test for line in around for test in by_line.get(line, ()) if test in self.seconds})


@functools.cache
def _functions(file: Path) -> list[tuple[int, int]]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [
        (node.lineno, node.end_lineno or 0) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, kinds)
    ]


def _function_around(file: Path, line: int) -> Iterable[int]:
    start, end = max((each for each in _functions(file) if each[0] <= line <= each[1]), default=(1, 10**6))
    return range(start, end + 1)


def first_tests(tests: list[str], file: str, seconds: dict[str, float]) -> list[str]:
    """Choose quick tests from few files: those of the same package that have the most tests of the place."""
    by_file: dict[str, list[str]] = {}
    for test in tests:
        by_file.setdefault(test.partition("::")[0], []).append(test)
    near = str(Path(file).parent).replace("tucka", "tests", 1)
    files = sorted(by_file, key=lambda each: (not each.startswith(near), -len(by_file[each]), each))[:FIRST_FILES]
    return within([test for each in files for test in by_file[each]], FIRST_SECONDS, seconds)


def within(tests: Iterable[str], limit: float, seconds: dict[str, float]) -> list[str]:
    """Take the quickest tests, as many as a time allows, and at least one."""
    taken: list[str] = []
    for test in sorted(tests, key=lambda each: seconds[each]):
        limit -= seconds[test]
        if taken and limit < 0:
            break
        taken.append(test)
    return taken


class Plugin:
    """Leaves the wanted tests in the order given, and notes what each does and how long it takes."""

    def __init__(self, wanted: list[str] | None, coverage: Any) -> None:
        self.wanted, self.coverage = wanted, coverage
        self.missing = 0
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.wanted is not None:
            order = {test: number for number, test in enumerate(self.wanted)}
            found = {item.nodeid for item in items}
            # A change of what a test is parametrised with renames it: then all of this test's are wanted.
            lost = [test.partition("[")[0] for test in self.wanted if test not in found]
            renamed = {item.nodeid: item.nodeid.partition("[")[0] for item in items if item.nodeid not in order}
            order.update({test: len(order) for test, base in renamed.items() if base in lost})
            self.missing = sum(base not in renamed.values() for base in lost)
            items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.began = time.process_time()
        if self.coverage is not None:
            self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        elif report.when == "call" and report.passed:
            self.seconds[report.nodeid] = 0.0

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if nodeid in self.seconds:
            self.seconds[nodeid] = time.process_time() - self.began


class Copy:
    """A copy of a commit, in which places are changed; nothing is left of a change afterwards."""

    def __init__(self, folder: Path, commit: str) -> None:
        name = subprocess.run(["git", "rev-parse", commit], cwd=ROOT, check=True, capture_output=True, text=True)
        self.root = root = folder / name.stdout.strip()
        if not root.exists():
            root.mkdir(parents=True)
            archive = root.with_suffix(".tar")
            subprocess.run(["git", "archive", "--output", str(archive), root.name], cwd=ROOT, check=True)
            with tarfile.open(archive) as files:
                files.extractall(root, filter="data")
            archive.unlink()
        self.report = root.with_suffix(".report.json")
        self.output = root.with_suffix(".output.txt")

    def changed(self, mutant: Mutant) -> str | None:
        """Return the text of a file with a change; None where there is no such place."""
        from cosmic_ray.mutating import mutate_code
        from cosmic_ray.plugins import get_operator

        text: str | None = mutate_code(
            (self.root / mutant.file).read_text("utf-8"), get_operator(mutant.operator)(), mutant.occurrence
        )
        return text

    def with_change_in(self, name: str, text: str, tests: list[str], seconds: float = 60.0) -> tuple[str, str]:
        """Run tests with another text of a file; return what came of it, and the test that failed."""
        file = self.root / name
        before = file.read_text("utf-8")
        file.write_text(text, "utf-8")
        try:
            status, report = self.run(tests, 30 + 5 * seconds)
        finally:
            file.write_text(before, "utf-8")
        return outcome(status, report, self.output.read_text("utf-8", "replace"))

    def run(
        self, tests: list[str] | None, seconds: float | None = None, *, stop: bool = True
    ) -> tuple[int, dict[str, Any]]:
        """Run pytest in a fork of this process, which has imported what tests import, and nothing of the library."""
        self.report.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            _run_here(self, tests, seconds, stop=stop)
        # By steps and not by a clock, which goes on where somebody stops both processes.
        for step in itertools.count():
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if seconds is not None and _STEP * step > 600 + 5 * seconds:  # it waits, and takes no processor's time
                os.kill(child, signal.SIGXCPU)
            time.sleep(_STEP)
        report = json.loads(self.report.read_text()) if self.report.exists() else {}
        return os.waitstatus_to_exitcode(status), report


def outcome(status: int, report: dict[str, Any], output: str) -> tuple[str, str]:
    """Say what a run of tests came to: its exit status, or the signal that ended it, and what it noted."""
    if status == -signal.SIGXCPU:
        return "timed out", ""
    if status < 0:
        return "killed", f"the process: {signal.Signals(-status).name}"
    if status == 1 and report.get("failed"):
        return "killed", report["failed"][0]
    # Collecting a test imports the library, and so does the file that all tests share. With -x it ends with 1 then.
    if (status in (1, 2) and "error" in output.lower()) or (status == 4 and "while loading conftest" in output):
        return "killed", "the import"
    if status == 0 and not report.get("missing"):
        return "survived", ""
    return "not run", f"status {status}, {report.get('missing')} tests not found"


def _run_here(copy: Copy, tests: list[str] | None, seconds: float | None, *, stop: bool) -> None:
    code = 3
    try:
        os.chdir(copy.root)
        os.environ.update(PYTHONPATH=str(copy.root), CI="1", HYPOTHESIS_PROFILE="few", HF_HUB_OFFLINE="1")
        sys.dont_write_bytecode = True
        sys.path[:] = [str(copy.root), *(place for place in sys.path if Path(place or ".").resolve() != ROOT)]
        for name in [name for name in sys.modules if name.partition(".")[0] == "support"]:  # of this copy, not another
            del sys.modules[name]
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        if seconds is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 60))
        with copy.output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        import coverage
        import pytest

        measured = None
        if tests is None:
            measured = coverage.Coverage(data_file=None, source=[str(copy.root / "tucka")])
            measured.start()
        plugin = Plugin(tests, measured)
        files = TESTS if tests is None else dict.fromkeys(test.partition("::")[0] for test in tests)
        options = ["-q", "--assert=plain", "--tb=short", "-p", "no:cacheprovider", "-p", "no:cov", "-p", "no:xdist"]
        options += [] if tests is None else ["-m", ""]  # a test that is named may be a slow one
        code = int(pytest.main([*options, *(["-x"] if stop else []), *files], plugins=[plugin]))
        noted: dict[str, Any] = {"failed": plugin.failed, "missing": plugin.missing}
        if measured is not None:
            measured.stop()
            noted.update(seconds=plugin.seconds, lines=_lines(measured, copy.root, list(plugin.seconds)))
        copy.report.write_text(json.dumps(noted))
    except BaseException:  # a fork ends here, whatever happens
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _lines(measured: Any, root: Path, tests: list[str]) -> dict[str, dict[int, list[int]]]:
    """Return which tests run which lines, by the tests' numbers."""
    data, number = measured.get_data(), {test: number for number, test in enumerate(tests)}
    return {
        str(Path(file).relative_to(root)): {
            line: [number[test] for test in found if test in number]
            for line, found in data.contexts_by_lineno(file).items()
        }
        for file in data.measured_files()
    }


def preload(root: Path) -> None:
    """Import what tests import, but for the library and JAX, which does not survive a fork."""
    import hypothesis
    import peft
    import pytest
    import scipy.linalg
    import torch

    sys.path.insert(0, str(root / "tests"))
    import support.tiny_models

    sys.path.remove(str(root / "tests"))
    torch.set_num_threads(1)
    hypothesis.settings.register_profile(
        "few",
        max_examples=10,
        deadline=None,
        derandomize=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    assert all((peft, pytest, scipy, support))
    assert not any(name.partition(".")[0] in ("tucka", "jax") for name in sys.modules)


def known_of(copy: Copy) -> Known:
    """Run all tests without a change, or read what an earlier run of the same copy has shown."""
    kept = copy.root.with_suffix(".known.json")
    if not kept.exists():
        status, report = copy.run(None, stop=False)
        print(f"without a change: status {status}, {len(report.get('seconds', ()))} tests pass", flush=True)
        print(*report["failed"], sep="\n", flush=True)
        kept.write_text(json.dumps(report))
    report = json.loads(kept.read_text())
    seconds = {test: taken for test, taken in report["seconds"].items() if test not in report["failed"]}
    tests = list(report["seconds"])
    lines = {
        file: {int(line): [tests[number] for number in numbers] for line, numbers in own.items()}
        for file, own in report["lines"].items()
    }
    return Known(seconds, lines)


def _is_python(text: str) -> bool:
    """Tell whether Python takes a text without complaint. Cosmic Ray takes the star of a signature for a product."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", SyntaxWarning)  # of literals that are compared by "is"
        try:
            compile(text, "changed", "exec")
        except SyntaxError:
            return False
    return True


def first_difference(file: Path, text: str) -> tuple[str, str, int]:
    """Return the first line of a file that another text has differently, this one, and how many equal ones precede."""
    lines, others = ([line.strip() for line in each.splitlines()] for each in (file.read_text("utf-8"), text))
    number = next((number for number, pair in enumerate(zip(lines, others, strict=False)) if len(set(pair)) > 1), None)
    return ("", "", 0) if number is None else (lines[number], others[number], lines[:number].count(lines[number]))


def attempt(mutant: Mutant, copy: Copy, known: Known) -> dict[str, Any]:
    """Change a place and run its tests: few, then as many of all as there is time for."""
    new = copy.changed(mutant)
    result: dict[str, Any] = asdict(mutant)
    if new is None or not _is_python(new):
        return {**result, "outcome": "not applied"}
    result["was"], result["now"], result["equal before"] = first_difference(copy.root / mutant.file, new)
    tests = known.tests(mutant, copy.root)
    result.update(tests=len(tests), tried=0, outcome="survived" if tests else "no test runs it", by="")
    first = first_tests(tests, mutant.file, known.seconds)
    for some in (first, within(sorted(set(tests) - set(first)), SECONDS, known.seconds)):
        if some and result["outcome"] == "survived":
            seconds = sum(known.seconds[test] for test in some)
            found, by = copy.with_change_in(mutant.file, new, some, seconds)
            result.update(outcome=found, by=by, tried=result["tried"] + len(some))
    return result


def interval(successes: int, number: int) -> tuple[float, float]:
    """Return Wilson's interval of 95 % for a share."""
    if number == 0:
        return 0.0, 1.0
    z, share = 1.959964, successes / number
    middle, width = share + z * z / (2 * number), z * math.sqrt(share * (1 - share) / number + (z / (2 * number)) ** 2)
    return (middle - width) / (1 + z * z / number), (middle + width) / (1 + z * z / number)


def score(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Count outcomes; the score is the share that tests notice, of the changes that could be tried."""
    counts = Counter(result["outcome"] for result in results)
    noticed = counts["killed"] + counts["timed out"]
    number = noticed + sum(counts[each] for each in MISSED)
    low, high = interval(noticed, number)
    return {
        "outcomes": dict(sorted(counts.items())),
        "score": round(noticed / max(1, number), 4),
        "interval": [round(low, 4), round(high, 4)],
    }


def confirmed(results: list[dict[str, Any]], copy: Copy) -> list[dict[str, Any]]:
    """Run the tests that noticed a change without one: what fails then has noticed nothing."""
    killers = sorted({result["by"] for result in results if "::" in result.get("by", "")})
    status, report = copy.run(killers, stop=False) if killers else (0, {"failed": []})
    if status not in (0, 1):
        message = f"pytest ended with {status}; see {copy.output}"
        raise RuntimeError(message)
    failed = set(report["failed"])
    return [{**each, "outcome": "not run"} if each.get("by") in failed else each for each in results]


def judged(results: list[dict[str, Any]], copy: Copy) -> list[dict[str, Any]]:
    """Add to changes that were missed what is known of them; a test that is named must notice the change alone."""
    given = {(*each["change"], 0)[:4]: each for each in json.loads(JUDGED.read_text())} if JUDGED.exists() else {}
    found = []
    for result in results:
        verdict = given.get((result["file"], result.get("was"), result.get("now"), result.get("equal before", 0)))
        if result["outcome"] not in MISSED or verdict is None:
            found.append(result)
            continue
        if test := verdict.get("noticed by"):
            text, without = same_change(result, copy), copy.run([test])[0]
            what = "no such place" if text is None else copy.with_change_in(result["file"], text, [test])[0]
            if (without, what) != (0, "killed"):
                message = (
                    f"{test}: expected to notice {result['was']} -> {result['now']}, got {what} and {without} without"
                )
                raise ValueError(message)
        found.append({**result, **{key: value for key, value in verdict.items() if key != "change"}})
    return found


def same_change(result: dict[str, Any], copy: Copy) -> str | None:
    """Change a file of a later commit as it was changed then; None where the place is no more."""
    for occurrence in itertools.count():
        text = copy.changed(Mutant(result["file"], result["line"], result["operator"], occurrence))
        wanted = (result["was"], result["now"], result.get("equal before", 0))
        if text is None or first_difference(copy.root / result["file"], text) == wanted:
            return text
    return None


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the scores: of all, of each package, and of all with what is known since of those that were missed."""
    since = [
        {**each, "outcome": "killed" if "noticed by" in each else each["outcome"]}
        for each in results
        if "equivalent" not in each
    ]
    return {
        "all": score(results),
        **{
            package: score([each for each in results if each["file"].startswith(f"{package}/")]) for package in PACKAGES
        },
        "with tests written since, without equivalent ones": score(since),
    }


def tried(stem: Path) -> dict[int, dict[str, Any]]:
    """Read what earlier runs have come to, by the places' numbers in the sample."""
    lines = [line for part in stem.parent.glob(f"{stem.name}.*.jsonl") for line in part.read_text().splitlines()]
    return {result["number"]: result for result in sorted(map(json.loads, lines), key=lambda each: each["number"])}


def try_all(sample: list[Mutant], share: slice, stem: Path, copy: Copy, known: Known, latest: float) -> None:
    """Try a share of the changes, until it is too late, and write down what came of each."""
    done = tried(stem)
    for number in range(len(sample))[share]:
        if number in done:
            continue
        if time.monotonic() > latest:
            break
        result = {"number": number, **attempt(sample[number], copy, known)}
        with Path(f"{stem}.{share.start}.jsonl").open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(*(result.get(key) for key in ("number", "outcome", "file", "line", "operator", "by")), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=150, help="how many changes to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no new one is tried")
    parser.add_argument("--commit", default="HEAD", help="of the library and its tests")
    parser.add_argument("--work", type=Path, default=ROOT / ".mutants", help="where the copy is, and what it has shown")
    given = parser.parse_args(arguments)
    began = time.monotonic()
    copy = Copy(given.work, given.commit)
    preload(copy.root)
    known = known_of(copy)
    files = sorted(file for package in PACKAGES for file in (copy.root / package).rglob("*.py"))
    everything = [mutant for file in files for mutant in mutants(file, str(file.relative_to(copy.root)))]
    sample = draw(everything, given.sample, given.seed)
    fork, stem = multiprocessing.get_context("fork"), given.work / f"{copy.root.name}.{given.sample}-{given.seed}"
    work = []
    for part in range(given.processes):
        own, share = Copy(given.work / str(part), copy.root.name), slice(part, None, given.processes)
        latest = began + 60 * given.minutes
        work.append(fork.Process(target=try_all, args=(sample, share, stem, own, known, latest)))
    for process in work:
        process.start()
    for process in work:
        process.join()
    # Up to the first that is missing: those that take long would else be too few.
    found = tried(stem)
    results = [found[number] for number in itertools.takewhile(found.__contains__, range(len(sample)))]
    later = Copy(given.work, "HEAD")
    results = judged(confirmed(results, copy), later)
    record = {
        **provenance(["cosmic-ray", "coverage", "hypothesis", "pytest", "torch"]),
        "commit": copy.root.name,
        "commit of tests written since": later.root.name,
        "command": f"python -m benchmarks.mutants --sample {given.sample} --seed {given.seed}",
        "places": Counter(mutant.package for mutant in everything),
        "tried": len(results),
        "scores": summary(results),
        "not noticed": [each for each in results if each["outcome"] not in ("killed", "timed out")],
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["scores"], indent=1))


if __name__ == "__main__":
    main()
