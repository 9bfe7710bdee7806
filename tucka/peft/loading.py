"""Loading adapters from files that may be damaged: all of an adapter, or none of it and the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn

from tucka.backends.torch.scope import RoutingScope
from tucka.errors import CheckpointError, ConfigError, TuckaError, expected
from tucka.peft.config import TuckAConfig
from tucka.peft.files import read_tensors
from tucka.peft.layer import TuckALayer

__all__ = ["load_adapter", "unchanged_on_error"]


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> PeftModel:
    """Load a TuckA adapter, after checking every part of its files; on any error the model is as it was.

    `PeftModel.from_pretrained` loads the same folders, finds the same damage before it changes the model, and never
    writes tensors that do not fit. But what shows only against the model (missing tensors, other shapes) it finds when
    the new, untrained adapter is in the model already, and leaves it there; and it reads pickle unasked.

    Parameters
    ----------
    model : Module
        A base model, or a `PeftModel`, which gets one more adapter.
    folder : str or Path
        Has ``adapter_config.json`` and ``adapter_model.safetensors``.
    adapter_name : str
        Name of the new adapter; must be free.
    is_trainable : bool
        Whether it is to be trained further.
    allow_pickle : bool
        Whether ``adapter_model.bin`` is read where there is no safetensors file; only from sources that you trust.
    **options : object
        Further arguments of `PeftModel.from_pretrained` or `PeftModel.load_adapter`, such as ``low_cpu_mem_usage``.

    Returns
    -------
    PeftModel
        The model with the adapter: `model` itself if it is a `PeftModel`. The new adapter is active if it is the only
        one.

    Raises
    ------
    CheckpointError
        If a file is missing, damaged, of another method or an unknown format, or does not fit the model.
    ConfigError
        If the name is taken.

    Examples
    --------
    >>> load_adapter(nn.Linear(2, 2), "nowhere")
    Traceback (most recent call last):
        ...
    tucka.errors.CheckpointError: config: expected a readable JSON file, got FileNotFoundError: ...
    """
    if adapter_name in getattr(model, "peft_config", {}):
        raise ConfigError(expected("adapter_name", "a name that is free", repr(adapter_name), where="load_adapter"))
    config = TuckAConfig.read(folder)
    tensors = read_tensors(folder, allow_pickle=allow_pickle)
    config.inference_mode = not is_trainable
    try:
        with unchanged_on_error(model):
            return _load(model, folder, config, adapter_name, is_trainable, options)
    except CheckpointError:
        raise
    except Exception as error:
        # Whatever else went wrong, the files did not fit: targets that the model lacks, heads that the file lacks, ...
        got = str(error) if isinstance(error, TuckaError) else f"{type(error).__name__}: {error}"
        rule = f"an adapter of {len(tensors)} tensors that fits the model"
        raise CheckpointError(expected("folder", rule, got, where=str(folder))) from error


def _load(
    model: nn.Module, folder: str | Path, config: Any, name: str, is_trainable: bool, options: dict[str, Any]
) -> PeftModel:
    """Hand checked files to PEFT."""
    if not isinstance(model, PeftModel):
        return cast(
            PeftModel,
            PeftModel.from_pretrained(
                model, str(folder), adapter_name=name, is_trainable=is_trainable, config=config, **options
            ),
        )
    made = {key: options[key] for key in ("low_cpu_mem_usage", "autocast_adapter_dtype") if key in options}
    model.add_adapter(name, config, **made)
    if is_trainable:
        model.set_requires_grad(name)
    model.load_adapter(str(folder), name, is_trainable=is_trainable, **options)
    return model


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put a model's modules, hooks, adapters, modes and flags back if the block raises; it must not write to tensors.

    Parameters
    ----------
    model : Module
        The model.

    Yields
    ------
    None
        Nothing.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> try:
    ...     with unchanged_on_error(model):
    ...         model[0] = nn.ReLU()
    ...         raise ValueError
    ... except ValueError:
    ...     model[0]
    Linear(in_features=2, out_features=2, bias=True)
    """
    owners: list[Any] = list(model.modules())
    scopes = {id(owner.tucka_scope): owner.tucka_scope for owner in owners if isinstance(owner, TuckALayer)}
    saved = [(owner, _remember(owner)) for owner in [*owners, *scopes.values()]]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for owner, attributes in saved:
            _put_back(owner, attributes)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


# What an attribute is, and a copy of what it holds where that can change in place.
_Attributes = dict[str, tuple[Any, Any]]


def _remember(owner: nn.Module | RoutingScope) -> _Attributes:
    return {
        name: (value, copy.copy(value) if isinstance(value, (dict, list, set)) else None)
        for name, value in vars(owner).items()
    }


def _put_back(owner: nn.Module | RoutingScope, attributes: _Attributes) -> None:
    """Restore attributes; containers are refilled and not replaced, since hook handles refer to them."""
    for name in [name for name in vars(owner) if name not in attributes]:
        del vars(owner)[name]
    for name, (value, content) in attributes.items():
        if isinstance(value, list):
            value[:] = content
        elif content is not None:
            value.clear()
            value.update(content)
        vars(owner)[name] = value
