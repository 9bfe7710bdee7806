"""Routing features of real models on real data: the input of the layer that would route, averaged over each sample."""

# Three sources, with the models and data of the quality benchmark's tasks, each cached as one file in the user's cache
# folder after the first use:
#
# minilm        all-MiniLM-L6-v2 on four domains of rated sentences: the input of the first query projection
# smollm2       SmolLM2-135M-Instruct on the same sentences: the input of the first block's query projection
# efficientnet  EfficientNet-lite0 on Fashion-MNIST: the input of the last convolution (``_conv_head``)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.tasks.sources import rated_sentences
from examples.data import Sentence, cache_folder, split_domains
from examples.sentence_classifier import load_classifier
from tucka.core.routing import routing_feature

__all__ = ["SOURCES", "Features", "load_features"]

TEXTS_PER_DOMAIN = 1500
PICTURES = 6000
MAX_LENGTH = 64
_BATCH = 100
_FORMAT = 2  # of the cached files


@dataclass(frozen=True)
class Features:
    """One vector for each sample, in an order that mixes the labels."""

    vectors: np.ndarray  # routing features of samples
    labels: np.ndarray  # positions in `names`
    names: list[str]  # domains or classes


def sentences() -> list[Sentence]:
    """Take the same number of sentences of each domain, in an order that a hash of the text decides."""
    split = split_domains(rated_sentences(), train=None, test=TEXTS_PER_DOMAIN)
    return [sentence for row in zip(*split.test.values(), strict=True) for sentence in row]


def _text_features(tokenizer: Any, embed: Callable[[Tensor], Tensor]) -> Features:
    """Average the embedded tokens of each sentence."""
    rows = sentences()
    names = list(dict.fromkeys(row.domain for row in rows))
    vectors = []
    with torch.inference_mode():
        for start in range(0, len(rows), _BATCH):
            texts = [row.text for row in rows[start : start + _BATCH]]
            batch = tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
            hidden = embed(batch["input_ids"])
            vectors.append(routing_feature(hidden, mask=batch["attention_mask"], routing="sample").numpy())
    return Features(np.concatenate(vectors), np.array([names.index(row.domain) for row in rows]), names)


def minilm() -> Features:
    classifier, tokenizer = load_classifier(seed=0)
    return _text_features(tokenizer, classifier.encoder.embeddings)


def smollm2() -> Features:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.quality.tasks.causal import converted_model, read_model

    folder = converted_model()
    tokenizer = read_model(AutoTokenizer, folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    model = read_model(AutoModelForCausalLM, folder, dtype=torch.float32).eval().model
    return _text_features(tokenizer, lambda ids: model.layers[0].input_layernorm(model.embed_tokens(ids)))


CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]


def efficientnet() -> Features:
    from benchmarks.quality.tasks import images

    model = images.load_classifier(images.weights_folder(), seed=0)
    made: list[Tensor] = []

    def look(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        made.append(routing_feature(inputs[0].movedim(1, -1).contiguous(), routing="sample"))

    model.encoder._conv_head.register_forward_pre_hook(look)
    pictures, labels = images.read_images(images.data_folder(), "train")
    items = [{"image": torch.tensor(pictures[place]), "labels": int(labels[place])} for place in range(PICTURES)]
    with torch.inference_mode():
        for start in range(0, PICTURES, _BATCH):
            model(images.collate(items[start : start + _BATCH])["pixel_values"])
    return Features(torch.cat(made).numpy(), labels[:PICTURES].astype(np.int64), list(CLASSES))


SOURCES: dict[str, Callable[[], Features]] = {"minilm": minilm, "smollm2": smollm2, "efficientnet": efficientnet}


def load_features(source: str) -> Features:
    """Return the features of one of `SOURCES`, from the cache where they have been made before."""
    path = cache_folder() / f"features-{source}-{_FORMAT}.npz"
    if not path.is_file():
        made = SOURCES[source]()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.stem}.part.npz")
        np.savez(part, vectors=made.vectors, labels=made.labels, names=np.array(made.names))
        part.replace(path)
    with np.load(path) as kept:
        return Features(kept["vectors"], kept["labels"], kept["names"].tolist())
