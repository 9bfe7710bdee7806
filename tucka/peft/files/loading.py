"""Loading an adapter: all of it, or none of it and the model as it was. The steps, in order:

1. The files are looked at (`load_adapter` only): PEFT reads a configuration before it asks its method.
2. PEFT reads the configuration: `TuckAConfig.from_pretrained` checks it.
3. PEFT adds the adapter: `TuckAModel.inject_adapter` finds the load (`running_file_load`) and reads its tensors.
4. Before a layer is made, the file has the tensors that the configuration asks for (`FileLoad.check_sizes`).
5. When all layers are made, every tensor of the file fits (`FileLoad.check_file`); if not, they are taken out again.
6. PEFT hands over what it is about to write: `TuckAModel._remap_adapter_state_dict_for_load` checks that too, since
   a state dict can come from anywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.utils import CONFIG_NAME, load_peft_weights
from torch import Tensor, nn

from tucka.errors import CheckpointError, ConfigError, TuckaError, expected
from tucka.peft.adapters import unmerge_first
from tucka.peft.config import TuckAConfig
from tucka.peft.files import matching
from tucka.peft.files.reading import check_numbers, read_entries, weights_file
from tucka.peft.files.rollback import unchanged_on_error

__all__ = ["FileLoad", "load_adapter", "misfits", "narrows_adapters", "running_file_load"]

# No argument tells step 3 what is loaded, or whether anything is: a configuration from a file may start a new adapter
# too. A record that is kept between PEFT's calls could not tell the two apart, since a user can make the same calls in
# the same order. But PEFT's own function, which makes these calls, is on the stack of this thread, and its arguments
# say what it loads. So nothing is kept from one step to the next.
_FROM_PRETRAINED = inspect.unwrap(PeftModel.from_pretrained.__func__).__code__
_LOAD_ADAPTER = inspect.unwrap(PeftModel.load_adapter).__code__
# What PEFT's classes for some tasks do only when the adapter is in the model: wrap the head, ask for a method.
_LATE_HEADS = ("TOKEN_CLS", "QUESTION_ANS")
_GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


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
    model as it was too. But they read pickle unasked, and they look up the method of a configuration before tucka sees
    it: a file that is not JSON raises Python's own error there.

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
        If a file is missing, damaged, of another method or an unknown format, does not fit the model, or holds numbers
        that the adapter's dtype cannot hold.
    ConfigError
        If the name is taken, or one with which PEFT would lose tensors at saving.

    Examples
    --------
    >>> load_adapter(nn.Linear(2, 2), "nowhere")
    Traceback (most recent call last):
        ...
    tucka.errors.CheckpointError: config: expected a readable JSON file, got FileNotFoundError: ...
    """
    if adapter_name in getattr(model, "peft_config", {}):
        raise ConfigError(expected("adapter_name", "a name that is free", repr(adapter_name), where="load_adapter"))
    read_entries(folder)
    weights_file(folder, allow_pickle=allow_pickle)
    unmerge_first(model)  # it writes to weights, which is not undone
    arguments = {"adapter_name": adapter_name, "is_trainable": is_trainable, **options}
    with misfits(str(folder), passing=TuckaError), unchanged_on_error(model):
        if not isinstance(model, PeftModel):
            return cast(PeftModel, PeftModel.from_pretrained(model, str(folder), **arguments))
        model.load_adapter(str(folder), **arguments)
        return model


@dataclass(frozen=True)
class FileLoad:
    """A call of PEFT that is loading an adapter: its tensors by their keys in the file, and what it will do to them."""

    tensors: dict[str, Tensor]
    where: str
    is_new_model: bool
    widened: bool

    def check_sizes(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare with what the configuration asks for, before memory is allocated for it."""
        matching.check_sizes(self.tensors, sizes, self.where)

    def check_file(self, model: nn.Module, config: TuckAConfig, adapter: str) -> None:
        """Compare with the new adapter of a model."""
        late = self.is_new_model and config.task_type in _LATE_HEADS
        matching.check_file(
            model, config, adapter, self.tensors, where=self.where, widened=self.widened, late_heads=late
        )
        needs_more = self.is_new_model and config.task_type in _GENERATING
        if needs_more and not hasattr(model, "prepare_inputs_for_generation"):
            rule = f"that of the model, for {type(model).__name__} cannot generate"
            raise CheckpointError(expected("task_type", rule, repr(str(config.task_type)), where=self.where))


def running_file_load() -> FileLoad | None:
    """Return the load that runs in this thread, with its tensors; None where an adapter starts new."""
    arguments = _arguments()
    if arguments is None:
        return None
    source = arguments["model_id"]
    # PeftModel.load_adapter has taken the options of the hub out of its keywords before it adds the adapter.
    options = {**arguments["kwargs"], **arguments.get("hf_hub_download_kwargs", {})}
    hub = ("subfolder", "revision", "cache_dir", "token", "use_auth_token", "local_files_only")
    options = {name: options[name] for name in hub if options.get(name) is not None}
    folder = Path(source) / options.get("subfolder", "")
    if (folder / CONFIG_NAME).is_file():
        tensors = _read(folder, arguments["key_mapping"])
    else:  # from the hub, which says itself what is missing
        tensors = load_peft_weights(str(source), device="cpu", key_mapping=arguments["key_mapping"], **options)
    check_numbers(tensors, str(source))
    return FileLoad(tensors, str(source), arguments["is_new_model"], bool(arguments["autocast_adapter_dtype"]))


def narrows_adapters() -> bool:
    """Tell whether a load runs in this thread that casts its adapter to the base's dtype in the end."""
    arguments = _arguments()
    return arguments is not None and not arguments["autocast_adapter_dtype"]


def _arguments() -> dict[str, Any] | None:
    """Return the arguments of the innermost loading function of PEFT that runs in this thread."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code not in (_FROM_PRETRAINED, _LOAD_ADAPTER):
        frame = frame.f_back
    return None if frame is None else {**frame.f_locals, "is_new_model": frame.f_code is _FROM_PRETRAINED}


def _read(folder: Path, key_mapping: dict[str, str] | None) -> dict[str, Tensor]:
    """Read a folder with PEFT's own function, so that the tensors are those that it will write."""
    path = weights_file(folder, allow_pickle=True)  # as PEFT: torch's reader runs no code
    try:
        return cast("dict[str, Tensor]", dict(load_peft_weights(str(folder), device="cpu", key_mapping=key_mapping)))
    except Exception as error:  # the readers raise errors of a dozen kinds for damaged bytes
        got = f"{type(error).__name__}: {error}"
        raise CheckpointError(expected("source", f"a readable {path.suffix} file", got, where=str(path))) from error


@contextmanager
def misfits(where: str, *, passing: type[TuckaError]) -> Iterator[None]:
    """Turn whatever goes wrong into one CheckpointError, except for errors of the class `passing`, which say enough."""
    try:
        yield
    except (passing, Warning):  # a warning that is an error says nothing of the files
        raise
    except Exception as error:
        got = str(error) if isinstance(error, TuckaError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(expected("adapter", "files that fit the model", got, where=where)) from error
