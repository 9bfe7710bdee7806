"""The demo: its training, and a whole run of it, on a tiny model with random weights."""

import json
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from examples import sentence_classifier
from examples.data import DOMAINS, DataError, Sentence
from examples.demo import __main__ as demo
from examples.demo import experiment, training
from examples.demo.training import HEAD_ONLY, LORA, TUCKA, Data, Outcome, Plan, fit, pooled, predict, train_method
from examples.sentence_classifier import (
    Collator,
    FeatureHead,
    LengthBatches,
    SentenceClassifier,
    encode,
    load_classifier,
)

GOOD, BAD = ["good", "fine", "great"], ["bad", "poor", "awful"]
WORDS = ["[PAD]", *GOOD, *BAD, "film", "phone", "vote", "lol", "very", "a", "the"]
PLAN = Plan(train_per_domain=24, test_per_domain=10, epochs=2, batch_size=8, max_length=12, rank=2, groups=2)


def sentences(domain: str, count: int) -> list[Sentence]:
    rng = np.random.default_rng(sorted(DOMAINS).index(domain))
    rows = []
    for index in range(count):
        label = index % 2
        filler = rng.choice(WORDS[7:], size=rng.integers(1, 8))
        rows.append(Sentence(domain, " ".join([*filler, str(rng.choice(GOOD if label else BAD))]), label))
    return list(dict.fromkeys(rows))


class Tokenizer:
    pad_token_id = 0

    def __call__(self, texts, *, truncation, max_length):
        assert truncation
        return {"input_ids": [[WORDS.index(word) for word in text.split()][:max_length] for text in texts]}


def tiny_classifier(*, seed: int):
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same "pretrained" encoder, whatever the seed of the head
        config = BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
        encoder = BertModel(config, add_pooling_layer=False)
    return SentenceClassifier(encoder, 16, seed=seed).eval(), Tokenizer()


@pytest.fixture
def items():
    return encode(Tokenizer(), sentences("movies", 40), max_length=12)


# Training


def test_batches_of_similar_length_cover_every_item_once_and_change_between_epochs():
    lengths = list(range(1, 31)) * 2
    torch.manual_seed(0)
    batches = LengthBatches(lengths, 8)
    first, second = list(batches), list(batches)
    assert first != second
    for epoch in (first, second):
        assert sorted(index for batch in epoch for index in batch) == list(range(60))
        assert len(epoch) == len(batches) == 8
        assert max(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in epoch) <= 9
    torch.manual_seed(0)
    assert list(batches) == first


def test_predictions_come_in_the_order_of_the_items_and_do_not_depend_on_padding(items):
    classifier, tokenizer = tiny_classifier(seed=1)
    collator = Collator(tokenizer.pad_token_id)
    together = predict(classifier, items, collator)
    alone = torch.cat([predict(classifier, [item], collator) for item in items])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    features = torch.stack([row["features"] for row in pooled(classifier, items, collator)])
    torch.testing.assert_close(classifier.head(features), together, rtol=0, atol=1e-6)


def test_a_collator_pads_with_its_token_and_masks_the_padding(items):
    batch = next(iter(DataLoader(items, batch_size=8, collate_fn=Collator(9))))
    lengths = torch.tensor([len(item["input_ids"]) for item in items[:8]])
    assert torch.equal(batch["attention_mask"].sum(1), lengths)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 9).all()
    assert batch["labels"].tolist() == [item["labels"] for item in items[:8]]


@pytest.mark.slow
def test_training_again_with_the_same_seed_gives_the_same_weights(items):
    heads = []
    for _ in range(2):
        classifier, tokenizer = tiny_classifier(seed=1)
        collator = Collator(tokenizer.pad_token_id)
        head = FeatureHead(classifier.head)
        log = fit(head, pooled(classifier, items, collator), collator, PLAN, 0.1, [])
        heads.append(classifier.head.weight)
        assert log[0]["loss"] > log[-2]["loss"]
    assert torch.equal(*heads)


@pytest.mark.parametrize("files", [{}, {"config.json": '{"model_type": "bert"}', "model.safetensors": "half"}], ids=len)
def test_a_damaged_model_is_one_line_with_its_cure(tmp_path, monkeypatch, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sentence_classifier, "model_folder", lambda: tmp_path)
    with pytest.raises(DataError, match="pip install --force-reinstall") as error:
        load_classifier(seed=0)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


# A whole run

COMMITTED = Path(demo.__file__).parents[2] / "benchmarks" / "results" / "demo-cpu.json"


