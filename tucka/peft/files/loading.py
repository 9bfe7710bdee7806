"""Loading adapters from files that may be damaged: all of an adapter, or none of it and the model as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch import nn

from tucka.errors import ConfigError, expected
from tucka.peft.config import TuckAConfig
from tucka.peft.files.reading import check_sizes, read_tensors
from tucka.peft.files.rollback import is_misfit, misfit, unchanged_on_error
from tucka.peft.merging import unmerge_for_a_new_adapter

__all__ = ["load_adapter"]


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

    `PeftModel.from_pretrained` and `PeftModel.load_adapter` load the same folders, find the same damage and leave the
    model as it was too. But they read pickle unasked, and look which method a configuration is for before tucka sees
    it: one that is no JSON file raises Python's own error there. And a folder without weights they notice only when
    the new adapter is in the model.

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
    check_sizes(tensors, config.spec, str(folder))
    config.inference_mode = not is_trainable
    unmerge_for_a_new_adapter(model)
    try:
        with unchanged_on_error(model):
            return _load(model, folder, config, adapter_name, is_trainable, options)
    except Exception as error:
        if not is_misfit(error):
            raise
        raise misfit(error, where=str(folder)) from error


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
