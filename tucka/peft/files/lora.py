"""Export of a pinned adapter as an ordinary LoRA adapter, which plain PEFT and LoRA servers load without tucka."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from tucka.backends.torch.base_layers import is_convolution, is_experts
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import ConfigError, RouteError, expected
from tucka.peft.adapters import chosen_adapter, layers_of
from tucka.peft.config import TuckAConfig
from tucka.peft.files.keys import PREFIX, base_name
from tucka.peft.layer import TuckALayer
from tucka.peft.merging import readable_weight, thin_update
from tucka.peft.routes.pinning import checked_gates
from tucka.peft.targets import NAMES_OF_EXPERTS

__all__ = ["export_lora"]

_WHERE = "export_lora"
_MERGE = "Merge instead, which works for any layer with an ordinary weight: model.merge_and_unload()"
# PEFT's LoRA adapts these, and no transposed ones.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def export_lora(
    model: nn.Module, path: str | Path, *, gates: Any = None, adapter_name: str | None = None
) -> LoraConfig:
    r"""Write an adapter with a fixed route as a LoRA adapter: :math:`A = (U \bar G)^\top, B = \alpha W U`.

    The folder holds ``adapter_config.json`` and ``adapter_model.safetensors`` and needs no tucka to be loaded. Biases
    and `modules_to_save` go along as they are. A convolution with K kernel positions gets the rank r·K.

    Parameters
    ----------
    model : Module
        A model with a TuckA adapter.
    path : str or Path
        The folder; made if it does not exist.
    gates : array_like, shape (k, t), optional
        The fixed gates; those that the adapter is pinned to if None.
    adapter_name : str, optional
        Which adapter; the active one if None.

    Returns
    -------
    LoraConfig
        What was written to ``adapter_config.json``.

    Raises
    ------
    RouteError
        If the adapter is not pinned and no gates are given, or the model has no adapter.
    ConfigError
        If the gates do not fit, or LoRA cannot express a layer's update. Nothing is written then.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (9) for fixed gates.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from tucka.peft import TuckAConfig
    >>> import tempfile
    >>> base = nn.Sequential(nn.Linear(8, 3))
    >>> model = get_peft_model(base, TuckAConfig(r=2, target_modules=["0"], pinned_gates=[[1, 0], [0, 0]]))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_lora(model, folder).r
    2
    """
    if Path(path).is_file():
        raise ConfigError(expected("path", "a folder", f"the file {path}", where=_WHERE))
    scope_of(model)  # raises for a model without adapters
    name = chosen_adapter(model, adapter_name)
    config = cast(TuckAConfig, cast(Any, model).peft_config[name])
    fixed = _fixed_gates(model, name, gates, (config.k, config.t))
    tensors, ranks = _lora_tensors(model, name, fixed)
    lora = _lora_config(model, name, ranks)
    Path(path).mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(Path(path) / SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    lora.save_pretrained(str(path))
    return lora


def _fixed_gates(model: nn.Module, name: str, gates: Any, shape: tuple[int, int]) -> Tensor:
    """Return the gates that the caller gave, or those that the adapter is pinned to."""
    if gates is None:
        pinned = scope_of(model).pinned.get(name)
        if pinned is None:
            rule = "gates, or a pinned adapter, since LoRA has no routing"
            cure = "Pass gates, or fix them first with tucka.peft.pin_route(model, ...)"
            raise RouteError(expected("gates", rule, f"the routed adapter {name!r}", where=_WHERE, cure=cure))
        return pinned
    return checked_gates(gates, shape, dtype=torch.get_default_dtype(), where=_WHERE)


def _lora_tensors(model: nn.Module, name: str, gates: Tensor) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Build the file's tensors, and the rank of each layer by its name in the base model."""
    _check_names(model, name)
    saved = get_peft_model_state_dict(model, adapter_name=name)
    ranks: dict[str, int] = {}
    for path, layer in layers_of(model, name):
        saved = {key: value for key, value in saved.items() if not key.startswith(f"{path}.tucka_")}
        _check_is_called(model.get_submodule(path.rpartition(".")[0]), path)
        down, up = _lora_pair(layer, name, gates, path)
        saved[f"{path}.lora_A.weight"], saved[f"{path}.lora_B.weight"] = down, up
        ranks[base_name(path)] = down.shape[0]
    # Without a PeftModel around the model its keys have no prefix; files always have one.
    lead = "" if isinstance(model, PeftModel) else PREFIX
    # Clones, since the file format refuses tensors that share memory.
    return {lead + key: value.detach().cpu().clone().contiguous() for key, value in saved.items()}, ranks


