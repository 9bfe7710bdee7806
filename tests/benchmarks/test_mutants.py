"""The program that changes the library tells its outcomes apart, and the committed score is that of the results."""

import json
import signal
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from benchmarks import mutants
from benchmarks.mutants import Known, Mutant

PLACES = [Mutant(f"{package}/a.py", line, "core/AddNot", line) for package in mutants.PACKAGES for line in range(40)]


def test_a_sample_has_of_each_package_its_share_and_is_the_same_again():
    drawn = mutants.draw(PLACES, 60, seed=0)
    assert len(set(drawn)) == 60
    assert all(sum(each.package == package for each in drawn) == 20 for package in mutants.PACKAGES)
    assert drawn == mutants.draw(PLACES, 60, seed=0) != mutants.draw(PLACES, 60, seed=1)


FAILED = {"failed": ["tests/a.py::b"], "missing": 0}
PASSED = {"failed": [], "missing": 0}
OUTCOMES = {
    "a test failed": (1, FAILED, "", "killed"),
    "a test could not be collected": (2, PASSED, "1 error in 0.1s", "killed"),
    "the first of several could not be collected": (1, PASSED, "stopping after 1 failures, 1 error in 0.1s", "killed"),
    "no test could be collected": (4, {}, "ImportError while loading conftest", "killed"),
    "the process died": (-signal.SIGSEGV, {}, "", "killed"),
    "all passed": (0, PASSED, "", "survived"),
    "too long": (-signal.SIGXCPU, {}, "", "timed out"),
    "wrong arguments": (4, PASSED, "ERROR: not found", "not run"),
    "an error of the program itself": (3, {}, "error", "not run"),
    "some tests were not there": (0, {"failed": [], "missing": 2}, "", "not run"),
    "no test was there": (5, {"failed": [], "missing": 3}, "", "not run"),
}


@pytest.mark.parametrize("what", OUTCOMES)
def test_outcomes_are_told_apart(what):
    *run, expected = OUTCOMES[what]
    assert mutants.outcome(*run)[0] == expected


def test_of_a_test_that_a_change_has_renamed_all_are_run():
    items = [SimpleNamespace(nodeid=f"a.py::{test}") for test in ("one[9]", "one[7]", "two", "three")]
    plugin = mutants.Plugin(["a.py::two", "a.py::one[8]", "a.py::one[7]"], None)
    plugin.pytest_collection_modifyitems(items)
    assert [item.nodeid.removeprefix("a.py::") for item in items] == ["two", "one[7]", "one[9]"]
    assert plugin.missing == 0
    plugin = mutants.Plugin(["a.py::four", "a.py::two"], None)
    plugin.pytest_collection_modifyitems(items)
    assert [item.nodeid for item in items] == ["a.py::two"]
    assert plugin.missing == 1


def test_the_interval_of_a_share():
    """Wilson's, as in Agresti and Coull (1998) for 9 of 10."""
    assert mutants.interval(9, 10) == pytest.approx((0.596, 0.982), abs=5e-4)
    assert mutants.interval(10, 10)[1] == pytest.approx(1)
    assert mutants.interval(0, 0) == (0, 1)


def test_the_score_leaves_out_what_was_not_tried():
    outcomes = ["killed"] * 3 + ["survived"] + ["not run"] * 5 + ["not applied"]
    results = [{"file": "tucka/core/a.py", "outcome": outcome} for outcome in outcomes]
    assert mutants.score(results)["score"] == 0.75
    results[3]["noticed by"] = "tests/a.py::b"
    assert mutants.summary(results)["all"]["score"] == 0.75
    since = mutants.summary(results)["with tests written since, without equivalent ones"]
    assert since["outcomes"]["killed"] == 4
    results[3] = {"file": "tucka/core/a.py", "outcome": "survived", "equivalent": "because"}
    assert mutants.summary(results)["with tests written since, without equivalent ones"]["score"] == 1


def test_the_first_tests_are_quick_ones_near_the_place():
    near, far = (
        [f"tests/{folder}/test_{name}.py::{test}" for name in "ab" for test in "xyz"] for folder in ("core", "peft")
    )
    seconds = {test: 1.0 + number for number, test in enumerate(near + far)}
    assert mutants.first_tests(near + far, "tucka/core/a.py", seconds) == near[:2]  # 1 s and 2 s of 4 s
    assert mutants.within(far, 0.5, seconds) == far[:1]


def test_a_line_that_runs_at_import_has_the_tests_of_its_function(tmp_path):
    (tmp_path / "a.py").write_text("def f(\n    x=1,\n):\n    return x\n\n\ndef g():\n    return 2\n")
    known = Known({"one": 1.0, "two": 1.0}, {"a.py": {4: ["one", "failed"], 8: ["two"]}})
    assert known.tests(Mutant("a.py", 2, "", 0), tmp_path) == ["one"]
    assert known.tests(Mutant("a.py", 8, "", 0), tmp_path) == ["two"]


SOURCE = """def f(x: "int | None" = 3) -> "int | None":
    if x > 2:
        raise ValueError(expected("x", 1 + 1))
    return x
"""


def test_annotations_and_messages_are_left_as_they_are(tmp_path):
    pytest.importorskip("cosmic_ray")
    file = tmp_path / "a.py"
    file.write_text(SOURCE.replace('"', ""))
    found = list(mutants.mutants(file, "a.py"))
    assert {each.line for each in found} == {1, 2}
    assert {each.operator for each in found if each.line == 1} == {"core/NumberReplacer"}


def test_equal_lines_of_a_file_are_told_apart(tmp_path):
    pytest.importorskip("cosmic_ray")
    copy = object.__new__(mutants.Copy)
    copy.root = tmp_path
    (tmp_path / "a.py").write_text("def f(x):\n    return x == 1\n\n\ndef g(x):\n    return x == 1\n")
    for number in range(2):
        mutant = Mutant("a.py", 1, "core/ReplaceComparisonOperator_Eq_NotEq", number)
        text = copy.changed(mutant)
        was, now, before = mutants.first_difference(tmp_path / "a.py", text)
        assert (was, now, before) == ("return x == 1", "return x != 1", number)
        assert mutants.same_change({**asdict(mutant), "was": was, "now": now, "equal before": before}, copy) == text


def test_the_committed_scores_are_those_of_the_committed_results():
    record = json.loads(mutants.RESULTS.read_text())
    everything = record["scores"]["all"]
    assert sum(everything["outcomes"].values()) == record["tried"]
    missed = [each for each in record["not noticed"] if each["outcome"] in mutants.MISSED]
    noticed = sum(everything["outcomes"].get(each, 0) for each in ("killed", "timed out"))
    number = noticed + len(missed)
    assert len(record["not noticed"]) == record["tried"] - noticed
    assert everything["score"] == round(noticed / number, 4)
    low, high = mutants.interval(noticed, number)
    assert [round(low, 4), round(high, 4)] == everything["interval"]
    size = int(record["command"].split("--sample ")[1].split()[0])
    page = " ".join((mutants.ROOT / "docs" / "contributing.md").read_text().split())
    since, equivalent = (sum(key in each for each in missed) for key in ("noticed by", "equivalent"))
    sentences = [
        f"`make mutants` changes the library in {size} places",
        f"Of the first {record['tried']}, {number} could be made",
        f"Tests noticed {noticed} of these, {100 * noticed / number:.0f} % "
        f"(interval of 95 %: {100 * low:.0f} to {100 * high:.0f} %)",
        f"Of the others, {since} have tests now, and {equivalent} change nothing that can be seen",
    ]
    assert [each for each in sentences if each not in page] == []
    assert since + equivalent == len(missed)
