"""The benchmarks of layers run, and their reports say what was measured."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = [path for name in ("stack", "encoder") for path in sorted((BENCHMARKS / "results").glob(f"{name}-*.json"))]


def loaded(path):
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MICRO = loaded(BENCHMARKS / "micro" / "test_functions.py")


@pytest.mark.parametrize("name", MICRO.FUNCTIONS)
def test_each_function_is_benchmarked_in_training_and_inference(name, monkeypatch):
    monkeypatch.setattr(MICRO, "WIDTH", 16)
    runs = []

    def once(run):
        runs.append(run())
        return runs[-1]

    MICRO.test_inference(name, once)
    MICRO.test_training(name, once)
    assert [run.requires_grad for run in runs] == [False, True]


@pytest.mark.slow
def test_the_functions_run_under_pytest_with_timing_disabled():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", BENCHMARKS / "micro", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run([*command, "--benchmark-disable"], capture_output=True, text=True, cwd=BENCHMARKS.parent)
    assert f"{2 * len(MICRO.FUNCTIONS)} passed" in result.stdout


def test_a_slow_method_sits_rounds_out_and_this_is_recorded(monkeypatch):
    measures = loaded(BENCHMARKS / "measures.py")
    models = {name: torch.nn.Identity() for name in ("frozen", "slow", "quick")}
    seconds = {models["frozen"]: 1.0, models["slow"]: 30.0, models["quick"]: 2.0}
    monkeypatch.setattr(measures, "_timed", lambda model, *_: (seconds[model], 0.5 * seconds[model]))
    times = measures.times_in_turns(models, torch.ones(1), "training", rounds=9, budget=40)
    found = {name: measures.summary(times[name], times["frozen"]) for name in models}
    assert {name: values["rounds"] for name, values in found.items()} == {"frozen": 9, "slow": 3, "quick": 9}
    assert found["slow"]["wall_overhead_ms"] == pytest.approx(29e3)
    assert found["quick"]["processor_overhead_ms"] == pytest.approx(500)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_committed_tables_are_those_of_the_committed_results(path):
    report, module = json.loads(path.read_text()), loaded(BENCHMARKS / "report.py")
    expected = f"{module.table(report, 'processor')}\n\n{module.caption(report, 'processor')}\n"
    assert path.with_suffix(".md").read_text() == expected
    for name, values in report["methods"].items():
        assert values["training"]["rounds"] >= 3, name
        if values["formula"]:
            frozen = report["methods"]["frozen"]
            for key, count in values["formula"].items():
                assert values[key] - frozen[key] == pytest.approx(count, rel=0.02), name


@pytest.mark.slow
def test_small_run_and_its_report(tmp_path):
    result = tmp_path / "small.json"
    sizes = ["--width", "64", "--depth", "1", "--rank", "4", "--samples", "2", "--tokens", "8", "--rounds", "1"]
    command = [sys.executable, "-W", "ignore", BENCHMARKS / "adapters.py", *sizes, "--output", result]
    subprocess.run(command, check=True)
    subprocess.run([sys.executable, BENCHMARKS / "report.py", result], check=True)
    report = json.loads(result.read_text())
    assert {"versions", "device", "commit", "options", "methods"} <= report.keys()
    assert report["methods"]["tucka batch"]["training"]["wall_ms"] > 0
    assert result.with_suffix(".svg").stat().st_size > 0
    assert "| tucka batch |" in result.with_suffix(".md").read_text()
