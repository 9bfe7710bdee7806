"""What an adapter is refused for before anything of the model changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tucka.backends.torch.base_layers import is_convolution, width_of
from tucka.errors import ConfigError, expected
from tucka.peft.config import TuckAConfig

__all__ = ["base_of", "check_adapter_name", "check_targets", "ends_with_name", "owner_of"]


def ends_with_name(name: str, ending: str) -> bool:
    """Tell whether a module's full name is `ending` or ends with it; "query" is no ending of "layer.0.subquery"."""
    return name == ending or name.endswith("." + ending)


def owner_of(config: TuckAConfig, names: Iterable[str]) -> str | None:
    """Return the layer that is to own the router, the first one or the first that the user named; None for none."""
    if config.pinned_gates is not None and not config.keeps_router:
        return None
    ending = config.router_module
    return next((name for name in names if ending is None or ends_with_name(name, ending)), None)


def base_of(module: nn.Module) -> nn.Module:
    """Return the layer inside whatever PEFT has wrapped around it."""
    return cast(nn.Module, module.get_base_layer()) if isinstance(module, BaseTunerLayer) else module


def check_adapter_name(name: str) -> None:
    """Refuse names that a module's container or a folder cannot have."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        rule = "a name without dots that is no attribute of torch's ModuleDict"
        raise ConfigError(expected("adapter_name", rule, repr(name), where="TuckAModel"))
    if Path(name).is_absolute():
        rule = "no absolute path, since PEFT saves the adapter in a folder of this name"
        raise ConfigError(expected("adapter_name", rule, repr(name), where="TuckAModel"))


def check_targets(config: TuckAConfig, targets: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Refuse layers that cannot be adapted, and options that do not fit them."""
    for name, module in targets.items():
        layer = base_of(module)
        width = width_of(layer, name)
        if config.r > width:
            cure = "Choose a smaller r or exclude the layer"
            raise ConfigError(expected("r", f"at most the width {width}", config.r, where=name, cure=cure))
        if is_convolution(layer) and config.routing == "token":
            rule = "'batch' or 'sample' where a convolution is adapted"
            raise ConfigError(expected("routing", rule, "'token'", where=name))
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            rule = "a layer that its parent calls, but nn.MultiheadAttention only reads its weight"
            cure = "Take it out with exclude_modules"
            raise ConfigError(expected("target_modules", rule, name, where="TuckAConfig", cure=cure))
    named = config.router_module
    if targets and named is not None and not any(ends_with_name(name, named) for name in targets):
        raise ConfigError(expected("router_module", "the name of an adapted layer", repr(named), where="TuckAConfig"))
