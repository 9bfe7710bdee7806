"""Reading adapter files without trusting them: every way in which one can be wrong is one CheckpointError."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from tucka.errors import CheckpointError, expected

__all__ = ["FORMAT_VERSION", "check_numbers", "check_range", "read_entries", "read_tensors", "weights_file"]

FORMAT_VERSION = 1
# Without these an adapter would load and compute something else than it was trained for.
_REQUIRED = ("r", "k", "t", "p", "alpha", "routing", "affinity", "gate_norm", "factor_norm", "target_modules")
# PEFT uses these entries as they are. The configuration checks the numbers of the method.
_NAMES = ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern")
_TEXTS = ("base_model_name_or_path", "revision", "router_module", "peft_version")
_SWITCHES = ("init_weights", "inference_mode", "sync_routing", "keeps_router")


def read_tensors(source: str | Path | Mapping[str, Tensor], *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Read a state dict of finite numbers from a folder, a file or a mapping, onto the CPU."""
    if isinstance(source, Mapping):
        tensors, where = dict(source), "state dict"
    else:
        path = weights_file(source, allow_pickle=allow_pickle)
        tensors, where = _read_file(path), str(path)
    check_numbers(tensors, where)
    return tensors


def weights_file(source: str | Path, *, allow_pickle: bool) -> Path:
    """Find the file with the tensors of a folder, which may be that file itself."""
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (path / name).is_file()]
        if not found:
            raise CheckpointError(expected("source", f"a folder with {SAFETENSORS_WEIGHTS_NAME}", path))
        path = found[0]
    elif not path.is_file():
        raise CheckpointError(expected("source", "a folder or a file that exists", path))
    if path.suffix != ".safetensors" and not allow_pickle:
        cure = "Pass allow_pickle=True if you trust the file: reading pickle can run code"
        raise CheckpointError(expected("source", "a .safetensors file", path, cure=cure))
    return path


def _read_file(path: Path) -> dict[str, Tensor]:
    is_safe = path.suffix == ".safetensors"
    try:
        tensors = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise errors of a dozen kinds for damaged bytes
        rule = "a readable .safetensors file" if is_safe else "a readable file of torch.save"
        raise CheckpointError(expected("source", rule, f"{type(error).__name__}: {error}", where=str(path))) from error
    if not isinstance(tensors, Mapping):
        raise CheckpointError(expected("source", "a state dict", type(tensors).__name__, where=str(path)))
    return dict(tensors)


def check_numbers(tensors: Mapping[Any, Any], where: str) -> None:
    """Raise unless everything is a tensor under a name, without NaN and infinity."""
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            rule = "names and tensors only"
            raise CheckpointError(expected("source", rule, f"{key!r}: {type(tensor).__name__}", where=where))
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        if not bool(torch.isfinite(tensor if tensor.itemsize > 1 else tensor.float()).all()):
            raise CheckpointError(expected(key, "finite numbers", "NaN or infinity", where=where))


def check_range(key: str, tensor: Tensor, dtype: torch.dtype, where: str) -> None:
    """Raise where a finite tensor has numbers that are infinite in the dtype that it is loaded into."""
    if tensor.is_meta or not tensor.is_floating_point() or not dtype.is_floating_point:
        return
    narrows = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrows and not bool(torch.isfinite(tensor.to(dtype)).all()):
        largest = float(tensor.abs().max())
        cure = "Load it into a model of a wider dtype, or leave autocast_adapter_dtype=True"
        raise CheckpointError(expected(key, f"numbers that {dtype} can hold", f"{largest:g}", where=where, cure=cure))


def read_entries(folder: str | Path) -> dict[str, Any]:
    """Read the entries of a TuckA configuration of a known format; the values of its numbers are still unchecked."""
    path = Path(folder) / CONFIG_NAME
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        message = expected("config", "a readable JSON file", f"{type(error).__name__}: {error}", where=str(path))
        raise CheckpointError(message) from error
    kind = entries.get("peft_type") if isinstance(entries, dict) else type(entries).__name__
    if kind != "TUCKA":
        raise CheckpointError(expected("config", "the peft_type 'TUCKA'", repr(kind), where=str(path)))
    version = entries.get("tucka_format")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        rule, cure = f"a format this tucka knows, 1 to {FORMAT_VERSION}", "Update tucka"
        raise CheckpointError(expected("tucka_format", rule, repr(version), where=str(path), cure=cure))
    missing = [name for name in _REQUIRED if name not in entries]
    if missing:
        raise CheckpointError(expected("config", f"entries {list(_REQUIRED)}", f"none of {missing}", where=str(path)))
    _check_kinds(entries, str(path))
    return dict(entries)


def _check_kinds(entries: dict[str, Any], where: str) -> None:
    """Raise unless the entries that nothing else checks are of the kinds that PEFT writes."""

    def is_names(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)

    for name, value in entries.items():
        if name in _SWITCHES and not isinstance(value, bool):
            raise CheckpointError(expected(name, "true or false", repr(value), where=where))
        if name in _TEXTS and not isinstance(value, str | None):
            raise CheckpointError(expected(name, "text", repr(value), where=where))
        if name in _NAMES and not isinstance(value, str | None) and not is_names(value):
            raise CheckpointError(expected(name, "a list of names", repr(value), where=where))
