"""The tables of architectures are those of the committed results, and their words agree with the sweep's lists."""

import json

import pytest

from architectures.expected import REFUSALS, refusal_of
from architectures.selection import ALL, CHOSEN
from benchmarks import architectures

REPORT = json.loads(architectures.RESULTS.read_text("utf-8"))


def test_the_committed_tables_are_those_of_the_committed_results(tmp_path):
    copy = tmp_path / "architectures.json"
    copy.write_text(json.dumps(REPORT))
    architectures.write_table(copy)
    assert copy.with_suffix(".md").read_text("utf-8") == architectures.RESULTS.with_suffix(".md").read_text("utf-8")


def test_every_architecture_was_run():
    assert REPORT["families"].keys() >= ALL.keys()
    assert not REPORT["not run"]
    assert set(CHOSEN) <= REPORT["families"].keys()


@pytest.mark.parametrize("name", REPORT["families"])
def test_what_does_not_work_is_a_listed_refusal_or_fails_with_lora_too(name):
    found = REPORT["families"][name]
    for method in architectures.TUCKA:
        for check, outcome in found[method].items():
            entry = refusal_of(name, method, check)
            if entry is None:
                assert outcome.startswith("raises"), (method, check, outcome)
                assert check in found[architectures.LORA], (method, check, outcome)
            else:
                assert outcome.startswith(f"refused: {entry.error}"), (method, check, outcome)


def test_every_listed_refusal_is_met():
    met = {
        refusal_of(name, method, check)
        for name, found in REPORT["families"].items()
        for method in architectures.TUCKA
        for check in found[method]
    }
    assert met >= {entry for entry in REFUSALS if set(entry.families.split()) & REPORT["families"].keys()}
