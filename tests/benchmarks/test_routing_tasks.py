"""The benchmark of several tasks in one adapter, on a tiny encoder and made-up texts, and its report."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks.quality.problem import Sizes
from benchmarks.routing import tasks, tasks_report, tasks_study
from examples.data import DOMAINS, Sentence

SIZES = Sizes(train=16, validation=8, test=8, epochs=1, batch_size=8)
WIDTH = 16


def tiny_encoder():
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    encoder = BertModel(BertConfig(vocab_size=50, **sizes), add_pooling_layer=False).requires_grad_(False).eval()
    encoder.embeddings = tasks.Given()
    return encoder


def made_up_texts(name, sizes):
    drawn = torch.Generator().manual_seed(list(tasks.QUESTIONS).index(name))

    def items(count):
        labels = torch.arange(count) % tasks.QUESTIONS[name].classes
        lengths = torch.randint(2, 6, (count,), generator=drawn)
        states = [torch.randn(int(length), WIDTH, generator=drawn) for length in lengths]
        return [{"states": row, "labels": label} for row, label in zip(states, labels.tolist(), strict=True)]

    return tasks.Texts(items(sizes.train), items(sizes.validation), items(sizes.test))


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(tasks, "upper_half", tiny_encoder)
    for module in (tasks, tasks_study):
        monkeypatch.setattr(module, "texts_of", made_up_texts)


@pytest.mark.parametrize("name", tasks.METHODS)
def test_each_method_trains_on_all_tasks(stand_ins, name):
    found = tasks_study.together(name, tasks.FOUR, 1e-2, 0, SIZES)
    assert list(found["test"]) == list(found["validation"]) == list(tasks.FOUR)
    assert (found["parameters"] == 0) == (name == "head")


def test_parameters_of_adapters_apart_and_of_groups(stand_ins):
    count = {name: tasks.parameters_of(tasks.Learner(tasks.METHODS[name], ["positive"], 0)) for name in tasks.METHODS}
    assert tasks_study.together("loras_r8", tasks.FOUR, 1e-2, 0, SIZES)["parameters"] == 4 * count["lora_r8"]
    four = tasks.parameters_of(tasks.Learner(tasks.METHODS["tucka_given"], tasks.FOUR, 0))
    assert four - count["tucka_given"] == 3 * 5 * 2 * 8 * 8  # for each further group p·r² numbers in each layer


def test_batches_of_a_task_depend_on_the_task_and_the_seed_alone(stand_ins):
    def batches(*arguments):
        return [[row["labels"] for row in rows] for rows in tasks.batches_of(*arguments)]

    first = batches("quarter", SIZES, 0)
    torch.manual_seed(5)
    assert batches("quarter", SIZES, 0) == first != batches("quarter", SIZES, 1)


def test_cores_apart_are_orthogonal_and_leave_the_start_as_it_is(stand_ins):
    batch, _ = tasks.inputs(made_up_texts("positive", SIZES).test)
    alike, apart = (
        tasks.Learner(tasks.METHODS[name], tasks.FOUR, 0).eval() for name in ("tucka_given", "tucka_given_apart")
    )
    torch.testing.assert_close(alike("positive", **batch), apart("positive", **batch), rtol=0, atol=1e-6)
    cores = [value.flatten(1) for name, value in apart.named_parameters() if name.endswith("cores")]
    assert len(cores) == 5
    for core in cores:
        products = core @ core.T
        torch.testing.assert_close(products, products.diagonal().diag())
        assert (products.diagonal() > 0).all()


def test_a_task_added_as_a_core_leaves_the_others_as_they_are(stand_ins):
    found = tasks_study.added("tucka_given", "five stars", 1e-2, 0, SIZES)
    assert found["ways"].keys() == {"core", "mean core"}
    for way in found["ways"].values():
        assert {task: way["after"][task] for task in found["before"]} == found["before"]
        assert way["parameters"] == 5 * 2 * 8 * 8


@pytest.mark.parametrize("way", ["core", "mean core", "adapter", "head"])
def test_what_changes_when_a_task_is_added(stand_ins, way):
    method = "tucka_given" if "core" in way else "lora_r8"
    learner = tasks.Learner(tasks.METHODS[method], tasks.FOUR[:3], 0).eval()
    batch, _ = tasks.inputs(made_up_texts("positive", SIZES).test)
    before = learner("positive", **batch)
    learner.add_head("five stars")
    parts = tasks_study.parts_to_train(learner, "five stars", way)
    assert bool(parts) == (way != "head")
    groups = [{"params": [*learner.heads["five stars"].parameters(), *parts], "lr": 0.1}]
    old = learner.heads["five stars"].weight.clone()
    tasks.train(learner, ["five stars"], groups, sizes=SIZES, seed=0)
    assert not torch.equal(learner.heads["five stars"].weight, old)
    assert torch.equal(learner("positive", **batch), before) == (way != "adapter")


def test_texts_to_train_on_are_of_one_task_only(monkeypatch):
    sentences = {
        domain: [Sentence(domain, f"{domain} {number}", number % 2, (number + 0.5) / 30 - 1) for number in range(60)]
        for domain in DOMAINS
    }
    reviews = [Sentence("reviews", f"review {number}", number % 2) for number in range(60)]
    known = {}

    def tokenizer(texts, **_options):
        return {"input_ids": [[known.setdefault(text, len(known))] for text in texts]}

    class Encoder(torch.nn.Module):
        def forward(self, input_ids):
            return SimpleNamespace(last_hidden_state=input_ids)

    monkeypatch.setattr(tasks, "rated_sentences", lambda: sentences)
    monkeypatch.setattr(tasks, "load_reviews", lambda: (reviews[:40], reviews[40:]))
    monkeypatch.setattr(tasks, "lower_half", lambda: (Encoder(), tokenizer))
    tasks.cuts.cache_clear()
    found = {name: tasks.texts_of.__wrapped__(name, SIZES) for name in tasks.QUESTIONS}
    tasks.cuts.cache_clear()
    trained = [int(item["states"][0]) for texts in found.values() for item in texts.train]
    assert len(trained) == len(set(trained)) == 6 * SIZES.train
    held = {int(item["states"][0]) for texts in found.values() for item in [*texts.validation, *texts.test]}
    assert not held & set(trained)
    assert {item["labels"] for item in found["quarter"].test} == {0, 1, 2, 3}
    both = zip(found["yes if positive"].test, found["yes if negative"].test, strict=True)
    assert all(one["labels"] + other["labels"] == 1 for one, other in both)


def row(method, rate, seed, test, validation=0.5, name="four", **more):
    tested = dict.fromkeys(tasks.FOUR, test)
    return {
        "key": f"{name} {method} {rate} {seed}",
        "set": name,
        "method": method,
        "rate": rate,
        "seed": seed,
        "parameters": 4000,
        "validation": dict.fromkeys(tasks.FOUR, validation),
        "test": tested,
        "sizes": vars(SIZES),
        "versions": {"torch": "2"},
        "device": "cpu",
        "commit": "abc",
    } | more


def test_report(tmp_path):
    rows = [row("lora_r8", 1e-3, seed, 0.7 + 0.1 * seed) for seed in (0, 1)]
    rows += [row("lora_r8", 1e-2, 0, 0.9, validation=0.4)]  # another rate, which validation did not choose
    rows += [row("tucka_given", 1e-3, seed, 0.72 + 0.12 * seed) for seed in (0, 1)]
    rows += [row("head", 1e-3, 0, 0.6), row("loras_r8", 1e-3, 0, 0.65)]
    before = dict.fromkeys(tasks.FOUR[:3], 0.5)
    way = {"rate": 0.1, "parameters": 10, "after": before | {"quarter": 0.4, "five stars": 0.8}}
    rows += [row("tucka_given", 1e-3, 0, 0, name="later: five stars", before=before, ways={"core": way})]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    page = tasks_report.write_report(path)
    assert path.with_suffix(".md").read_text() == page
    assert "| one LoRA r=8 | 4,000 | 0.001 | 2 | 75.0 | 75.0 | 75.0 | 75.0 | 75.0 ± 5.0 |  |" in page
    assert "| 78.0 ± 6.0 | +3.0 ± 1.0 |" in page
    assert "| a LoRA r=8 of its own; a new head | 1,000 | 1 | 65.0 | none: apart |" in page
    assert "a new core from zero; a new head | 10 | 1 | 80.0 | -3.3 |" in page


def test_a_run_continues_where_it_stopped(tmp_path, monkeypatch, capsys):
    asked = []

    def together(method, names, rate, seed):
        asked.append((method, rate, seed))
        return {"parameters": 1, "test": dict.fromkeys(names, 0.5), "validation": dict.fromkeys(names, rate)}

    monkeypatch.setattr(tasks_study, "together", together)
    options = {"seeds": 1, "only": ["lora_r8"], "path": tmp_path / "tasks.jsonl"}
    tasks_study.run("opposite", **options)
    assert asked == [("lora_r8", rate, 0) for rate in tasks_study.RATES]
    tasks_study.run("opposite", **options | {"seeds": 2})
    assert asked[len(tasks_study.RATES) :] == [("lora_r8", max(tasks_study.RATES), 1)]
    with pytest.raises(SystemExit, match="four: run lora_r8 first"):
        tasks_study.run("later", **options)
