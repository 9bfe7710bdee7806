"""What an adapted call costs in operators, Python calls and bytes kept does not rise unnoticed."""

import json

import pytest
import torch

from benchmarks import counts

REPORT = json.loads(counts.RESULT.read_text())
methods = pytest.mark.parametrize("method", [name for name in counts.METHODS if name.startswith("tucka")])


@methods
def test_no_count_has_risen(method):
    known = REPORT["counts"][method]
    risen = {name: (known[name], value) for name, value in counts.counted(method).items() if value > known[name]}
    assert not risen, "If it has to be, count again with: python -m benchmarks.counts"


@pytest.mark.slow
@methods
def test_no_graph_breaks(method):
    assert REPORT["counts"][method]["graph breaks"] == counts.graph_breaks(method) == counts.graph_breaks("frozen")


def test_the_committed_table_is_that_of_the_committed_counts():
    assert counts.RESULT.with_suffix(".md").read_text() == counts.table(REPORT)


def test_operators_and_calls_are_counted():
    x = torch.ones(3)

    def inner():
        return (x + 1).t().mul(2)

    assert counts.operators(inner) == 2  # not the view
    assert counts.calls(lambda: inner()) == 2
