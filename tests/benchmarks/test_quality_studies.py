"""The studies of the quality benchmark: each changes one thing, and reports show what results say."""

import pytest

pytest.importorskip("matplotlib", reason="the reports draw figures")

from benchmarks.quality import capacity, run, studies_report
from benchmarks.quality.experiments import read_all
from support.quality_runs import record


def test_every_study_can_be_read_and_changes_one_thing():
    studies = {folder.name: read_all(None, folder) for folder in studies_report.STUDIES.iterdir()}
    assert {name: len(found) for name, found in studies.items()}.keys() == {"ablation", "capacity", "curves", "ranks"}
    changes = [(one.key, tuple(one.learning_rates)) for one in studies["ablation"]]
    assert len(set(changes)) == len(changes), "two files ask for the same trainings"
    assert {(one.config["r"], one.config["k"]) for one in studies["ranks"]} >= {(2, 8), (16, 1)}
    assert all(one.evaluations for one in studies["curves"])
    assert len({one.learning_rates for one in studies["capacity"]}) == 1, "methods choose from different rates"


def finished(experiment, seed, test, **more):
    return record(experiment.learning_rates[0], seed, 0.5, test, experiment.name, key=experiment.key, **more)


def test_reports_of_the_studies(tmp_path):
    ablation = {one.name: one for one in read_all(None, studies_report.STUDIES / "ablation")}
    for seed in (0, 1):
        run.append(tmp_path, finished(ablation["defaults"], seed, 0.7))
        run.append(tmp_path, finished(ablation["groups_4"], seed, 0.71 + 0.02 * seed))
    for one in read_all(None, studies_report.STUDIES / "ranks"):
        for rate in one.learning_rates:
            run.append(tmp_path, finished(one, 0, 0.6) | {"learning_rate": rate})
    for one in read_all(None, studies_report.STUDIES / "curves"):
        log, curve = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}], [[1, 0.5], [2, 0.625]]
        for rate in one.learning_rates:
            run.append(tmp_path, finished(one, 0, 0.6, log=log, curve=curve) | {"learning_rate": rate})
    pages = {path.name: path.read_text() for path in studies_report.write(tmp_path)}
    assert "| k = 4 | 10 | 72.00% (+2.00 ± 1.00) |" in pages["ablation.md"]
    assert "| r = 2 | 60.00% (10) | 60.00% (10) |" in pages["ranks-sentences.md"]
    assert "| HRA | 10 | 1.500 | 62.50% | 60.00% |" in pages["curves-sentences.md"]
    assert (tmp_path / "curves-sentences.svg").stat().st_size > 0


def test_capacity_compares_with_lora_at_equal_parameters(tmp_path):
    own = {one.name: one for one in read_all(None, studies_report.STUDIES / "capacity")}
    # LoRA grows by ten points from 100 parameters to 400, so 200 are worth five; TuckA is two and four points below.
    scores = {
        "lora_r1": (100, 0.3, 0.4),
        "lora_r4": (400, 0.4, 0.5),
        "tucka_r8": (200, 0.33, 0.41),
        "hra_r8": (9, 0.2, 0.2),
    }
    for name, (size, *accuracies) in scores.items():
        for rate in own[name].learning_rates:
            for seed, found in enumerate(accuracies):
                done = finished(own[name], seed, found, task="glosses", parameters=size)
                run.append(tmp_path, done | {"learning_rate": rate})
    page = capacity.write(tmp_path)
    assert "| TuckA r=8 | 200 | 37.0% ± 5.7% (0.004) | -3.00 ± 1.00 |" in page
    assert "| HRA r=8 | 9 | 20.0% ± 0.0% (0.004) |  |" in page
    assert "- glosses: LoRA r=4 minus LoRA r=1: +10.00 ± 0.00." in page
    assert (tmp_path / "capacity.md").read_text() == page
    assert (tmp_path / "capacity.svg").stat().st_size > 0


def test_capacity_without_results_says_so(tmp_path):
    assert "No task" in capacity.write(tmp_path)
    assert list(tmp_path.iterdir()) == []
