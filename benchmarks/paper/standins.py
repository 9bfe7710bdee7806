"""Tiny local models and data with the schema of the hub's, so that every experiment can be tried anywhere."""

# They are folders that from_pretrained and load_dataset read, so the code that runs is the same as with the hub.
# Nothing that they give is a result.

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from benchmarks.paper.experiments import Experiment, Task, Training

_WIDTH = 32  # the largest rank of the tables
_SIZES = {"hidden_size": _WIDTH, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
_PIXELS = 16
_CLASSES = 3
_WORDS = ["the", "a", "model", "answer", "is", ":", "1", "2", "3", "4", "good", "bad", "cat", "dog", "runs", "what"]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
_STEPS = 2


def stand_in(experiment: Experiment, folder: Path) -> Experiment:
    """Write a tiny model and tiny data, and return the same experiment on them, a few steps long."""
    torch.manual_seed(0)
    model, data = folder / "model", folder / "data"
    _MODELS[experiment.kind](model)
    tasks = {name: _task(task, data / name, _DATA[experiment.kind]) for name, task in experiment.tasks.items()}
    return replace(experiment, model=replace(experiment.model, name=str(model), layers=None), tasks=tasks)


def _task(task: Task, folder: Path, write: Callable[[Path, Mapping[str, Any]], dict[str, Any]]) -> Task:
    changes = write(folder, task.data)
    return replace(task, training=_shortened(task.training), data={**task.data, "path": str(folder), **changes})


def _shortened(training: Training) -> Training:
    every = training.evaluate_every and 1
    return replace(training, max_steps=_STEPS, warmup=0, evaluate_every=every, batch_size=2, accumulation=1)


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *_WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


def _text_model(folder: Path) -> None:
    config = DebertaV2Config(
        **_SIZES, vocab_size=32, pooler_hidden_size=_WIDTH, max_position_embeddings=512, relative_attention=True
    )
    _save(DebertaV2ForSequenceClassification(config), folder)
    _tokenizer().save_pretrained(folder)


def _image_model(folder: Path) -> None:
    _save(ViTModel(ViTConfig(**_SIZES, image_size=_PIXELS, patch_size=8)), folder)  # no head, as the hub's
    ViTImageProcessorPil(size={"height": _PIXELS, "width": _PIXELS}).save_pretrained(folder)


def _language_model(folder: Path) -> None:
    config = LlamaConfig(**_SIZES, vocab_size=32, pad_token_id=0, bos_token_id=2, eos_token_id=3)
    _save(LlamaForCausalLM(config).to(torch.bfloat16), folder)
    tokenizer = _tokenizer()
    # Llama has a token before each text, one for its end that is written out, and none for padding.
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 2)]
    )
    tokenizer.add_special_tokens({"bos_token": "[CLS]", "eos_token": "[SEP]"})
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)


def _save(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)


def _sentence(generator: random.Random) -> str:
    return " ".join(generator.choices(_WORDS, k=generator.randint(2, 6)))


def _texts(folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Write a task of GLUE: its texts, ``label`` and ``idx``, and a configuration with the task's name."""
    generator, config = random.Random(0), data["config"]
    features = {**dict.fromkeys(data["columns"], Value("string")), "label": ClassLabel(num_classes=2)}
    features["idx"] = Value("int32")
    for split in ("train", data["test"]):
        rows = [
            {**{column: _sentence(generator) for column in data["columns"]}, "label": number % 2, "idx": number}
            for number in range(6)
        ]
        _write(Dataset.from_list(rows, Features(features)), folder / config / f"{split}-0.parquet")
    card = f"---\nconfigs:\n- config_name: {config}\n  data_dir: {config}\n---\n"
    (folder / "README.md").write_text(card)
    return {"max_length": 24}


def _images(folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Write coloured noise with the columns of a set of images."""
    generator, as_text = np.random.default_rng(0), "test" not in data
    label = Value("string") if as_text else ClassLabel(num_classes=_CLASSES)
    features = Features({data["image"]: Image(), data["label"]: label})
    for split in ("train", *([data["test"]] if not as_text else [])):
        rows = []
        for number in range(4 * _CLASSES):
            pixels = generator.integers(0, 256, (10, 12, 3), dtype=np.uint8)
            own = number % _CLASSES
            name = f"{own + 1:03}_{number:04}.jpg" if as_text else own
            rows.append({data["image"]: Pictures.fromarray(pixels), data["label"]: name})
        _write(Dataset.from_list(rows, features), folder / "data" / f"{split}-0.parquet")
    return {"classes": _CLASSES, "shots": 2}


def _questions(folder: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """Write questions with worked answers to train on, and questions with results alone to test on."""
    generator = random.Random(0)
    train = [
        {"instruction": _sentence(generator), "output": "the answer is 2 The answer is: 2", "type": "GSM_Rephrased"}
        for _ in range(6)
    ]
    test = [{"instruction": _sentence(generator), "output": "2", "type": kind} for kind in ("gsm8k", "math") * 2]
    for split, rows in (("train", train), ("test", test)):
        _write(Dataset.from_list(rows), folder / data["folder"] / f"{split}.parquet")
    return {"train_rows": 4, "max_new_tokens": 3, "generation_batch": 3}


def _write(rows: Dataset, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path)


_MODELS: dict[str, Callable[[Path], None]] = {
    "text": _text_model,
    "images": _image_model,
    "mathematics": _language_model,
}
_DATA: dict[str, Callable[[Path, Mapping[str, Any]], dict[str, Any]]] = {
    "text": _texts,
    "images": _images,
    "mathematics": _questions,
}
