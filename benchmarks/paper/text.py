"""Texts, or pairs of texts, with labels: GLUE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from benchmarks.paper.experiments import Model, Task
from benchmarks.paper.metrics import metric_of_logits
from benchmarks.paper.problem import Problem


@dataclass(frozen=True)
class Data:
    """A set of labelled texts."""

    path: str  # of the hub
    config: str
    columns: Sequence[str]  # one, or two for pairs
    test: str  # the split that is evaluated; GLUE's test labels are not public
    max_length: int  # tokens of a text; the rest is cut


def problem(model: Model, task: Task, *, pads_to_max_length: bool) -> Problem:
    """Load a task and the model for it."""
    data = Data(**task.data)
    splits = load_dataset(data.path, data.config)
    tokenizer = AutoTokenizer.from_pretrained(model.name)
    padding = "max_length" if pads_to_max_length else False

    def encode(rows: dict[str, Any]) -> Any:
        texts = [rows[column] for column in data.columns]
        return tokenizer(*texts, truncation=True, max_length=data.max_length, padding=padding)

    def encoded(split: str) -> Any:
        rows = splits[split].rename_column("label", "labels")
        return rows.map(encode, batched=True, remove_columns=[name for name in rows.column_names if name != "labels"])

    train, test = encoded("train"), encoded(data.test)
    labels = len(set(train["labels"]))
    base = AutoModelForSequenceClassification.from_pretrained(
        model.name, num_labels=labels, dtype=getattr(torch, model.dtype)
    )
    return Problem(base, train, DataCollatorWithPadding(tokenizer), test, metric_of_logits(task.metric))
