"""The route as the caller gives it: one group, or gates, for each sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import ConfigError, expected
from tucka.peft.adapters import change_config, chosen_adapter, layers_of, spec_of, unmerge_first
from tucka.peft.config import TuckAConfig

__all__ = ["add_group", "given_route", "group_index"]


@contextmanager
def given_route(
    model: nn.Module,
    *,
    groups: Sequence[int | str] | int | str | None = None,
    gates: Any = None,
    adapter_name: str | None = None,
) -> Iterator[None]:
    """Use a route that the caller gives, in every forward, generation and training step inside of the context.

    Works for every adapter. One with ``TuckAConfig(routing="given")`` has no router and runs in no other way. A merged
    model is unmerged first, with a warning.

    Parameters
    ----------
    model : Module
        A model with a TuckA adapter.
    groups : sequence of int or str, or one of them, optional
        The group of each sample, by number or name; its experts get equal gates. One group stands for all samples.
    gates : array_like, shape (k, t) or (B, k, t), optional
        The gates of all samples, or of each. Exactly one of `groups` and `gates` is given.
    adapter_name : str, optional
        Which adapter; the active one if None.

    Yields
    ------
    None
        While the context is open, the route is in use.

    Raises
    ------
    ConfigError
        If a group is unknown, or the gates have another shape or are not finite.
    RouteError
        If a forward has another number of samples than the route. Generation repeats the route for its beams.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (9), with gates that no router makes.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from tucka.peft import TuckAConfig, last_route
    >>> config = TuckAConfig(r=2, k=3, routing="given", target_modules=["0"])
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    >>> with given_route(model, groups=[0, 2]):
    ...     y = model(torch.ones(2, 4))
    >>> last_route(model)[1]
    tensor([[0.0000, 0.0000],
            [0.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    name = chosen_adapter(model, adapter_name)
    if (groups is None) == (gates is None):
        raise ConfigError(expected("groups", "either them or gates", "both or none", where="given_route"))
    chosen = _gates_of_groups(model, name, groups) if gates is None else _checked(model, name, gates)
    unmerge_first(model)  # a merged layer asks for no route
    with scope_of(model).given({name: chosen}):
        yield


def _gates_of_groups(model: nn.Module, name: str, groups: Any) -> Tensor:
    """Give the experts of each sample's group equal gates, (B, k, t); (k, t) for one group."""
    one = isinstance(groups, (int, str))
    listed = [groups] if one else groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if not listed:
        raise ConfigError(expected("groups", "one group for each sample", "none", where="given_route"))
    numbers = [group_index(model, name, group, where="given_route") for group in listed]
    spec = spec_of(model, name)
    gates = torch.zeros(len(numbers), spec.groups, spec.experts_per_group)
    gates[torch.arange(len(numbers)), numbers] = 1.0 / spec.experts_per_group
    return gates[0] if one else gates


def group_index(model: nn.Module, adapter: str, group: Any, *, where: str) -> int:
    """Return the number of a group that a caller names by number or name."""
    names = cast(TuckAConfig, cast(Any, model).peft_config[adapter]).group_names or []
    count = spec_of(model, adapter).groups
    if isinstance(group, str) and group in names:
        return names.index(group)
    is_number = hasattr(group, "__index__") and not isinstance(group, bool) and 0 <= int(group) < count
    if not is_number:
        known = f", or one of the names {names}" if names else ""
        raise ConfigError(expected("group", f"a whole number from 0 to {count - 1}{known}", repr(group), where=where))
    return int(group)


def _checked(model: nn.Module, name: str, gates: Any) -> Tensor:
    spec = spec_of(model, name)
    shape = (spec.groups, spec.experts_per_group)
    rule = f"finite numbers with axes (k, t) or (B, k, t), (k, t) = {shape}"
    try:
        fixed = torch.as_tensor(gates)
        fixed = fixed if fixed.is_floating_point() else fixed.to(torch.get_default_dtype())
    except (TypeError, ValueError, RuntimeError) as error:  # rows of several lengths, text
        raise ConfigError(expected("gates", rule, repr(gates), where="given_route")) from error
    if fixed.ndim not in (2, 3) or tuple(fixed.shape[-2:]) != shape or not torch.isfinite(fixed).all():
        raise ConfigError(expected("gates", rule, f"shape {tuple(fixed.shape)}", where="given_route"))
    return fixed


@torch.no_grad()
def add_group(model: nn.Module, *, name: str | None = None, adapter_name: str | None = None) -> int:
    """Add a group of experts to an adapter without a router: a core for each of its layers, which starts as the base.

    With ``factor_norm="rotation"``, it starts as the rotation that all groups have in common. The parameters of the
    cores are new objects afterwards: make the optimiser after this call.

    Parameters
    ----------
    model : Module
        A model with a TuckA adapter of ``routing="given"``.
    name : str, optional
        The new group's name, where the groups have names.
    adapter_name : str, optional
        Which adapter; the active one if None.

    Returns
    -------
    int
        The number of the new group.

    Raises
    ------
    ConfigError
        If the adapter has a router or pinned gates, or the name is missing, taken or not wanted.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from tucka.peft import TuckAConfig
    >>> config = TuckAConfig(r=2, k=2, group_names=["news", "mail"], routing="given", target_modules=["0"])
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    >>> add_group(model, name="chat")
    2
    >>> with given_route(model, groups="chat"):
    ...     y = model(torch.ones(2, 4))
    """
    adapter = chosen_adapter(model, adapter_name)
    config = cast(TuckAConfig, cast(Any, model).peft_config[adapter])
    if config.routing != "given" or config.pinned_gates is not None:
        rule = "an adapter with routing='given' and no pinned gates, since a router's centroids belong to its groups"
        raise ConfigError(expected("adapter_name", rule, repr(adapter), where="add_group"))
    names = config.group_names
    if (name is None) != (names is None) or (names is not None and name in names):
        rule = "no name, since the groups have none" if names is None else f"a name other than {names}"
        raise ConfigError(expected("name", rule, repr(name), where="add_group"))
    for _, layer in layers_of(model, adapter):
        layer.experts(adapter).add_group()
    changes = {} if names is None else {"group_names": [*names, name]}
    change_config(model, adapter, k=config.k + 1, **changes)
    return config.k