def _lora_pair(layer: TuckALayer, name: str, gates: Tensor, path: str) -> tuple[Tensor, Tensor]:
    """Return A and B of one layer, in the shapes of PEFT's own LoRA."""
    base = layer.get_base_layer()
    if isinstance(layer.base_layer, BaseTunerLayer):
        rule = "an adapter on the base layer itself, not on top of another method's"
        raise ConfigError(expected("model", rule, type(layer.base_layer).__name__, where=path, cure=_MERGE))
    known = isinstance(base, (nn.Linear, *_CONVOLUTIONS)) or type(base).__name__ == "Conv1D"
    # A layer that hides its weight is a quantised linear; PEFT knows more kinds of them than could be listed here.
    if not known and (readable_weight(layer) is not None or is_convolution(base)):
        rule = "a linear layer, a Conv1D or a convolution, which PEFT's LoRA adapts"
        raise ConfigError(expected("model", rule, type(base).__name__, where=path, cure=_MERGE))
    if isinstance(base, _CONVOLUTIONS):
        _check_convolution(base, layer.experts(name).spec.rank, path)
    up, down = thin_update(layer, name, gates)
    return _over_kernel(base, down, up) if isinstance(base, _CONVOLUTIONS) else (down, up)


def _check_is_called(parent: nn.Module, path: str) -> None:
    """Raise where torch's encoder layer would read the weight of PEFT's LoRA layer in evaluation, and not call it."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        rule, got = "a layer that its parent calls in evaluation too", type(parent).__name__
        raise ConfigError(expected("model", rule, got, where=path, cure=_MERGE))


def _check_names(model: nn.Module, name: str) -> None:
    """Raise where PEFT's LoRA would put the exported numbers elsewhere: names that it takes for a mixture's experts."""
    if not any(map(is_experts, model.modules())):
        return
    for path, _ in layers_of(model, name):
        if path.rpartition(".")[2] in NAMES_OF_EXPERTS:
            rule = "no layers whose names PEFT takes for the weights of the model's experts"
            raise ConfigError(expected("model", rule, path, where=_WHERE, cure=_MERGE))


def _check_convolution(base: Any, rank: int, path: str) -> None:
    """Raise where PEFT's LoRA of a convolution would compute something else, or be no smaller than the layer."""
    positions = math.prod(base.kernel_size)
    if positions > 1 and any(step != 1 for step in base.dilation):
        # PEFT's lora_A does not take the base's dilation over.
        raise ConfigError(expected("model", "dilation 1", tuple(base.dilation), where=path, cure=_MERGE))
    if base.padding_mode != "zeros":
        raise ConfigError(expected("model", "zero padding", repr(base.padding_mode), where=path, cure=_MERGE))
    full = min(base.out_channels, base.in_channels * positions)
    if positions > 1 and rank * positions > full:
        rule = f"LoRA's rank r·{positions} for this kernel to be at most the weight's own, {full}"
        raise ConfigError(expected("r", rule, f"r = {rank}, so {rank * positions}", where=path, cure=_MERGE))


def _over_kernel(base: Any, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Spread a channel-wise update over a kernel: LoRA applies the kernel first, TuckA the channels."""
    kernel, rank = tuple(base.kernel_size), down.shape[0]
    positions = math.prod(kernel)
    delta = torch.eye(positions, dtype=down.dtype, device=down.device)
    spread = torch.einsum("rc,ab->racb", down, delta).reshape(rank * positions, base.in_channels, *kernel)
    columns = up.reshape(base.out_channels, positions, rank).transpose(1, 2)
    return spread, columns.reshape(base.out_channels, rank * positions, *(1 for _ in kernel))


def _lora_config(model: nn.Module, name: str, ranks: dict[str, int]) -> LoraConfig:
    """Carry over what both configurations have; each layer's alpha is its rank, so that LoRA's scale is one."""
    config = cast(TuckAConfig, cast(Any, model).peft_config[name])
    kinds = [type(layer.get_base_layer()).__name__ for _, layer in layers_of(model, name)]
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    # PEFT takes the first expression that matches the end of a layer's name, hence the anchor.
    patterns = {f"^{re.escape(path)}": rank for path, rank in ranks.items()}
    alike = len(set(ranks.values())) == 1
    lora = LoraConfig(
        r=next(iter(ranks.values())) if alike else config.r,
        lora_alpha=next(iter(ranks.values())) if alike else config.r,
        rank_pattern={} if alike else patterns,
        alpha_pattern={} if alike else dict(patterns),
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=config.modules_to_save,
        bias="lora_only" if config.bias == "tucka_only" else config.bias,
        fan_in_fan_out="Conv1D" in kinds,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    if config.task_type is None:  # how PEFT's AutoPeftModel then finds the base model's class
        lora.auto_mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return lora
