"""Checkpoints of the TuckA authors' own code, loaded into the variant of the method that their code computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import CheckpointError, expected
from tucka.peft.adapters import change_config, chosen_adapter, layers_of
from tucka.peft.config import TuckAConfig
from tucka.peft.files.keys import base_name, first_few, places_of
from tucka.peft.files.reading import check_range, read_tensors

__all__ = ["load_official_checkpoint"]

_WHERE = "load_official_checkpoint"
_PARTS = {"g": "cores", "c": "expert_factor", "u": "basis"}
# The adapter's name and ".weight" may follow, depending on who saved it.
_KEY = re.compile(r"(?P<layer>.+)\.tucka_(?P<part>g|c|u|ec)(\.[^.]+)?(\.weight)?")
# The options with which tucka computes what the authors' code computes.
_VARIANT = {
    "affinity": "group_norm",
    "temperature": 1.0,
    "factor_norm": "frobenius",
    "gate_norm": False,
    "routing": "batch",
}

# The tensors of the model, each with the values that it gets.
_Plan = list[tuple[Tensor, Tensor]]


def load_official_checkpoint(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    *,
    adapter_name: str | None = None,
    allow_pickle: bool = False,
) -> None:
    r"""Load a checkpoint of the authors' code; the model then gives the outputs that their code gives.

    Each adapted layer has ``tucka_g`` (k, p, r, r), ``tucka_c`` (t, p) and ``tucka_u`` (d, r), and one of them
    ``tucka_ec`` (k·t, d). The adapter must be made as ``TuckAConfig(affinity="group_norm", factor_norm="frobenius",
    gate_norm=False, ...)`` with the sizes, alpha and targets of the checkpoint. Padding counts in their routing
    feature, so loading sets ``route_tokens="padded"`` in the configuration of this model's adapter. Their code resets
    the centroids at the first forward after loading; this loader keeps them.

    Parameters
    ----------
    model : Module
        A model with a TuckA adapter.
    source : str, Path or mapping of str to Tensor
        A folder with ``adapter_model.safetensors``, a ``.safetensors`` file, or a state dict. Tensors of
        `modules_to_save` are loaded too.
    adapter_name : str, optional
        Which adapter; the active one if None.
    allow_pickle : bool
        Whether a file in torch's pickle format is read too; only from sources that you trust.

    Raises
    ------
    CheckpointError
        If the source cannot be read, a tensor is missing, unknown, zero, not finite, too large for the adapter's
        dtype or of another shape, or the adapter's configuration does not fit. The model is as before then.
    RouteError
        If the model has no TuckA adapter.
    ConfigError
        If there is no such adapter.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from tucka.peft import TuckAConfig
    >>> variant = dict(routing="batch", affinity="group_norm", factor_norm="frobenius", gate_norm=False)
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), TuckAConfig(r=2, target_modules=["0"], **variant))
    >>> key = "base_model.model.0.tucka_"
    >>> state = {key + "g": torch.ones(2, 2, 2, 2), key + "c": torch.ones(2, 2), key + "u": torch.ones(4, 2)}
    >>> load_official_checkpoint(model, {**state, key + "ec": torch.ones(4, 4)})
    """
    scope = scope_of(model)
    name = chosen_adapter(model, adapter_name)
    _check_config(cast(TuckAConfig, cast(Any, model).peft_config[name]))
    factors, others = _sort(read_tensors(source, allow_pickle=allow_pickle))
    plan = _plan_layers(model, name, factors) + _plan_others(model, name, others)
    with torch.no_grad():
        for target, value in plan:
            target.copy_(value)
        for router in scope.routers(name).values():
            router.initialize(router.centroids.clone(), router.center)
            router.count_padding = True
    change_config(model, name, route_tokens="padded")


def _check_config(config: TuckAConfig) -> None:
    for option, value in _VARIANT.items():
        if getattr(config, option) != value:
            cure = f"Make the adapter with TuckAConfig({option}={value!r}, ...)"
            got = repr(getattr(config, option))
            raise CheckpointError(expected(option, f"{value!r} for this checkpoint", got, where=_WHERE, cure=cure))
    if config.pinned_gates is not None or config.route_tokens == "prompt":
        option = "route_tokens" if config.pinned_gates is None else "pinned_gates"
        rule = "an adapter that is routed on all tokens"
        raise CheckpointError(expected(option, rule, getattr(config, option), where=_WHERE))


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[tuple[str, str], Tensor], dict[str, Tensor]]:
    """Separate the adapter's tensors, by layer and part, from those of whole modules."""
    factors: dict[tuple[str, str], Tensor] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = base_name(key.removeprefix("module."))
        match = _KEY.fullmatch(plain)
        if match is None:
            others[plain] = tensor
            continue
        place = (match["layer"], match["part"])
        if place in factors:
            raise CheckpointError(expected(key, "one adapter in the checkpoint", "a second one", where=_WHERE))
        factors[place] = tensor
    return factors, others


