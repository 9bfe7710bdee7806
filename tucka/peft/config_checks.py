"""What the fields of a `TuckAConfig` have to be, beyond the sizes and options of its `TuckerSpec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tucka.backends.torch.routing.inputs import ROLES
from tucka.checks import check_choice, check_count, check_finite, check_least
from tucka.errors import ConfigError, expected
from tucka.peft.files.reading import FORMAT_VERSION

__all__ = ["check_fields"]

_WHERE = "TuckAConfig"


def check_fields(config: Any) -> None:
    """Raise where a field breaks its rule, and make plain values of the others, which can be saved."""
    _check_options(config)
    _check_patterns(config)
    _check_layers(config)
    _check_pinned(config)


def _check_options(config: Any) -> None:
    """Check the options of routing and training."""
    check_choice("route_tokens", config.route_tokens, ("all", "prompt", "padded"), where=_WHERE)
    check_choice("bias", config.bias, ("none", "all", "tucka_only"), where=_WHERE)
    for name in ("keeps_router", "sync_routing", "init_weights"):
        setattr(config, name, check_choice(name, getattr(config, name), (True, False), where=_WHERE))
    check_choice("samples_first", config.samples_first, (None, True, False), where=_WHERE)
    _check_group_names(config)
    _check_input_names(config)
    config.router_seed = check_count("router_seed", config.router_seed, least=0, where=_WHERE)
    config.tucka_format = check_count("tucka_format", config.tucka_format, where=_WHERE)
    if config.tucka_format > FORMAT_VERSION:
        rule = f"a format this tucka knows, at most {FORMAT_VERSION}"
        raise ConfigError(expected("tucka_format", rule, config.tucka_format, where=_WHERE, cure="Update tucka"))


def _check_patterns(config: Any) -> None:
    """Check what is given for some layers alone, and the share that is dropped."""
    rules: dict[str, Callable[..., Any]] = {"rank_pattern": check_count, "alpha_pattern": check_finite}
    for name, rule in rules.items():
        given = getattr(config, name) or {}
        if not isinstance(given, Mapping) or not all(isinstance(layer, str) for layer in given):
            rule_of_names = "a dict with names of layers, or patterns of names"
            raise ConfigError(expected(name, rule_of_names, repr(given), where=_WHERE))
        found = {layer: rule(f"{name}[{layer!r}]", value, where=_WHERE) for layer, value in given.items()}
        setattr(config, name, found)
    _check_tokens(config)
    config.dropout = check_least("dropout", config.dropout, 0, where=_WHERE)
    if config.dropout >= 1:
        raise ConfigError(expected("dropout", "a share from 0 to below 1", config.dropout, where=_WHERE))


def _check_tokens(config: Any) -> None:
    """Check which tokens train."""
    given = _plain(config.trainable_token_indices)
    if isinstance(given, Mapping):
        given = {str(layer): _plain(indices) for layer, indices in given.items()}
    for indices in given.values() if isinstance(given, dict) else [] if given is None else [given]:
        if not isinstance(indices, list):
            rule = "a list of whole numbers, or a dict of names of layers to such lists"
            raise ConfigError(expected("trainable_token_indices", rule, repr(given), where=_WHERE))
        for index in indices:
            check_count("trainable_token_indices", index, least=0, where=_WHERE)
    config.trainable_token_indices = given


def _check_group_names(config: Any) -> None:
    """Check the names of the groups."""
    names = config.group_names
    if names is None:
        return
    fits = isinstance(names, (list, tuple)) and all(isinstance(name, str) and name for name in names)
    if not fits or len(set(names)) != len(names) or len(names) != config.k:
        rule = f"{config.k} different names, one for each group"
        raise ConfigError(expected("group_names", rule, repr(names), where=_WHERE))
    config.group_names = list(names)


def _check_input_names(config: Any) -> None:
    """Check what is said of a model's arguments."""
    given = config.input_names or {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ConfigError(expected("input_names", "a dict with names of arguments", repr(given), where=_WHERE))
    for name, role in given.items():
        check_choice(f"input_names[{name!r}]", role, ROLES, where=_WHERE)
    config.input_names = dict(given)


def _check_layers(config: Any) -> None:
    """Check which layers are chosen."""
    for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "router_module"):
        value = getattr(config, name)
        is_text = value is None or (isinstance(value, str) and name != "modules_to_save")
        is_list = isinstance(value, (list, tuple, set)) and all(isinstance(entry, str) for entry in value)
        if not is_text and (not is_list or name == "router_module"):
            kinds = {"modules_to_save": "a list of names", "router_module": "a name"}
            rule = kinds.get(name, "a list of names, or one pattern")
            raise ConfigError(expected(name, rule, repr(value), where=_WHERE))
    for name in ("target_modules", "exclude_modules"):
        value = getattr(config, name)
        setattr(config, name, set(value) if isinstance(value, (list, tuple)) else value)
    config.layers_to_transform = _plain(config.layers_to_transform)
    indices = config.layers_to_transform
    for index in indices if isinstance(indices, list) else [] if indices is None else [indices]:
        check_count("layers_to_transform", index, least=0, where=_WHERE)
    if isinstance(config.target_modules, str) and config.layers_to_transform is not None:
        rule = "None where target_modules is a pattern"
        raise ConfigError(expected("layers_to_transform", rule, config.layers_to_transform, where=_WHERE))
    if config.layers_pattern and config.layers_to_transform is None:
        rule = "indices where layers_pattern is given"
        raise ConfigError(expected("layers_to_transform", rule, None, where=_WHERE))


def _check_pinned(config: Any) -> None:
    """Check the gates of a pinned route."""
    if config.pinned_gates is None:
        return
    rows = _plain(config.pinned_gates)
    fits = isinstance(rows, list) and len(rows) == config.k
    if not fits or any(not isinstance(row, list) or len(row) != config.t for row in rows):
        rule = f"{config.k} lists of {config.t} numbers (k, t)"
        raise ConfigError(expected("pinned_gates", rule, config.pinned_gates, where=_WHERE))
    config.pinned_gates = [[check_finite("pinned_gates", gate, where=_WHERE) for gate in row] for row in rows]


def _plain(value: Any) -> Any:
    """Turn arrays, tensors, tuples and their numbers into lists and numbers that JSON can hold."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value
