"""Comparing what a file holds with what an adapter of a model needs, before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from tucka.errors import CheckpointError, expected
from tucka.peft.config import TuckAConfig
from tucka.peft.files.reading import check_numbers
from tucka.peft.files.sharded import plain_name
from tucka.peft.layer import TuckALayer

__all__ = ["PREFIX", "check_heads", "check_tensors", "checked_tensors"]

PREFIX = "base_model.model."


def _plain(key: str) -> str:
    """Name a tensor as the base model does, whatever is wrapped around it."""
    return plain_name(key).removeprefix(PREFIX)


def _wanted(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """List the tensors that a file of this adapter must have, by their names in the model."""
    wanted: dict[str, Tensor] = {}
    state: dict[str, Tensor] | None = None
    for path, module in model.named_modules():
        if isinstance(module, TuckALayer):
            for part in ("tucka_experts", "tucka_router"):
                if adapter in getattr(module, part):
                    for key, value in getattr(module, part)[adapter].state_dict().items():
                        wanted[_plain(f"{path}.{part}.{adapter}.{key}")] = value
        elif isinstance(module, AuxiliaryTrainingWrapper):
            state = {_plain(key): value for key, value in model.state_dict().items()} if state is None else state
            for key in module.adapter_state_dict_load_map(adapter).values():
                wanted[_plain(f"{path}.{key}")] = state[_plain(f"{path}.{key}")]
    return wanted


def _optional(model: nn.Module, config: TuckAConfig, adapter: str) -> dict[str, Tensor]:
    """List what a file may have besides: trained biases, and embeddings whose vocabulary was resized."""
    embeddings = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    kept = [path for path, module in model.named_modules() if any(module is layer for layer in embeddings)]
    optional = {}
    for key, value in model.state_dict().items():
        is_bias = config.bias != "none" and key.endswith("bias")
        if is_bias or key.rpartition(".")[0] in kept:
            optional[_plain(key)] = value
        if is_bias:  # with bias="all" PEFT writes a head's bias once more, under a name that it never reads
            optional[_plain(key.replace(f".modules_to_save.{adapter}.", ".modules_to_save."))] = value
    return optional


def check_tensors(model: nn.Module, config: TuckAConfig, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Compare the tensors of a file with those of an adapter of a model, before any of them is written.

    Parameters
    ----------
    model : Module
        A model with the adapter.
    config : TuckAConfig
        The adapter's configuration.
    adapter : str
        The adapter's name.
    tensors : mapping of str to Tensor
        What is to be loaded, under the names that it has in the model.

    Raises
    ------
    CheckpointError
        If a tensor is missing, unknown, not finite, or of another shape or kind of number.

    Examples
    --------
    >>> check_tensors(nn.Linear(2, 2), TuckAConfig(), "default", {})
    """
    where = f"adapter {adapter!r}"
    found = {_plain(key): value for key, value in tensors.items()}
    check_numbers(found, where)
    wanted = _wanted(model, adapter)
    missing = [key for key in wanted if key not in found]
    if missing:
        raise CheckpointError(expected("file", f"{len(wanted)} tensors", f"none for {_few(missing)}", where=where))
    if len(found) > len(wanted):
        wanted.update(_optional(model, config, adapter))
    unknown = [key for key in found if key not in wanted]
    if unknown:
        raise CheckpointError(expected("file", "only tensors of the adapter", _few(unknown), where=where))
    for key, tensor in found.items():
        if tensor.shape != wanted[key].shape:
            rule = f"shape {tuple(wanted[key].shape)}"
            raise CheckpointError(expected(key, rule, f"shape {tuple(tensor.shape)}", where=where))
        if tensor.is_floating_point() != wanted[key].is_floating_point():
            raise CheckpointError(expected(key, f"{wanted[key].dtype}", tensor.dtype, where=where))


def check_heads(model: nn.Module, adapter: str, keys: Collection[str]) -> None:
    """Raise unless a file has all modules that are saved whole, for which PEFT itself would raise a bare KeyError.

    Parameters
    ----------
    model : Module
        A model with the adapter.
    adapter : str
        The adapter's name.
    keys : collection of str
        Names of the tensors in the file.

    Raises
    ------
    CheckpointError
        If a tensor is missing.

    Examples
    --------
    >>> check_heads(nn.Linear(2, 2), "default", ["a"])
    """
    modules = dict(model.named_modules())
    # PEFT may have been told to rename what the file has (key_mapping): then only the ends of names can be compared.
    known = tuple(f"{PREFIX}{path}.tucka_" for path, module in modules.items() if isinstance(module, TuckALayer))
    renamed = not any(key.startswith(known) for key in keys)
    for path, module in modules.items():
        names = module.adapter_state_dict_load_map(adapter) if isinstance(module, AuxiliaryTrainingWrapper) else ()
        for name in names:
            ending = f".{path.rpartition('.')[2]}.{name}"
            if not (any(key.endswith(ending) for key in keys) if renamed else f"{PREFIX}{path}.{name}" in keys):
                got, where = f"none for {path}.{name}", f"adapter {adapter!r}"
                raise CheckpointError(expected("file", "all tensors of modules_to_save", got, where=where))


def checked_tensors(
    model: nn.Module, config: TuckAConfig, adapter: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors that may be loaded, see `check_tensors`.

    Parameters
    ----------
    model : Module
        A model with the adapter.
    config : TuckAConfig
        The adapter's configuration.
    adapter : str
        The adapter's name.
    tensors : mapping of str to Tensor
        What is to be loaded, under the names that it has in the model.

    Returns
    -------
    dict of str to Tensor
        All of them, but for the router's where the adapter is pinned and has none.

    Raises
    ------
    CheckpointError
        If something does not fit.
    """
    if config.pinned_gates is not None and not config.keeps_router:
        tensors = {key: value for key, value in tensors.items() if ".tucka_router." not in key}
    check_tensors(model, config, adapter, tensors)
    return dict(tensors)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
