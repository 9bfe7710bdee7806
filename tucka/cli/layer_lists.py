"""Where a list of layers comes from: a text, or the configuration of a Hugging Face model, without its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tucka.errors import ConfigError, expected

if TYPE_CHECKING:
    from torch import nn

__all__ = ["layers_of_model", "parse_layers"]

_LAYER = re.compile(r"(\d{1,12})\s*[xX×]\s*(\d{1,12})(?:\s*\*\s*(\d{1,12}))?")
_MOST_LAYERS = 100_000


def parse_layers(text: str, *, repeat: int = 1) -> list[tuple[int, int]]:
    """Read input and output widths from a text such as ``768x768*3,768x3072``, and take the list `repeat` times."""
    counted = []
    for part in text.split(","):
        match = _LAYER.fullmatch(part.strip())
        if match is None:
            raise ConfigError(expected("--layers", "parts such as 768x768 or 768x3072*12", repr(part.strip())))
        counted.append(((int(match[1]), int(match[2])), int(match[3] or 1)))
    total = repeat * sum(times for _, times in counted)
    if not 1 <= total <= _MOST_LAYERS:
        raise ConfigError(expected("--layers", f"1 to {_MOST_LAYERS:,} layers in all", f"{total:,}"))
    return [layer for layer, times in counted for _ in range(times)] * repeat


def layers_of_model(model: str, targets: Sequence[str] = ()) -> list[tuple[int, int]]:
    """List the widths of a model's linear layers whose names end with one of the targets; without targets, of all."""
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(expected("--model", "a folder that holds config.json", model))
    linears = dict(_linears(_empty_model(model)))
    if not linears:
        raise ConfigError(expected("--model", "at least one linear layer", f"none in {model}"))
    unused = [target for target in targets if not any(_matches(name, target) for name in linears)]
    if unused:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise ConfigError(expected("--targets", f"last parts of layer names ({known})", unused[0]))
    wanted = [name for name in linears if not targets or any(_matches(name, target) for target in targets)]
    return [linears[name] for name in wanted]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _empty_model(name: str) -> nn.Module:
    """Build the model, without a head for a task, on torch's meta device: that takes neither weights nor memory."""
    try:
        import torch
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        cure = "Run: pip install 'tucka[peft]'"
        raise ConfigError(expected("--model", "torch and transformers to be installed", error, cure=cure)) from error
    is_folder = Path(name).is_dir()
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=is_folder, trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly any kind for a configuration that it does not understand
        rule = "a folder whose config.json transformers can build a model from"
        cure = ""
        if not is_folder:
            rule = "a folder, or the name of a model on the hub that can be reached or is in the cache"
            cure = "Check the name; without a connection, give the folder of a model that you have"
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(expected("--model", rule, f"{name} ({type(error).__name__}: {reason})", cure=cure)) from error
    return model


def _linears(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield names of linear layers with input and output width."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        layer: Any = module
        if isinstance(layer, nn.Linear):
            yield name, (layer.in_features, layer.out_features)
        elif isinstance(layer, Conv1D):
            yield name, (int(layer.weight.shape[0]), int(layer.weight.shape[1]))
