"""The paper's experiments: their files against the paper, and each of them on tiny stand-ins of models and data."""

import json
from collections import Counter
from dataclasses import replace
from decimal import ROUND_HALF_UP, Decimal
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("datasets", reason="the extra 'paper' is not installed")
pytest.importorskip("math_verify", reason="the extra 'paper' is not installed")

import datasets
from accelerate.commands.config.config_args import load_config_from_file
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from benchmarks.paper import report, results, run
from benchmarks.paper.adapted_model import adapted, parameter_counts, peft_config
from benchmarks.paper.experiments import FOLDER, TABLES, read_experiment, read_variants
from benchmarks.paper.images import class_of, few_shots
from benchmarks.paper.mathematics import is_right, prompted, tokenized
from benchmarks.paper.metrics import METRICS
from benchmarks.paper.standins import stand_in
from benchmarks.paper.training import Run, perform
from support import tiny_models
from tucka.core.counts.paper_tables import paper_counts
from tucka.errors import ConfigError
from tucka.peft import TuckAConfig, initialize_router

EXPERIMENTS = {name: read_experiment(name) for name in TABLES}
VARIANTS = read_variants()
# Every task of every table, every method, and every way to run TuckA, each at least once.
RUNS = [
    ("table1", "cola", "lora-r8", None),
    ("table1", "mrpc", "dora-r8", None),
    ("table1", "qnli", "vera-r1024", None),
    ("table1", "qqp", "oft-b8", None),
    ("table1", "rte", "boft-b8", None),
    ("table1", "sst2", "hra-r8", None),
    ("table1", "mrpc", "tucka-r2-k4", "authors"),
    ("table2", "cifar100", "tucka-r2-k5", "equations"),
    ("table2", "food101", "tucka-r6-k1", "defaults"),
    ("table2", "caltech256", "hra-r8", None),
    ("table3", "metamath", "tucka-r16-k4", "authors"),
    ("table3", "metamath", "dora-r32", None),
]
# The sizes of the hub's models; vocabularies, which are not adapted, are small.
FULL_SIZE = {
    "table1": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=10
        )
    ),
    "table2": lambda: ViTForImageClassification(ViTConfig()),
    "table3": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=10)),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The experiments on stand-ins, by name; made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield cache(lambda name: stand_in(EXPERIMENTS[name], tmp_path_factory.mktemp(name)))
        datasets.enable_progress_bars()


def run_of(experiment, task, row, variant=None, seed=0):
    chosen = experiment.tasks[task]
    rate = chosen.training.learning_rate
    return Run(experiment, chosen, experiment.rows[row], VARIANTS[variant] if variant else None, seed, rate)


# Peers run in the whole suite: what is ours in them is the file, which other tests read.
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if case[3] or case[1] == "cola" else pytest.mark.slow) for case in RUNS],
    ids=lambda case: "-".join(filter(None, case)),
)
def test_runs_on_stand_ins(small, case):
    name, task, row, variant = case
    experiment = small(name)
    outcome = perform(run_of(experiment, task, row, variant))
    columns = [column for column in experiment.columns if column.task == task and column.is_metric]
    assert set(outcome["metrics"]) == {column.measure for column in columns}
    for values in outcome["metrics"].values():
        assert -1 <= values["final"] <= values["best"] <= 1
    losses = [entry["train_loss"] for entry in outcome["log"] if "train_loss" in entry]
    assert len(losses) == 1
    assert losses[0] > 0
    assert outcome["parameters"]["adapter"] > 0
    assert (outcome["parameters"]["head"] > 0) == bool(experiment.model.head)
    assert outcome["peak_memory_bytes"] > 0
    if variant:
        assert len(outcome["expert_load"]) == experiment.rows[row].sizes["k"]
        assert sum(outcome["expert_load"]) > 0


