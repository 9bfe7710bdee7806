"""The benchmark of the two orders of token routing runs, and its committed table is that of its results."""

import json

from benchmarks import orders


def test_a_small_run_and_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(orders, "SIZES", [(2, 1), (2, 3)])
    output = tmp_path / "orders.json"
    orders.main(["--tokens", "3", "--repeats", "1", "--output", str(output)])
    report, text = json.loads(output.read_text()), output.with_suffix(".md").read_text()
    assert report["kept"] == {"2x1": {"spread": 2, "mixed": 4}, "2x3": {"spread": 6, "mixed": 4}}
    assert [line.split("|")[-2].strip() for line in text.splitlines()[2:4]] == ["spread", "mixed"]


def test_the_committed_table_is_that_of_the_committed_results():
    path = orders.RESULTS / "orders-cpu.json"
    assert path.with_suffix(".md").read_text() == orders.table(json.loads(path.read_text()))
