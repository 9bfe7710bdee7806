"""Images with labels, a few of each class to train on: CIFAR-100, Food-101, Caltech-256."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from PIL import ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification, DefaultDataCollator

from benchmarks.paper.experiments import Model, Task
from benchmarks.paper.metrics import metric_of_logits
from benchmarks.paper.problem import Problem


@dataclass(frozen=True)
class Data:
    """A set of labelled images."""

    path: str  # of the hub
    image: str  # a column
    label: str  # a column; a label that is text starts with the number of its class, three digits from 001
    classes: int
    shots: int  # training images of each class
    shots_seed: int  # draws them: one draw for all runs, as in the authors' scripts
    mean: Sequence[float]  # of the colours' normalisation
    std: Sequence[float]
    test: str | None = None  # the split that is evaluated; all that was not drawn if None


def few_shots(labels: Sequence[int], shots: int, seed: int) -> list[int]:
    """Draw places of some images of each class, without replacement."""
    # In the order in which classes first appear, and with NumPy's older generator: the authors' scripts draw the same
    # images from the same file.
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    generator = np.random.RandomState(seed)
    drawn = [generator.choice(same, shots, replace=False) for same in places.values()]
    return [int(place) for place in np.concatenate(drawn)]


def class_of(label: int | str) -> int:
    """Return the class, from 0, of a label as it stands in its column."""
    return int(label[:3]) - 1 if isinstance(label, str) else label


def problem(model: Model, task: Task, *, pads_to_max_length: bool) -> Problem:
    """Load a task and the model for it; images are read when they are needed, and have one size: nothing is padded."""
    del pads_to_max_length
    data = Data(**task.data)
    splits = load_dataset(data.path)
    source = splits["train"]
    drawn = few_shots([class_of(label) for label in source[data.label]], data.shots, data.shots_seed)
    rest = sorted(set(range(len(source))) - set(drawn))
    test = source.select(rest) if data.test is None else splits[data.test]
    processor = AutoImageProcessor.from_pretrained(
        model.name, backend="pil", image_mean=list(data.mean), image_std=list(data.std)
    )

    def reader(*, mirrors: bool) -> Any:
        def read(rows: dict[str, Any]) -> dict[str, Any]:
            images = [image.convert("RGB") for image in rows[data.image]]
            if mirrors:
                images = [ImageOps.mirror(image) if torch.rand(()) < 0.5 else image for image in images]
            pixels = processor(images, return_tensors="pt")["pixel_values"]
            return {"pixel_values": pixels, "labels": [class_of(label) for label in rows[data.label]]}

        return read

    base = AutoModelForImageClassification.from_pretrained(
        model.name, num_labels=data.classes, ignore_mismatched_sizes=True, dtype=getattr(torch, model.dtype)
    )
    return Problem(
        base,
        source.select(drawn).with_transform(reader(mirrors=True)),
        DefaultDataCollator(),
        test.with_transform(reader(mirrors=False)),
        metric_of_logits(task.metric),
    )