class InThisProcess:
    """In place of a pool of fresh processes, which would not have the tiny things of these tests."""

    def __init__(self, *_args, **_kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


@pytest.fixture
def tiny_demo(monkeypatch):
    """Put tiny things in place of all that is large."""
    monkeypatch.setattr(experiment, "load_classifier", tiny_classifier)
    monkeypatch.setattr(experiment, "read_domains", lambda _path: {name: sentences(name, 80) for name in DOMAINS})
    monkeypatch.setattr(experiment, "fetch_sentences", lambda: None)
    monkeypatch.setattr(experiment, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(experiment, "_PACKAGES", ("torch", "peft"))
    monkeypatch.setattr(demo, "fetch_sentences", lambda: Path("sentences"))
    monkeypatch.setattr(training, "Plan", lambda **changes: Plan(**{**vars(PLAN), **changes}))


def shape_of(value):
    """Return a result file's keys and types, without those of versions."""
    if isinstance(value, dict):
        return {key: shape_of(entry) for key, entry in value.items() if key != "versions"}
    return [shape_of(value[0])] if isinstance(value, list) and value else type(value)


def test_a_run_writes_an_adapter_that_predicts_the_same_and_every_number_it_shows(tiny_demo, tmp_path, capsys):
    assert demo.main(["--out", str(tmp_path / "demo"), "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["reloaded"] == {"sentences": 40, "identical": True, "difference": 0.0}
    assert "identical, bit for bit" in shown
    assert results["plan"]["seed"] == 3
    assert [row["method"] for row in results["methods"]] == ["larger class", HEAD_ONLY, LORA, TUCKA]
    for row in results["methods"]:
        assert f"{row['mean']:.3f}" in shown
        assert list(row["accuracy"]) == list(DOMAINS)
    trained = results["methods"][1:]
    assert len({row["head_parameters"] for row in trained}) == 1
    assert trained[0]["adapter_parameters"] == 0 < trained[2]["adapter_parameters"] < trained[1]["adapter_parameters"]
    load = trained[2]["load"]
    assert sum(load["training"]) == 24 * 4 * 2
    assert all(sum(load[domain]) == 10 for domain in DOMAINS)
    assert any("tucka/load_entropy" in entry for entry in trained[2]["log"])
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"adapter", "figure.png", "results.json"}


def test_the_results_have_the_form_of_the_committed_ones(tiny_demo, tmp_path):
    demo.main(["--out", str(tmp_path)])
    results, committed = json.loads((tmp_path / "results.json").read_text()), json.loads(COMMITTED.read_text())
    assert shape_of(results) == shape_of(committed)
    assert [shape_of({**row, "log": []}) for row in results["methods"]] == [
        shape_of({**row, "log": []}) for row in committed["methods"]
    ]


@pytest.mark.slow
def test_the_methods_see_the_same_batches(monkeypatch):
    seen: dict[str, list] = {}
    call = Collator.__call__

    def spy(self, items):
        if torch.is_grad_enabled():
            seen.setdefault(method, []).append([tuple(item["input_ids"]) for item in items])
        return call(self, items)

    monkeypatch.setattr(Collator, "__call__", spy)
    for method in (LORA, TUCKA):
        classifier, tokenizer = tiny_classifier(seed=0)
        rows = encode(tokenizer, [row for domain in DOMAINS for row in sentences(domain, 24)], max_length=12)
        train_method(method, classifier, Data(rows, {"tweets": rows[:10]}, Collator(0)), PLAN)
    steps = len(seen[LORA])
    assert steps == 2 * -(-len(rows) // 8)
    assert seen[TUCKA][-steps:] == seen[LORA]


LOGITS = {"news": torch.zeros(3, 2), "tweets": torch.ones(2, 2)}


@pytest.mark.parametrize("change", [0.0, 2**-23])
def test_a_comparison_sees_one_changed_bit(monkeypatch, change):
    again = {name: rows.numpy().copy() for name, rows in LOGITS.items()}
    again["tweets"][1, 1] += change
    monkeypatch.setattr(experiment, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(experiment, "predict_again", lambda *_args: again)
    found = experiment.reload(Path("adapter"), PLAN, LOGITS)
    assert found == {"sentences": 5, "identical": not change, "difference": change}


def test_an_adapter_that_does_not_load_as_it_was_is_an_error(monkeypatch):
    monkeypatch.setattr(experiment, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(
        experiment, "predict_again", lambda *_args: {name: rows.numpy() + 1 for name, rows in LOGITS.items()}
    )
    with pytest.raises(DataError, match=r"adapter: .*predictions"):
        experiment.reload(Path("adapter"), PLAN, LOGITS)


def test_the_error_of_a_mean_is_that_of_independent_test_sentences():
    assert Outcome("some", "", {"news": 0.9}).error(900) == pytest.approx(0.01)
    assert Outcome("some", "", {"news": 0.9, "mail": 0.9}).error(900) == pytest.approx(0.01 / 2**0.5)


# Starting


def fails(capsys, arguments, *words, code=1):
    """Assert the exit code and the one line on standard error."""
    assert demo.main(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("demo: ")
    assert [word for word in words if word not in line] == []


def test_only_fetching_writes_nothing(tiny_demo, tmp_path, capsys):
    assert demo.main(["--fetch-only", "--out", str(tmp_path / "out")]) == 0
    assert "sentences" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "train"), [([], 400), (["--full"], None)])
def test_the_options_change_the_plan(monkeypatch, tmp_path, options, train):
    plans = []
    monkeypatch.setattr(demo, "fetch_sentences", lambda: None)
    monkeypatch.setattr(experiment, "run_experiment", lambda plan, *_rest: plans.append(plan))
    assert demo.main([*options, "--out", str(tmp_path), "--seed", "7"]) == 0
    assert plans == [Plan(seed=7, train_per_domain=train)]


@pytest.mark.parametrize("seed", ["-1", str(2**32), "some"])
def test_a_seed_that_no_generator_takes_is_refused(capsys, seed):
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--seed", seed])
    assert stopped.value.code == 2
    assert "--seed" in capsys.readouterr().err


def test_an_output_folder_that_is_a_file_is_one_clear_line(tiny_demo, tmp_path, capsys):
    (tmp_path / "demo").write_text("a file")
    fails(capsys, ["--out", str(tmp_path / "demo")], str(tmp_path / "demo"))


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (DataError("sentences: expected some,\ngot none"), 1, ["expected some, got none"]),
        (OSError(28, "No space left on device", "demo"), 1, ["No space left", "demo"]),
        (ModuleNotFoundError(name="peft"), 1, ["peft", "pip install"]),
        (KeyboardInterrupt(), 130, ["interrupted"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_fails_is_told_in_one_line(monkeypatch, capsys, error, code, words):
    def fetch():
        raise error

    monkeypatch.setattr(demo, "fetch_sentences", fetch)
    fails(capsys, [], *words, code=code)
