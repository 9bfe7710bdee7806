"""Fixing an adapter's route, and lifting it again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from tucka.backends.torch.routing.router import Router
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import ConfigError, RouteError, expected
from tucka.peft.adapters import change_config, chosen_adapter, layers_of, spec_of, unmerge_first
from tucka.peft.config import TuckAConfig
from tucka.peft.routes.given import group_index
from tucka.peft.routes.observation import observe, unmasked

__all__ = ["checked_gates", "pin_route", "unpin_route"]


def pin_route(
    model: nn.Module,
    *,
    gates: Any = None,
    group: int | str | None = None,
    batches: Iterable[Any] | None = None,
    adapter_name: str | None = None,
) -> Tensor:
    """Fix an adapter's route, so that it is an ordinary update of the weights: it can be merged afterwards.

    A merged model is unmerged first, with a warning.

    Parameters
    ----------
    model : Module
        A model with a TuckA adapter.
    gates : array_like, shape (k, t), optional
        The gates themselves.
    group : int, optional
        A group, all of whose experts get the gate 1/t; with `batches`, the mean gates of what was routed to it.
    batches : iterable of mapping or Tensor, optional
        Keyword arguments of the model's forward, or its only argument; the mean of the gates that they get.
    adapter_name : str, optional
        Which adapter; the active one if None.

    Returns
    -------
    Tensor, shape (k, t)
        The pinned gates.

    Raises
    ------
    ConfigError
        If not exactly one of the ways is given, or a value does not fit.
    RouteError
        If batches are to be routed by an adapter that was created pinned, or the model has no TuckA adapter.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (4) with fixed gates.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from tucka.peft import TuckAConfig
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), TuckAConfig(r=2, target_modules=["0"]))
    >>> pin_route(model, group=1)
    tensor([[0.0000, 0.0000],
            [0.5000, 0.5000]])
    >>> model.merge_adapter()
    """
    where = "pin_route"
    name = chosen_adapter(model, adapter_name)
    spec = spec_of(model, name)
    shape = (spec.groups, spec.experts_per_group)
    if (gates is None) == (group is None and batches is None):
        got = "none of them" if gates is None else "gates and one of the others"
        cure = "Call pin_route(model, group=0), pin_route(model, batches=...) or pin_route(model, gates=...)"
        raise ConfigError(expected("gates", "them, or group and/or batches", got, where=where, cure=cure))
    group = None if group is None else group_index(model, name, group, where=where)
    _, layer = next(layers_of(model, name))
    dtype = torch.promote_types(layer.experts(name).cores.dtype, torch.float32)  # gates of float64 keep their digits
    if batches is not None:
        gates = _measured_gates(model, name, batches, group)
    elif group is not None:
        gates = torch.zeros(shape, dtype=dtype)
        gates[group] = 1.0 / spec.experts_per_group
    fixed = checked_gates(gates, shape, dtype=dtype, where=where)
    _set_pinned(model, name, fixed)
    return fixed.clone()


def checked_gates(gates: Any, shape: tuple[int, int], *, dtype: torch.dtype, where: str) -> Tensor:
    """Copy fixed gates that a caller gave into a tensor of this shape (k, t), or say what is wrong with them."""
    rule = f"finite numbers of shape {shape}"
    try:
        fixed = torch.as_tensor(gates, dtype=dtype).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:  # rows of several lengths, text
        raise ConfigError(expected("gates", rule, repr(gates), where=where)) from error
    if tuple(fixed.shape) != shape or not torch.isfinite(fixed).all():
        raise ConfigError(expected("gates", rule, fixed.tolist(), where=where))
    return fixed


def _measured_gates(model: nn.Module, name: str, batches: Iterable[Any], group: int | None) -> Tensor:
    """Average the gates that batches get, or those of them that go to one group."""
    decisions: list[Tensor] = []

    def watch(_router: Router, _x: Tensor, mask: Tensor | None, gates: Tensor) -> None:
        decisions.append(unmasked(gates, mask, ndim=2).cpu())

    scope = scope_of(model)
    _check_has_router(model, name)
    unmerge_first(model)  # a merged layer asks for no route
    pinned = scope.pinned.pop(name, None)
    scope.refresh()
    try:
        observe(model, name, batches, watch, title="TuckA route: looking at data")
    finally:
        if pinned is not None:
            scope.pinned[name] = pinned
        scope.refresh()
    gates = torch.cat(decisions) if decisions else torch.zeros(0, 1, 1)
    if group is not None and decisions:
        gates = gates[(gates[:, group] != 0).any(dim=-1)]
    if not len(gates):
        rule = "batches with a routing decision" if group is None else f"batches of which one goes to group {group}"
        raise ConfigError(expected("batches", rule, "none", where="pin_route"))
    return gates.mean(dim=0)


def _check_has_router(model: nn.Module, name: str) -> None:
    if not scope_of(model).routers(name):
        raise RouteError(expected("adapter_name", "an adapter with a router", f"{name!r}, which has none"))


def unpin_route(model: nn.Module, *, adapter_name: str | None = None) -> None:
    """Route an adapter again that was pinned with `pin_route`; a merged model is unmerged first, with a warning.

    Parameters
    ----------
    model : Module
        A model with a TuckA adapter.
    adapter_name : str, optional
        Which adapter; the active one if None.

    Raises
    ------
    RouteError
        If the adapter was created with pinned gates: it has no router, and is not given its routes either.
    ConfigError
        If there is no such adapter.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from tucka.peft import TuckAConfig
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), TuckAConfig(r=2, target_modules=["0"]))
    >>> gates = pin_route(model, group=1)
    >>> unpin_route(model)
    """
    name = chosen_adapter(model, adapter_name)
    if cast(TuckAConfig, cast(Any, model).peft_config[name]).routing != "given":
        _check_has_router(model, name)
    _set_pinned(model, name, None)


def _set_pinned(model: nn.Module, name: str, gates: Tensor | None) -> None:
    """Set or lift a pin in the scope and in the configuration, and freeze or free the router."""
    unmerge_first(model)  # the weights hold the update of the route before
    scope = scope_of(model)
    keeps_router = gates is not None and bool(scope.routers(name))
    change_config(model, name, pinned_gates=None if gates is None else gates.tolist(), keeps_router=keeps_router)
    if gates is None:
        scope.pinned.pop(name, None)
    else:
        scope.pinned[name] = gates
    scope.refresh()
    for _, layer in layers_of(model):
        if name in layer.tucka_router:
            layer.frozen_peft_weight_names.pop(name, None)
            if gates is not None:
                layer.frozen_peft_weight_names[name] = ("tucka_router",)
            trains = gates is None and name in layer.active_adapters and layer.tucka_experts[name].basis.requires_grad
            layer.tucka_router[name].requires_grad_(bool(trains))
