"""Where a list of layers comes from: a text, or the configuration of a Hugging Face model, without its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tucka.errors import ConfigError, expected

if TYPE_CHECKING:
    from torch import nn

__all__ = ["layers_of_folder", "parse_layers"]

_LAYER = re.compile(r"(\d{1,12})\s*[xX×]\s*(\d{1,12})(?:\s*\*\s*(\d{1,12}))?")
_MOST_LAYERS = 100_000

_CURE = "Install them with: pip install 'tucka[peft]'"


def parse_layers(text: str, *, repeat: int = 1) -> list[tuple[int, int]]:
    """Read a list of layers such as ``768x768*3,768x3072,3072x768``.

    Parameters
    ----------
    text : str
        Input x output width of each layer, ``*N`` for N equal ones, separated by commas.
    repeat : int
        How often the whole list follows itself.

    Returns
    -------
    list of tuple of int
        The layers.

    Raises
    ------
    ConfigError
        If a part is no layer, or there are too many layers.

    Examples
    --------
    >>> parse_layers("4x4*2, 4x8", repeat=2)
    [(4, 4), (4, 4), (4, 8), (4, 4), (4, 4), (4, 8)]
    """
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


def layers_of_folder(folder: Path, targets: Sequence[str] = ()) -> list[tuple[int, int]]:
    """List the widths of a model's linear layers.

    The model is built on torch's meta device, so neither its weights nor memory for them are needed. It is the one that
    ``AutoModel`` makes, without a head for some task.

    Parameters
    ----------
    folder : Path
        Holds the model's ``config.json``.
    targets : sequence of str
        Last parts of the wanted layers' names, such as ``"query"`` or ``"attention.output.dense"``. All linear layers
        if there is none.

    Returns
    -------
    list of tuple of int
        Input and output width of each layer, in the order of registration.

    Raises
    ------
    ConfigError
        If the folder holds no configuration that transformers can read, torch or transformers is missing, or a target
        matches no linear layer.
    """
    if not folder.is_dir():
        raise ConfigError(expected("model", "a folder", folder, where="tucka count"))
    if not (folder / "config.json").is_file():
        raise ConfigError(expected("model", "a folder that holds config.json", folder, where="tucka count"))
    linears = dict(_linears(_empty_model(folder)))
    if not linears:
        raise ConfigError(expected("model", "at least one linear layer", f"none in {folder}", where="tucka count"))
    unused = [target for target in targets if not any(_matches(name, target) for name in linears)]
    if unused:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
        raise ConfigError(expected("targets", f"last parts of layer names ({known})", unused[0], where="tucka count"))
    wanted = [name for name in linears if not targets or any(_matches(name, target) for target in targets)]
    return [linears[name] for name in wanted]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _empty_model(folder: Path) -> nn.Module:
    try:
        import torch
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        message = expected("model", "torch and transformers", error, where="tucka count", cure=_CURE)
        raise ConfigError(message) from error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises nearly any kind for a configuration that it does not understand
        reason = f"{folder} ({type(error).__name__}: {error})"
        rule = "a folder whose config.json transformers can build a model from"
        raise ConfigError(expected("model", rule, reason, where="tucka count")) from error
    return model


def _linears(model: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        layer: Any = module
        if isinstance(layer, nn.Linear):
            yield name, (layer.in_features, layer.out_features)
        elif isinstance(layer, Conv1D):
            yield name, (int(layer.weight.shape[0]), int(layer.weight.shape[1]))
