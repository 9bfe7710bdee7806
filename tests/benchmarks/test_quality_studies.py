"""The studies of the quality benchmark: other starts leave the model as it is, and reports show what results say."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from benchmarks.quality import capacity, run, studies_report
from benchmarks.quality.experiments import read_all
from benchmarks.quality.starts import STARTS, restart
from support.quality_runs import record
from tucka.peft import TuckAConfig


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("rank", [1, 3, 4])
def test_other_starts_change_the_factors_and_not_the_outputs(start, rank):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 6)
    before = net(x)
    model = get_peft_model(net, TuckAConfig(r=rank, factor_norm=None, target_modules=["first", "second"]))
    adapter = "base_model.model.second.tucka_experts.default"
    own = {name: value.clone() for name, value in model.get_submodule(adapter).named_parameters()}
    restart(model, start, [{"x": x}, {"x": 2 * x}], seed=1)
    changed = [not torch.equal(own[name], value) for name, value in model.get_submodule(adapter).named_parameters()]
    assert any(changed) or (rank == 1 and start in {"both_ways", "rotation"})
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)


def test_start_from_inputs_reads_where_the_inputs_vary():
    torch.manual_seed(0)
    model = get_peft_model(Net(), TuckAConfig(r=2, target_modules=["first"]))
    along = torch.nn.functional.normalize(torch.randn(6), dim=0)
    restart(model, "inputs", [{"x": torch.randn(20, 1) * along + 1e-3 * torch.randn(20, 6)} for _ in range(3)], seed=0)
    read, written = model.get_parameter("base_model.model.first.tucka_experts.default.basis").detach().unbind(1)
    assert abs(float(torch.nn.functional.normalize(read, dim=0) @ along)) > 0.999
    assert not written.any()


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
        run.append(tmp_path, finished(one, 0, 0.6, log=log, curve=curve))
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