def test_a_finished_run_is_kept_reported_and_not_run_again(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "read_experiment", small)
    options = ["table3", "--rows", "tucka-r16-k4", "--variants", "equations", "--results", str(tmp_path)]
    run.main(options)
    (path,) = tmp_path.rglob("*.json")
    result = json.loads(path.read_text())
    assert path.relative_to(tmp_path).parts == ("table3", "metamath", "tucka-r16-k4-equations-seed0.json")
    known = {"versions", "commit", "device", "seed", "seconds", "peak_memory_bytes", "parameters", "learning_rate"}
    assert known <= result.keys()
    monkeypatch.setattr(run, "perform", lambda *_: pytest.fail("it was run again"))
    run.main(options)
    lines = report.table(EXPERIMENTS["table3"], results.read_results(tmp_path)).splitlines()
    here = next(line for line in lines if "the paper's equations" in line)
    count, *cells = [cell.strip() for cell in here.strip("|").split("|")][2:]
    assert count == f"{result['parameters']['adapter']:,}"
    assert cells == [f"{100 * result['metrics'][name]['best']:.2f}" for name in ("math", "gsm8k")]
    path.write_text(json.dumps({**result, "smoke": True}))
    assert results.read_results(tmp_path) == []


def test_smoke_prints_a_result_and_keeps_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    run.main(["table2", "--tasks", "cifar100", "--rows", "lora-r8", "--smoke", "--results", str(tmp_path / "results")])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert json.loads(line)["smoke"] is True
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_those_of_the_papers_tables(name):
    experiment = EXPERIMENTS[name]
    cells = [experiment.count(row) for row in experiment.rows.values()]
    assert cells == [cell for cell in paper_counts() if cell.table == experiment.table]


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_the_papers_averages_are_the_means_of_its_figures(name):
    experiment = EXPERIMENTS[name]
    for row in experiment.rows.values():
        figures = dict(zip(experiment.columns, map(str, row.paper), strict=True))
        parts = [Decimal(figure) for column, figure in figures.items() if column.is_metric]
        (average,) = (Decimal(figure) for column, figure in figures.items() if column.measure == "average")
        assert (sum(parts) / len(parts)).quantize(Decimal("0.01"), ROUND_HALF_UP) == average


@pytest.mark.each_value
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("method", ["lora", "tucka"])
def test_targets_are_the_papers_layers_in_models_of_full_size(name, method):
    experiment = EXPERIMENTS[name]
    row = next(row for row in experiment.rows.values() if row.method == method)
    variant = VARIANTS["equations"] if method == "tucka" else None
    with torch.device("meta"):
        model = adapted(FULL_SIZE[name](), peft_config(experiment, row, variant, 0), experiment.model.layers)
    assert parameter_counts(model)["adapter"] == experiment.count(row).count


def test_other_layers_than_the_papers_are_refused():
    experiment = EXPERIMENTS["table2"]
    fewer = replace(experiment, model=replace(experiment.model, targets=["q_proj", "v_proj"]))
    config = peft_config(fewer, experiment.rows["lora-r8"], None, 0)
    message = r"targets: .*768, 3072.*ViT-base"
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        adapted(FULL_SIZE["table2"](), config, "ViT-base")


@pytest.mark.parametrize("name", TABLES)
def test_variants_are_what_they_are_called(name):
    experiment = EXPERIMENTS[name]
    row = next(row for row in experiment.rows.values() if row.method == "tucka")
    configs = {key: peft_config(experiment, row, variant, 3) for key, variant in VARIANTS.items()}
    assert all(config.router_seed == 3 for config in configs.values())
    routing = {key: config.routing for key, config in configs.items()}
    assert routing == {"equations": "batch", "authors": "batch", "defaults": None}
    assert (configs["equations"].affinity, configs["equations"].gate_norm) == ("dot", True)
    assert configs["equations"].factor_norm is None
    starts = {key: config.spec.initialization for key, config in configs.items()}
    assert starts == {"equations": "dai", "authors": "dai", "defaults": "balanced"}
    authors = configs["authors"]
    assert (authors.affinity, authors.gate_norm, authors.factor_norm) == ("group_norm", False, "frobenius")
    assert authors.alpha == {"table1": 2, "table2": 1, "table3": 512}[name]
    plain = TuckAConfig(router_seed=3, **row.sizes)
    same = ("affinity", "gate_norm", "factor_norm", "routing", "route_tokens")
    assert all(getattr(configs["defaults"], key) == getattr(plain, key) for key in same)
    rates = {task.training.learning_rate for task in experiment.tasks.values()}
    for key, wanted in (("equations", 2e-3), ("defaults", 4e-3)):  # what the documents say
        assert [configs[key].alpha * rate for rate in rates] == pytest.approx([wanted] * len(rates), rel=0.02)


