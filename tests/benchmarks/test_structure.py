"""The count of lines and files: it tells the kinds of lines apart, and the page shows the committed result."""

import json
from pathlib import Path

from benchmarks.structure import RESULT, lines_by_kind, table

PAGE = Path(__file__).parents[2] / "docs" / "explanation" / "design.md"
MODULE = '''"""One.

Three."""

# A comment.
VALUE = """
text that is no docstring
"""  # another


def f():
    """Return one."""

    return 1  # code
'''


def test_each_line_is_of_one_kind():
    assert lines_by_kind(MODULE) == {"code": 5, "docstring": 4, "comment": 1, "blank": 4}


def test_the_committed_tables_are_those_of_the_committed_counts():
    assert RESULT.with_suffix(".md").read_text() == table(json.loads(RESULT.read_text()))


def test_the_page_names_every_call_on_the_way_to_the_product():
    report, section = json.loads(RESULT.read_text()), PAGE.read_text().split("## Before and after")[1]
    lines = [line for line in section.splitlines() if line.startswith("|") and "`" in line[:9]]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:3]] for line in lines]
    for side, column in zip(("before", "after"), zip(*rows, strict=True), strict=True):
        assert [name for name in column if name] == report[side]["hops"]
