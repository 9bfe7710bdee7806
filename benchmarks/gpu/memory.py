"""The paper's Table 2 column of memory: a training step of ViT-base with each row's adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.measures import kept_by
from benchmarks.paper.adapted_model import adapted, peft_config
from benchmarks.paper.experiments import read_experiment, read_variants
from tucka.peft import accelerate_hra

__all__ = ["table_2"]

BATCH, CLASSES = 32, 100  # of CIFAR100, in the paper's training
COLUMN = "Peak memory CIFAR100, MB"
VARIANT = "defaults"


def table_2(device: str, *, tiny: bool) -> dict[str, Any]:
    """Return for each row of the table the bytes kept for the backward, the peak of a step, and the paper's figure."""
    experiment, found = read_experiment("table2"), {}
    place = [column.title for column in experiment.columns].index(COLUMN)
    for name, row in experiment.rows.items():
        variant = read_variants()[VARIANT] if row.method == "tucka" else None
        config = peft_config(experiment, row, variant, seed=0)
        found[name] = {**_measured(config, device, tiny=tiny), "paper": row.paper[place]}
        if row.method == "hra":
            found[f"{name}, accelerated"] = _measured(config, device, tiny=tiny, accelerated=True)
    return found


def _measured(config: Any, device: str, *, tiny: bool, accelerated: bool = False) -> dict[str, Any]:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {**small, "image_size": 8, "patch_size": 4} if tiny else {}
    base_config = ViTConfig(num_labels=CLASSES, **sizes)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = adapted(ViTForImageClassification(base_config), config, None).train()
            pixels = torch.randn(2 if tiny else BATCH, 3, base_config.image_size, base_config.image_size)
            labels = torch.arange(len(pixels)) % CLASSES
    except (ValueError, RuntimeError) as error:  # OFT and BOFT have rules for sizes, and BOFT an extension
        return {"not run": str(error).splitlines()[0]}
    if accelerated:
        accelerate_hra(model)
    try:
        return _step(model, {"pixel_values": pixels, "labels": labels}, device)
    except torch.OutOfMemoryError:
        return {"not run": "out of memory"}


def _step(model: nn.Module, inputs: dict[str, torch.Tensor], device: str) -> dict[str, Any]:
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad])

    def loss() -> torch.Tensor:
        result: torch.Tensor = model(**inputs).loss
        return result

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    kept = kept_by(loss, owned=(*model.parameters(), *model.buffers(), *inputs.values()))[0]
    if device != "cuda":
        return {"kept": kept}
    torch.cuda.reset_peak_memory_stats()
    step()
    return {"kept": kept, "peak": torch.cuda.max_memory_allocated()}
