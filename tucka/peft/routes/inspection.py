"""Looking at the routes of a model: those of its latest forward, and how often each group was chosen."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.routing.router import Router
from tucka.backends.torch.routing.scope import scope_of
from tucka.backends.torch.routing.starting import features_of
from tucka.errors import ConfigError, RouteError, expected
from tucka.peft.adapters import chosen_adapter, spec_of
from tucka.peft.routes.observation import observe

__all__ = ["expert_load", "last_route"]


def last_route(model: nn.Module, *, adapter_name: str | None = None, part: str | None = None) -> Tensor:
    """Return the gates of the latest forward.

    Parameters
    ----------
    model : Module
        A model with TuckA adapters.
    adapter_name : str, optional
        Which adapter; the active one if None.
    part : str, optional
        The path of a tower, such as ``"vision_tower"``; the body of the model, or its only adapted part, if None.

    Returns
    -------
    Tensor, shape (k, t), (B, k, t) or (B, S, k, t)
        The gates, detached; the pinned ones for a pinned adapter, whatever `given_route` says.

    Raises
    ------
    RouteError
        If the model has not run yet, has no TuckA adapter, or no such part has run.
    ConfigError
        If there is no such adapter.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (6) to (8).

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from tucka.peft import TuckAConfig
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), TuckAConfig(r=2, k=3, target_modules=["0"]))
    >>> y = model(torch.ones(5, 4))
    >>> last_route(model).shape
    torch.Size([5, 3, 2])
    """
    scope, name = scope_of(model), chosen_adapter(model, adapter_name)
    last = {key: value for key, value in scope.last.get(name, {}).items() if value is not None}
    if part is not None and last and part not in last:
        rule = f"one of {', '.join(map(repr, last))}, which have a route"
        raise RouteError(expected("part", rule, repr(part), where="last_route"))
    chosen = part if part is not None else "" if "" in last else next(iter(last), "")
    gates = scope.pinned.get(name, last.get(chosen))
    if gates is None:
        cure = "Call the model first"
        raise RouteError(expected("model", "one that has run", "one that has not", where="last_route", cure=cure))
    return gates


def expert_load(model: nn.Module, *, reset: bool = False, adapter_name: str | None = None) -> Tensor:
    """Count how often each group was chosen since the router was initialised.

    Parameters
    ----------
    model : Module
        A model with TuckA adapters.
    reset : bool
        Whether to start counting anew afterwards.
    adapter_name : str, optional
        Which adapter; the active one if None.

    Returns
    -------
    Tensor, shape (k,)
        Batches, samples or unmasked tokens, as int64, in all parts of the model; zeros if nothing ran.

    Raises
    ------
    ConfigError
        If there is no such adapter.
    RouteError
        If the model has no TuckA adapter.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from tucka.peft import TuckAConfig
    >>> config = TuckAConfig(r=2, k=3, routing="sample", target_modules=["0"])
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    >>> y = model(torch.ones(5, 4))
    >>> int(expert_load(model, reset=True).sum()), expert_load(model).tolist()
    (5, [0, 0, 0])
    """
    scope, name = scope_of(model), chosen_adapter(model, adapter_name)
    loads = list(scope.load.get(name, {}).values())
    if not loads:  # an adapter without a router
        return torch.zeros(spec_of(model, name).groups, dtype=torch.int64)
    total = torch.stack([load.to(loads[0].device) for load in loads]).sum(dim=0)
    if reset:
        scope.reset_load(name)
    return total


def seen_by_router(model: nn.Module, batches: Iterable[Any], *, where: str) -> tuple[Tensor, Router]:
    """Run a model over batches; return what its router compares with centroids, features (n, d), and the router."""
    name, scope = chosen_adapter(model, None), scope_of(model)
    if name in scope.pinned or not scope.routers(name):
        rule, got = "a model whose active adapter is routed", f"{name!r}, which is pinned or has no router"
        raise RouteError(
            expected("model", rule, got, where=where, cure="A pinned one is routed after unpin_route(model)")
        )
    seen: dict[int, tuple[Router, list[Tensor]]] = {}

    def watch(router: Router, x: Tensor, mask: Tensor | None, _gates: Tensor) -> None:
        rows = features_of(router, x, mask).to(router.centroids)
        if router.spec.routing == "batch" and len(rows):
            rows = rows.mean(dim=0, keepdim=True)
        seen.setdefault(id(router), (router, []))[1].append(rows)

    observe(model, name, batches, watch, title="TuckA route: looking at data", progress=False)
    if len(seen) != 1:
        rule, cure = "batches that one router sees", "Call the part of the model that you want to see"
        raise ConfigError(expected("batches", rule, f"{len(seen)} routers that saw any", where=where, cure=cure))
    ((router, parts),) = seen.values()
    return torch.cat(parts), router
