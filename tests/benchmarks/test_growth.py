"""The benchmark of growth runs, its fits tell the costs apart, and its counts are those of the models."""

import json
from dataclasses import asdict

import pytest
from torch import nn

from benchmarks import growth, growth_report
from benchmarks.adapted_models import Stack
from tucka import count_parameters


@pytest.mark.heavy
def test_a_small_run_and_its_report(tmp_path):
    output = tmp_path / "growth.json"
    sizes = ["--axes", "layers", "groups", "--largest", "4", "--width", "16", "--repeats", "1"]
    growth.main([*sizes, "--output", str(output)])
    report, text = json.loads(output.read_text()), output.with_suffix(".md").read_text()
    assert list(report["points"]) == ["layers=2", "layers=4", "groups=1", "groups=2", "groups=4"]
    assert {method for times in report["times"].values() for method in times} == set(growth.METHODS)
    assert all(text.count(f"| {kind} | tucka token |") == 1 for kind in growth_report.KINDS)
    assert output.with_suffix(".svg").stat().st_size > 0


def test_the_committed_tables_are_those_of_the_committed_results():
    path = growth.RESULTS / "growth-cpu.json"
    report, text = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert text.endswith(f"\n\n{growth_report.tables(report)}\n\n{growth_report.caption(report)}\n")


@pytest.mark.parametrize("method", [name for name in growth.METHODS if name != growth_report.BASE])
def test_the_counted_parameters_are_those_of_the_models(method):
    for point in (growth.Point(layers=3), growth.Point(groups=7), growth.Point(rank=5)):
        model: nn.Module = growth.built(method, Stack(24, point.layers), point)
        counted, layers, sizes = growth_report.sizes_of(asdict(point), 24, method)
        trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
        assert trained == count_parameters(counted, layers, **sizes)


def test_a_fit_tells_the_costs_apart():
    report = {"about": {"options": {"width": 8, "device": "cpu"}}, "points": {}, "times": {}}
    for number, point in enumerate(
        growth.Point(layers=layers, rank=rank, tokens=tokens)
        for layers in (1, 9)
        for rank in (2, 32)
        for tokens in (1, 500)
    ):
        report["points"][str(number)] = asdict(point)
        numbers = point.layers * point.samples * point.tokens * 8
        products = growth_report.multiply_adds(report, str(number), "forward", "tucka batch")
        seconds = 1e-3 * (0.5 + 0.25 * point.layers + 0.125e-6 * numbers + 2e-6 * products)
        times = {"frozen": {"0": [0, 1.0, 0, 0.0]}, "tucka batch": {"0": [0, 1.0 + seconds, 0, seconds]}}
        report["times"][f"{number}, forward"] = times
    costs, _, factor = growth_report.fitted(report, "forward", "tucka batch")
    assert costs == pytest.approx([0.5, 0.25, 0.125, 2], rel=1e-3)
    assert factor == pytest.approx(1)
