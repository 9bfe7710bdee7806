"""Texts of many classes, told apart by adapters alone: the lower half of MiniLM, and a fixed vector for each class."""

# The head is fixed, so that nothing but the adapters learns, and the classes are far from what the frozen model knows:
# here the number of an adapter's parameters decides how much is learned.

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.quality.problem import Item, Problem, Sizes
from examples.data import DataError, Sentence
from examples.sentence_classifier import Collator, SentenceClassifier, encode, load_classifier
from tucka.errors import expected

LAYERS = 3  # of six: enough for words and short phrases, in half of the time
SHARPNESS = 16.0  # of the softmax over cosines, which reach from -1 to 1
RATE = 3e-3  # of a head, of which there is none here


class FixedClassifier(nn.Module):
    """An encoder whose pooled output is compared with one fixed unit vector for each class, all at right angles."""

    def __init__(self, pretrained: SentenceClassifier, width: int, classes: int) -> None:
        super().__init__()
        self.pool = pretrained.pool
        self.encoder = pretrained.encoder
        # The same for every run: what differs between seeds is the adapters and the order of the data.
        drawn = torch.randn(width, classes, generator=torch.Generator().manual_seed(0))
        self.classes: Tensor
        self.register_buffer("classes", torch.linalg.qr(drawn).Q)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Return logits (B, classes), with labels (B,) the loss too."""
        pooled = nn.functional.normalize(self.pool(input_ids, attention_mask), dim=-1)
        logits = SHARPNESS * pooled @ self.classes
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def problem(part: str, rows: Sequence[Sentence], sizes: Sizes, *, max_length: int) -> Problem:
    """Make the problem of one task out of all its texts, which are in an order that says nothing about them."""
    _, tokenizer = load_classifier(seed=0)
    classes = 1 + max(row.label for row in rows)
    held = sizes.test + sizes.validation
    count = len(rows) - held if sizes.train is None else sizes.train
    if not 0 < count <= len(rows) - held:
        raise DataError(expected("Sizes", f"at most {len(rows)} texts in all", f"{held} and {sizes.train}"))

    def items(chosen: Sequence[Sentence]) -> list[Item]:
        encoded = encode(tokenizer, chosen, max_length=max_length)
        return [item | {"text": row.text} for item, row in zip(encoded, chosen, strict=True)]

    def model(seed: int) -> nn.Module:
        pretrained, _ = load_classifier(seed=seed)
        encoder = pretrained.encoder
        encoder.encoder.layer = encoder.encoder.layer[:LAYERS]
        return FixedClassifier(pretrained, encoder.config.hidden_size, classes).eval()

    return Problem(
        model=model,
        train=items(rows[held : held + count]),
        validation={part: items(rows[sizes.test : held])},
        test={part: items(rows[: sizes.test])},
        collator=Collator(tokenizer.pad_token_id),
        targets=("query", "value", "dense"),
        head=(),
    )


def shuffled(texts: Iterable[str]) -> list[str]:
    """Order texts by a hash, which no release of a library and no seed changes."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())


def write(path: Path, texts: Mapping[str, Iterable[str]], *, most: int) -> None:
    """Write so many texts of each class, all classes mixed, as lines of class and text."""
    label = {text: name for name, own in texts.items() for text in shuffled(own)[:most]}
    path.write_text("".join(f"{label[text]}\t{text}\n" for text in shuffled(label)), encoding="utf-8")


def read(path: Path, part: str) -> list[Sentence]:
    """Read texts; a class's number is its place in the alphabet."""
    lines = [line.split("\t", maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines()]
    number = {name: place for place, name in enumerate(sorted({name for name, _ in lines}))}
    return [Sentence(part, text, number[name]) for name, text in lines]