def _plan_layers(model: nn.Module, name: str, factors: dict[tuple[str, str], Tensor]) -> _Plan:
    """Pair each tensor of the checkpoint with the parameter that it belongs to."""
    plan: _Plan = []
    left = dict(factors)
    for path, layer in layers_of(model, name):
        plain = base_name(path)
        for part, parameter in _PARTS.items():
            target = getattr(layer.experts(name), parameter)
            plan.append((target, _take(left, plain, part, tuple(target.shape), target.dtype)))
        if name in layer.tucka_router:
            target = cast(Any, layer.tucka_router[name]).centroids
            groups, experts, width = target.shape
            value = _take(left, plain, "ec", (groups * experts, width), target.dtype)
            plan.append((target, value.reshape(target.shape)))
    if left:
        names = first_few(f"{layer}.tucka_{part}" for layer, part in left)
        cure = "Target the layers of the checkpoint, and name the one with tucka_ec in router_module"
        rule = "tensors of layers that the adapter has"
        raise CheckpointError(expected("source", rule, names, where=_WHERE, cure=cure))
    return plan


def _take(
    left: dict[tuple[str, str], Tensor], layer: str, part: str, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    key = f"{layer}.tucka_{part}"
    tensor = left.pop((layer, part), None)
    if tensor is None:
        cure = "The layer with tucka_ec routes: name it in router_module" if part == "ec" else ""
        raise CheckpointError(expected("source", f"a tensor {key}", "none", where=_WHERE, cure=cure))
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        got = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise CheckpointError(expected(key, f"floating-point numbers of shape {shape}", got, where=_WHERE))
    check_range(key, tensor, dtype, _WHERE)
    # The authors' code divides by these norms: of each group's core, of C, of U.
    slices = tensor if part == "g" else tensor[None]
    if part != "ec" and not bool((slices.double().flatten(1).norm(dim=1) > 0).all()):
        raise CheckpointError(expected(key, "a norm above zero, which it is divided by", "zeros", where=_WHERE))
    return tensor


def _plan_others(model: nn.Module, name: str, others: dict[str, Tensor]) -> _Plan:
    """Pair the tensors of `modules_to_save` with those of the model."""
    plan: _Plan = []
    left = dict(others)
    for place in places_of(model, name):
        if place.layer is not None:
            continue
        tensor = left.pop(place.in_file, None)
        if tensor is None or tensor.shape != place.tensor.shape:
            got = "none" if tensor is None else f"shape {tuple(tensor.shape)}"
            rule = f"a tensor of shape {tuple(place.tensor.shape)}"
            raise CheckpointError(expected(place.in_file, rule, got, where=_WHERE))
        check_range(place.in_file, tensor, place.tensor.dtype, _WHERE)
        plan.append((place.tensor, tensor))
    if left:
        rule = "tensors of the adapter and its modules_to_save only"
        raise CheckpointError(expected("source", rule, first_few(left), where=_WHERE))
    return plan
