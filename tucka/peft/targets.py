"""What an adapter is refused for before anything of the model changes."""

from __future__ import annotations

from collections.abc import Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tucka.backends.torch.modules import width_of
from tucka.errors import ConfigError, expected
from tucka.peft.config import TuckAConfig

__all__ = ["check_adapter_name", "check_targets", "names"]


def names(ending: str, name: str) -> bool:
    """Tell whether a module's full name is, or ends with, the one given.

    Parameters
    ----------
    ending : str
        What the user wrote.
    name : str
        The full name.

    Returns
    -------
    bool
        Whole parts are compared.

    Examples
    --------
    >>> names("attention.query", "layer.0.attention.query"), names("query", "layer.0.subquery")
    (True, False)
    """
    return name == ending or name.endswith("." + ending)


def check_adapter_name(name: str) -> None:
    """Refuse names that a module's container cannot hold.

    Parameters
    ----------
    name : str
        The adapter's name.

    Raises
    ------
    ConfigError
        If it is empty, has a dot, or is the name of one of the container's own attributes.

    Examples
    --------
    >>> check_adapter_name("default")
    """
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        rule = "a name without dots that is no attribute of torch's ModuleDict"
        raise ConfigError(expected("adapter_name", rule, repr(name), where="TuckAModel"))


def check_targets(config: TuckAConfig, targets: Mapping[str, nn.Module], model: nn.Module) -> None:
    """Refuse layers that cannot be adapted, and options that do not fit them.

    Parameters
    ----------
    config : TuckAConfig
        The adapter's configuration.
    targets : mapping of str to Module
        Full name and module of each target.
    model : Module
        The model they are in.

    Raises
    ------
    ConfigError
        If a target or an option does not fit.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> check_targets(TuckAConfig(r=2, target_modules=["0"]), {"0": model[0]}, model)
    """
    for name, module in targets.items():
        _check_target(config, name, module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
        parent = model.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            cure = "Take it out with exclude_modules"
            rule = "a layer that its parent calls, but nn.MultiheadAttention only reads its weight"
            raise ConfigError(expected("target_modules", rule, name, where="TuckAConfig", cure=cure))
    owner = config.router_module
    if targets and owner is not None and not any(names(owner, name) for name in targets):
        raise ConfigError(expected("router_module", "the name of an adapted layer", repr(owner), where="TuckAConfig"))


def _check_target(config: TuckAConfig, name: str, layer: nn.Module) -> None:
    width = width_of(layer, name)
    if config.r > width:
        cure = "Choose a smaller r or exclude the layer"
        raise ConfigError(expected("r", f"at most the width {width}", config.r, where=name, cure=cure))
    if isinstance(layer, nn.modules.conv._ConvNd) and config.routing == "token":
        rule = "'batch' or 'sample' where a convolution is adapted"
        raise ConfigError(expected("routing", rule, "'token'", where=name))
