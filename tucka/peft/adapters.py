"""Which adapters a model has, and on which of its layers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from tucka.backends.torch.routing.router import Router
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import ConfigError, expected
from tucka.peft.layer import TuckALayer
from tucka.spec import TuckerSpec

__all__ = [
    "AdaptedModule",
    "adapted_modules",
    "change_config",
    "chosen_adapter",
    "layers_of",
    "spec_of",
    "unmerge_first",
]


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted layer in the report of `adapted_modules`.

    Parameters
    ----------
    name : str
        The layer's path in the model.
    adapter : str
        The adapter's name.
    kind : str
        Class of the base layer.
    in_features : int
        Width of the adapted input.
    shapes : dict
        Name to shape of each trained tensor.
    parameters : int
        How many numbers they hold, the router's included where the layer owns it.
    owns_router : bool
        Whether the adapter's router is here.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from tucka.peft import TuckAConfig
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 3)), TuckAConfig(r=2, target_modules=["0"]))
    >>> adapted_modules(model)[0].in_features
    8
    """

    name: str
    adapter: str
    kind: str
    in_features: int
    shapes: dict[str, tuple[int, ...]]
    parameters: int
    owns_router: bool

    def __str__(self) -> str:
        """Write the row on one line."""
        shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in self.shapes.items())
        return f"{self.name} [{self.adapter}] {self.kind}: {self.parameters:,} parameters ({shapes})"


def layers_of(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, TuckALayer]]:
    """Go through the adapted layers of a model, by name; with an adapter given, through those that have it."""
    layers = list(_all_layers(model))
    # An adapted model inside of this one has adapters and routes of its own.
    scope = scope_of(model) if layers else None
    for name, layer in layers:
        if layer.tucka_scope is scope and (adapter is None or adapter in layer.tucka_experts):
            yield name, layer


def _all_layers(model: nn.Module) -> Iterator[tuple[str, TuckALayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TuckALayer))


def adapted_modules(model: nn.Module) -> list[AdaptedModule]:
    """List the layers of a model that TuckA adapts.

    Parameters
    ----------
    model : Module
        From `peft.get_peft_model`, or any model with TuckA adapters.

    Returns
    -------
    list of AdaptedModule
        A row for each layer and adapter; printing a row gives one line. Empty if nothing is adapted.

    Examples
    --------
    >>> adapted_modules(nn.Linear(2, 2))
    []
    """
    rows = []
    for name, layer in _all_layers(model):
        for adapter, parts in layer.tucka_experts.items():
            shapes = {key: tuple(value.shape) for key, value in parts.named_parameters()}
            owns = adapter in layer.tucka_router
            if owns:
                shapes["centroids"] = tuple(cast(Router, layer.tucka_router[adapter]).centroids.shape)
            count = sum(torch.Size(shape).numel() for shape in shapes.values())
            kind = type(layer.get_base_layer()).__name__
            rows.append(AdaptedModule(name, adapter, kind, layer.in_features, shapes, count, owns))
    return rows


def chosen_adapter(model: nn.Module, adapter: str | None) -> str:
    """Return the adapter asked for, or the one active one; a ConfigError if there is no such adapter."""
    if not any(True for _ in layers_of(model)):
        rule, cure = "a model with a TuckA adapter", "Make one with peft.get_peft_model(model, TuckAConfig(...))"
        methods = sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in _configs(model)})
        got = f"{type(model).__name__} with adapters of {', '.join(methods)}" if methods else type(model).__name__
        raise ConfigError(expected("model", rule, got, cure=cure))
    if adapter is None:
        active = dict.fromkeys(name for _, layer in layers_of(model) for name in layer.active_adapters)
        if len(active) != 1:
            raise ConfigError(expected("adapter_name", "a name where not exactly one adapter is active", list(active)))
        adapter = next(iter(active))
    if not any(layers_of(model, adapter)):
        raise ConfigError(expected("adapter_name", "the name of a TuckA adapter of this model", repr(adapter)))
    return adapter


def _configs(model: Any) -> list[Any]:
    configs = getattr(model, "peft_config", None)
    return list(configs.values()) if isinstance(configs, dict) else []


def spec_of(model: nn.Module, adapter: str) -> TuckerSpec:
    """Return the sizes and options of an adapter, which are the same for all of its layers."""
    return next(layer.experts(adapter).spec for _, layer in layers_of(model, adapter))


def change_config(model: nn.Module, adapter: str, **changes: Any) -> None:
    """Change the configuration of an adapter in one model: other models may have been made from the same object."""
    configs = cast(Any, model).peft_config
    config = configs[adapter] = copy.deepcopy(configs[adapter])
    for name, value in changes.items():
        setattr(config, name, value)


def unmerge_first(model: nn.Module) -> None:
    """Unmerge all layers, with the warning that PEFT gives where it does so itself."""
    merged = [layer for _, layer in layers_of(model) if layer.merged]
    if merged:
        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
    for layer in merged:
        layer.unmerge()
