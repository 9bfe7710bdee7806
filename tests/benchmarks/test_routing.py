"""The benchmarks of routing: what they measure on made-up features, and that their pages say what results hold."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.routing import balance, balance_report, study_report, tasks_report
from benchmarks.routing.features import Features
from tucka import load_entropy

RESULTS = Path(balance_report.__file__).parents[1] / "results"


@pytest.fixture(scope="module")
def loads():
    rng = np.random.default_rng(0)
    common = 5 * rng.standard_normal(24)
    features = Features((common + rng.standard_normal((1200, 24))).astype(np.float32), np.zeros(1200, int), ["all"])
    return balance.measure(features, k=4, seed=0)


def test_every_router_chooses_for_every_sample_and_batch_not_seen(loads):
    unseen = 1200 - balance.BATCH * balance.BATCHES
    assert loads.keys() == balance.ROUTERS.keys()
    for found in loads.values():
        assert sum(found["sample"]) == unseen
        assert sum(found["batch"]) == unseen // balance.BATCH


def test_a_common_mean_unbalances_products_and_not_the_default(loads):
    entropy = {router: load_entropy(found["sample"]) for router, found in loads.items()}
    assert entropy["balanced, directional: the default"] > 0.98
    assert entropy["DAI (a = 10), dot: the paper's"] < 0.8
    assert entropy["DAI (a = 10), distance"] == 0.0


def test_report_of_the_start(tmp_path):
    rows = [
        {"source": source, "k": 2, "router": router, "routing": routing, "loads": [[50, 50], load]}
        for source, load in (("minilm", [100, 0]), ("smollm2", [50, 50]))
        for router in ("some", "other: the default")
        for routing in ("batch", "sample")
    ]
    report = {"rows": rows, "seeds": 2, "batch": 16, "batches": 32, "device": "cpu", "versions": {}, "commit": "abc"}
    (tmp_path / "start.json").write_text(json.dumps(report))
    balance_report.write_report(tmp_path / "start.json")
    assert "| some | 0.500 | 1.000 |" in (tmp_path / "start.md").read_text()
    assert "| some | 0.500 to 1.000 | 0.500 to 1.000 |" in (tmp_path / "start-ranges.md").read_text()
    assert (tmp_path / "start.svg").stat().st_size > 0


def training(k, seed, accuracy):
    load = {"entropy": 1.0, "least_share": 0.5, "table": [[10, 0], [0, 10]], "load": [10, 10]}
    return {
        "k": k,
        "routing": "batch",
        "batches": "mixed",
        "seed": seed,
        "r": 8,
        "parameters": 1000,
        "accuracy": {"a": accuracy},
        "after": load,
        "versions": {"torch": "2"},
        "commit": "abc",
        "device": "cpu",
        **dict.fromkeys(("train", "test", "epochs", "batch"), 2),
        "learning_rate": 0.5,
    }


def test_report_of_trainings_is_paired_by_seed(tmp_path):
    rows = [training(k, seed, 0.5 + 0.1 * seed + 0.01 * (k > 1)) for k in (1, 2) for seed in (0, 1)]
    (tmp_path / "routing-pays.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study_report.write_report(tmp_path / "routing-pays.jsonl")
    assert "| 1.00% ± 0.00% | 1.00 | 50.0% | 1.000 |" in (tmp_path / "routing-pays.md").read_text()


def test_information_and_interval():
    assert study_report.information([[5, 5], [5, 5]]) == 0.0
    assert study_report.information(np.eye(4, dtype=int)) == pytest.approx(2.0)
    assert math.isnan(study_report.interval([1.0]))
    assert study_report.interval([0.0, 1.0]) == pytest.approx(12.7062 * 0.5, rel=1e-4)


WRITERS = {
    "routing-balance-start.json": balance_report.write_report,
    "routing-balance.jsonl": study_report.write_report,
    "routing-pays.jsonl": study_report.write_report,
    "routing-tasks.jsonl": tasks_report.write_report,
}


@pytest.mark.parametrize("name", WRITERS)
def test_committed_pages_are_made_from_the_committed_results(tmp_path, name):
    (tmp_path / name).write_bytes((RESULTS / name).read_bytes())
    WRITERS[name](tmp_path / name)
    pages = sorted(tmp_path.glob("*.md"))
    assert pages
    for page in pages:
        assert page.read_text() == (RESULTS / page.name).read_text()
