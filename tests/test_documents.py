"""Numbers that the documents copy from result files are those of the files."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEMO = json.loads((ROOT / "benchmarks" / "results" / "demo-cpu.json").read_text())


@pytest.mark.parametrize("row", DEMO["methods"], ids=lambda row: row["method"])
def test_the_demos_page_shows_the_committed_results(row):
    lines = (ROOT / "docs" / "how-to" / "demo.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"| {row['method']}"))
    cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
    assert cells[:5] == [f"{value:.3f}" for value in [*row["accuracy"].values(), row["mean"]]]
    if row["learning_rate"] is not None:
        assert cells[5:] == [f"{row['adapter_parameters']:,}", f"{row['seconds']:.0f}"]