@pytest.mark.parametrize("name", TABLES)
def test_every_row_has_a_configuration(name):
    experiment = EXPERIMENTS[name]
    for row in experiment.rows.values():
        config = peft_config(experiment, row, VARIANTS["defaults"] if row.method == "tucka" else None, 0)
        assert set(config.target_modules) == set(experiment.model.targets)
        assert set(config.modules_to_save or ()) == set(experiment.model.head)
        settings = vars(config)
        sizes = {settings.get(prefix + name) for name in row.sizes for prefix in ("", "oft_", "boft_")} - {None}
        assert sizes == set(row.sizes.values())
        assert row.options.items() <= settings.items()


@pytest.mark.heavy
def test_an_interrupted_run_goes_on_from_its_checkpoint(small, tmp_path):
    run_ = run_of(small("table3"), "metamath", "tucka-r16-k4", "equations")

    def batches_until(step):
        training = replace(run_.task.training, save_every=1, max_steps=step)
        load = perform(replace(run_, task=replace(run_.task, training=training)), tmp_path)["expert_load"]
        return sum(load), [path.name for path in tmp_path.iterdir()]

    assert batches_until(1) == (1, ["checkpoint-1"])
    assert batches_until(2) == (1, ["checkpoint-2"])


def test_without_results_every_cell_of_ours_says_so(tmp_path, capsys):
    report.main(["--results", str(tmp_path)])
    rows = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    ours = [cell.strip() for row in rows if row[1].strip().startswith("here") for cell in row[2:]]
    assert set(ours) == {report.NOT_RUN}
    assert Counter(row[1].strip() == "the paper" for row in rows)[True] == 9 + 9 + 4


