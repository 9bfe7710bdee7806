"""The benchmark of adapters runs, and its report reads what it wrote."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


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
