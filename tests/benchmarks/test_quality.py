"""The runner of the quality benchmark: it searches on validation, resumes, and reports results only."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.quality import movement, report, run, studies_report, windows
from benchmarks.quality.experiments import FOLDER, read, read_all
from benchmarks.quality.problem import Problem, Sizes
from benchmarks.quality.training import Unsupported, adapt, run_adapter, run_words, trainable
from support.quality_runs import experiment, record

SIZES = Sizes(train=16, validation=8, test=8, epochs=1, batch_size=8)


class Toy(nn.Module):
    """Two layers and a head over the mean of some features."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, features, labels=None):
        logits = self.head(self.second(self.first(features).tanh()).mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(loss=loss, logits=logits) if loss is None else {"loss": loss, "logits": logits}


def collate(items):
    labels = torch.tensor([item["labels"] for item in items])
    return {"features": torch.stack([item["features"] for item in items]), "labels": labels}


@pytest.fixture(scope="module")
def problem():
    generator = torch.Generator().manual_seed(0)
    items = [
        {"features": torch.randn(3, 6, generator=generator) + label, "labels": label, "text": ["bad", "good"][label]}
        for label in (0, 1) * 16
    ]
    return Problem(
        model=Toy,
        train=items[:16],
        validation={"all": items[16:24]},
        test={"all": items[24:]},
        collator=collate,
        targets=("first", "second"),
        head=("head",),
    )


TUCKA = experiment(adapter="TuckAConfig", config={"r": 2, "k": 2, "routing": "sample"})


def test_every_experiment_can_be_read_and_none_searches_more_than_the_others():
    experiments = read_all()
    assert len(experiments) == len(list(FOLDER.glob("**/*.toml"))) > 10
    budgets = {one.name: len(one.learning_rates) for one in experiments if one.kind != "words"}
    assert budgets.pop("tucka") == 1  # what the documents recommend, and nothing else
    assert set(budgets.values()) == {3}


def test_unknown_key_of_an_experiment(tmp_path):
    (tmp_path / "odd.toml").write_text('label = "odd"\nrnk = 3\n')
    with pytest.raises(ValueError, match="rnk"):
        read(tmp_path / "odd.toml")
    with pytest.raises(ValueError, match="absent"):
        read_all(["absent"], tmp_path)


def test_an_edited_experiment_is_another_one():
    assert experiment(config={"r": 4}).key != experiment(config={"r": 8}).key
    assert experiment(label="New name").key == experiment().key


def test_results_of_the_first_default_count_for_batch_routing_and_for_no_other():
    first = {"routing": "batch", "factor_norm": None}
    configs = ({}, first, {**first, "routing": "sample"}, {"routing": "batch"})
    keys = [experiment(adapter="TuckAConfig", config={"r": 4, **config}).key for config in configs]
    assert len(set(keys)) == 4
    assert keys[1] == "980253dda6f6"  # the hash of {"r": 4} alone
    folders = (FOLDER, *studies_report.STUDIES.iterdir())
    asked = {(one.name, one.key) for folder in folders for one in read_all(None, folder)}
    assert {(one["experiment"], one["key"]) for one in run.read_results(run.RESULTS)} <= asked


def test_first_seed_searches_and_the_others_take_the_best_by_validation():
    plan = run.Plan(["sentences"], "quick", [experiment()], [0, 1])
    assert [(one.learning_rate, one.seed) for one in plan.runs([])] == [(1e-2, 0), (1e-1, 0)]
    half = [record(1e-2, 0, validation=0.7, test=0.1)]
    assert [(one.learning_rate, one.seed) for one in plan.runs(half)] == [(1e-1, 0)]
    searched = [*half, record(1e-1, 0, validation=0.6, test=0.9)]
    assert [(one.learning_rate, one.seed) for one in plan.runs(searched)] == [(1e-2, 1)]
    assert list(plan.runs([*searched, record(1e-2, 1, validation=0.5)])) == []


def test_unsupported_experiment_is_not_tried_again():
    plan = run.Plan(["sentences"], "quick", [experiment(learning_rates=(1e-2,))], [0, 1])
    assert list(plan.runs([record(1e-2, 0, validation=0.0, unsupported="no")])) == []


def test_finished_runs_survive_a_cut_line(tmp_path):
    run.append(tmp_path, record(1e-2, 0, 0.5))
    path = tmp_path / "sentences.jsonl"
    with path.open("a") as file:
        file.write('{"task": "sente')
    run.append(tmp_path, record(1e-1, 0, 0.5))
    assert [one["learning_rate"] for one in run.read_results(tmp_path)] == [1e-2, 1e-1]


@pytest.mark.parametrize(
    ("changes", "adapters"),
    [
        ({"kind": "features"}, 0),
        ({"adapter": "LoraConfig", "config": {"r": 2}}, 48),
        ({"adapter": "HRAConfig", "config": {"r": 2}}, 24),
        ({"adapter": "TuckAConfig", "config": {"r": 2, "k": 2, "routing": "sample"}}, 2 * (4 + 16 + 12) + 24),
    ],
    ids=["head", "lora", "hra", "tucka"],
)
def test_adapters_and_head_are_counted_and_nothing_else_trains(problem, changes, adapters):
    model = adapt(Toy(0), experiment(**changes), problem, seed=0)
    assert trainable(model, problem.head) == (adapters, 14)


def test_a_run_tells_accuracy_load_and_cost(problem):
    result = run_adapter(TUCKA, problem, replace(SIZES, epochs=10), learning_rate=1e-2, head_rate=1e-1, seed=0)
    assert result["test"]["all"] > 0.6
    assert sum(result["test_load"]) == 8
    assert 0 <= result["load_entropy"] <= 1
    assert result["log"][-1]["train_loss"] > 0


@pytest.mark.heavy
def test_a_run_repeats_exactly(problem):
    results = [run_adapter(TUCKA, problem, SIZES, learning_rate=1e-2, head_rate=1e-1, seed=3) for _ in range(2)]
    assert results[0]["log"][0]["loss"] == results[1]["log"][0]["loss"]
    assert results[0]["test"] == results[1]["test"]


def test_a_method_that_cannot_adapt_the_model_says_so(problem):
    convolution, targets = nn.Sequential(nn.Conv2d(2, 2, 1)), replace(problem, targets=("0",), head=())
    with pytest.raises(Unsupported, match="Conv2d"):
        adapt(convolution, experiment(adapter="LilyConfig", config={"r": 2}), targets, seed=0)


def test_a_mistake_does_not_count_as_a_method_that_cannot_adapt_the_model(problem):
    odd = replace(problem, targets=("nothing",))
    with pytest.raises(ValueError, match="No modules were targeted"):
        adapt(Toy(0), experiment(adapter="LoraConfig", config={"r": 2}), odd, seed=0)


def test_words_need_words(problem):
    assert run_words(problem)["test"] == {"all": 1.0}
    wordless = replace(problem, train=[{"labels": 0}])
    with pytest.raises(Unsupported, match="words"):
        run_words(wordless)


def test_report_shows_paired_differences_at_the_chosen_rate(tmp_path):
    peer = experiment(name="lora_r8", label="LoRA r=8")
    for seed, difference in enumerate((0.02, 0.04)):
        for rate, validation in ((1e-2, 0.9), (1e-1, 0.8)):
            run.append(tmp_path, record(rate, seed, validation, test=0.5 + difference * (rate == 1e-2)))
            run.append(tmp_path, record(rate, seed, validation, test=0.5, name="lora_r8", key=peer.key))
    text = report.write(tmp_path, [experiment(), peer])
    assert "| Some | 10 | 0.01 | 2 | 53.00% ± 1.41% | +3.00 ± 1.00 |" in text
    assert (tmp_path / "sentences-quick.svg").stat().st_size > 0
    assert json.loads((tmp_path / "sentences.jsonl").read_text().splitlines()[0])["seed"] == 0


def test_report_of_both_tasks_is_paired_by_seed(tmp_path):
    peer = experiment(name="lora_r8", label="LoRA r=8", learning_rates=(1e-2,))
    other = replace(peer, name="some", label="Some")
    for task, gain in (("sentences", 0.0), ("reviews", 0.04)):
        for seed in (0, 1):
            changes = {"task": task, "key": peer.key}
            run.append(tmp_path, record(1e-2, seed, 0.5, test=0.5 + 0.1 * seed, name="lora_r8", **changes))
            run.append(tmp_path, record(1e-2, seed, 0.5, test=0.5 + 0.1 * seed + gain, **changes))
    text = report.write(tmp_path, [other, peer])
    assert "| Some | 10 | 57.00% | +2.00 ± 0.00 |\n| LoRA r=8 | 10 | 55.00% |  |" in text


def test_report_leaves_out_an_unfinished_search(tmp_path):
    run.append(tmp_path, record(1e-2, 0, 0.9))
    assert "Some" not in report.write(tmp_path, [experiment()])


def test_the_committed_page_of_movements_is_made_from_its_results():
    measured = json.loads((run.RESULTS / "movement.json").read_text())
    assert movement.page(measured) == (run.RESULTS / "movement.md").read_text()


def test_a_window_reaches_as_far_as_accuracy_is_near_the_best_without_a_gap():
    one = windows.Window(experiment(), {1e-3: (0.6,), 2e-3: (0.805, 0.795), 4e-3: (0.81,), 8e-3: (0.7,), 1e-2: (0.81,)})
    assert one.best == 4e-3
    assert (one.ends(0.01), one.ends(0.2), one.ends(0.3)) == ((2e-3, 4e-3), (2e-3, 1e-2), (1e-3, 1e-2))
    assert (one.reaching(0.81), one.reaching(0.7), one.reaching(0.82)) == ((4e-3, 4e-3), (2e-3, 1e-2), None)


def test_windows_compare_rates_with_the_same_seeds():
    own = experiment()
    runs = [record(rate, seed, 0.5, rate, own.name, key=own.key) for rate in (0.1, 0.2, 0.3, 0.4) for seed in (0, 1)]
    runs += [record(0.5, 0, 0.5, 0.9, own.name, key=own.key), record(0.1, 2, 0.5, 0.9, own.name, key=own.key)]
    (found,) = windows.windows(runs, [own])
    assert found.means == {0.1: 0.1, 0.2: 0.2, 0.3: 0.3, 0.4: 0.4}
    assert windows.windows(runs[:6], [own]) == []


def test_a_method_has_one_colour_in_all_panels_and_no_other_has_it(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(windows, "save", lambda figure, path: drawn.update({path.name: figure}))
    made = [windows.Window(one, {1e-3: (0.5,), 2e-3: (0.6,)}) for one in read_all(list(windows.METHODS)[:8])]
    windows.draw({"one": made, "another": made[::-1][:5]}, tmp_path / "windows.svg")
    lines = [line for axes in drawn["windows.svg"].axes for line in axes.lines]
    colours = {}
    for line in lines:
        colours.setdefault(line.get_label(), set()).add(line.get_color())
    assert len(lines) == 13
    assert {len(own) for own in colours.values()} == {1}
    assert len(set.union(*colours.values())) == 8


def test_a_grid_of_rates_runs_with_every_seed():
    plan = run.Plan(["reviews"], "quick", [experiment()], [0, 1], [1e-3, 2e-3])
    asked = [(one.seed, one.learning_rate) for one in plan.runs([])]
    assert asked == [(0, 1e-3), (0, 2e-3), (1, 1e-3), (1, 2e-3)]
    assert len(list(plan.runs([record(1e-3, 0, 0.5) | {"task": "reviews"}]))) == 3