def test_averages_need_all_tasks_and_take_the_mean_of_seeds():
    experiment = EXPERIMENTS["table2"]

    def result(task, seed, accuracy):
        measured = {"metrics": {"accuracy": {"best": accuracy, "final": 0.0}}, "peak_memory_bytes": 2**30}
        rate = experiment.tasks[task].training.learning_rate
        which = {"experiment": "table2", "task": task, "row": "hra-r8", "variant": None, "learning_rate": rate}
        return {**which, **measured, "seed": seed, "parameters": {"adapter": 589824, "head": 1}}

    def row(found):
        lines = report.table(experiment, found).splitlines()
        (after,) = [lines[place + 1] for place, line in enumerate(lines) if line.startswith("| HRA")]
        return [cell.strip() for cell in after.strip("|").split("|")][2:]

    some = [result("cifar100", 0, 0.8), result("cifar100", 1, 0.9), result("food101", 0, 0.7)]
    assert row(some) == ["589,824", "85.00 (2 seeds)", "70.00", "not run", "not run", "1024 (2 seeds)"]
    assert row([*some, result("caltech256", 0, 0.85)])[4] == "80.00"
    assert row([{**some[0], "learning_rate": 1.0}])[1] == "not run"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("epochs = 20", "epochs = 20\nepoch = 3"), "entry: .*epochs.*epoch"),
        (("epochs = 20\n", ""), "entries: .*epochs"),
        (("paper = [82.71, ", "paper = ["), r"rows\.lora-r8\.paper: .*5.*4"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, change, message):
    text = (FOLDER / "table2.toml").read_text().replace(*change)
    (tmp_path / "table2.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_experiment("table2", tmp_path)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"--rows: .*lora-r8.*lora"):
        run.main(["table1", "--smoke", "--rows", "lora"])


@given(labels=st.lists(st.integers(0, 4), min_size=1).map(lambda some: some * 3), seed=st.integers(0, 99))
def test_shots_are_so_many_different_images_of_each_class(labels, seed):
    drawn = few_shots(labels, 2, seed)
    assert len(set(drawn)) == len(drawn)
    assert Counter(labels[place] for place in drawn) == dict.fromkeys(labels, 2)
    assert drawn == few_shots(labels, 2, seed)


def test_classes_in_names_count_from_one():
    assert [class_of("001_0042.jpg"), class_of("257_0001.jpg"), class_of(7)] == [0, 256, 7]


@settings(max_examples=10)
@given(number=st.integers(0, 10**6), words=st.sampled_from(["", " apples", ".", "\nWhy?"]))
def test_results_are_read_behind_the_mark(number, words):
    assert is_right(str(number), f"First {number + 1}. The answer is: {number:,}{words}")
    assert not is_right(str(number + 1), f"{number + 1}. The answer is: {number}{words}")
    assert not is_right(str(number), f"It is {number}.")


@pytest.mark.parametrize(
    ("result", "said"),
    [(r"\frac{3}{2}", "1.5"), ("x^2+1", "$1 + x^2$."), ("(3,4)", "(3, 4)"), (r"\sqrt{51}", r"\sqrt{51}")],
)
def test_equal_expressions_are_right(result, said):
    assert is_right(result, f"The answer is: {said}")
    assert not is_right("7", f"The answer is: {said}")


def test_only_answers_are_learned(small):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small("table3").model.name)
    prompt = EXPERIMENTS["table3"].tasks["metamath"].data["prompt"]
    question = prompted("what is 1", prompt)
    assert prompted(question, prompt) == question
    item = tokenized(question, " the answer is 2", tokenizer, 512)
    learned = [token for token, label in zip(item["input_ids"], item["labels"], strict=True) if label != -100]
    assert tokenizer.decode(learned) == "the answer is 2 [SEP]"
    cut = tokenized(question, " the answer is 2", tokenizer, 5)
    assert cut["labels"] == [-100] * 5


def test_metrics_are_those_of_table_1():
    labels, predictions = [1, 1, 0, 0], [1, 0, 0, 0]
    assert METRICS["accuracy"](labels, predictions) == 0.75
    assert METRICS["accuracy_f1"](labels, predictions) == pytest.approx((0.75 + 2 / 3) / 2)
    assert METRICS["matthews"](labels, predictions) == pytest.approx(1 / 3**0.5)


def test_accelerates_file_fits_table_3():
    config = load_config_from_file(str(Path(run.__file__).parent / "zero2.yaml"))
    training = EXPERIMENTS["table3"].tasks["metamath"].training
    assert config.deepspeed_config["zero_stage"] == 2
    assert config.deepspeed_config["gradient_accumulation_steps"] == training.accumulation
    assert config.num_processes * training.accumulation * training.batch_size == 32
    assert config.mixed_precision == "bf16"


def test_the_papers_spread_of_centroids_can_be_asked_for():
    from peft import get_peft_model

    def start(affinity, scale):
        config = TuckAConfig(k=3, affinity=affinity, target_modules=["query", "dense"])
        model = get_peft_model(tiny_models.make("bert"), config)
        initialize_router(model, [tiny_models.text()], scale=scale, progress=False)
        return next(tensor for name, tensor in model.named_parameters() if name.endswith("centroids"))

    centroids = start("dot", 10.0).detach().reshape(6, -1)
    spread = (centroids - centroids[0])[1:].abs()
    assert 9 < spread.max() <= 10
    with pytest.raises(ConfigError, match=r"scale: .*router_init='balanced'"):
        start("directional", 10.0)
    with pytest.raises(ConfigError, match=r"scale: .*-1"):
        start("dot", -1.0)
