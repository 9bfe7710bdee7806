"""Starting a router from data, and keeping its groups balanced."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.routing.ranks import sum_over_ranks
from tucka.backends.torch.routing.router import Router
from tucka.backends.torch.routing.scope import scope_of
from tucka.backends.torch.routing.starting import MOST_FEATURES, features_of, like_batches, start_router
from tucka.checks import check_count, check_finite
from tucka.errors import ConfigError, RouteError, expected
from tucka.peft.adapters import chosen_adapter
from tucka.peft.files.sharded import whole_parameters
from tucka.peft.routes.observation import RowSample, observe

# Enough to find a few principal axes. The limit bounds memory and time, above all with token routing.
_FEATURES = 2048

__all__ = ["balance_router", "initialize_router", "set_routing_group"]


def balance_router(model: nn.Module, load: Tensor | Sequence[int], *, adapter_name: str | None = None) -> None:
    """Move the bias on the choice of groups against their load, where ``balance_rate`` is above zero.

    `RouterCallback` does this after each training step. In a training loop of your own, call it there, on all ranks.

    Parameters
    ----------
    model : Module
        A model with a TuckA adapter.
    load : Tensor or sequence of int, shape (k,)
        How often each group was chosen in the step on this rank: ``expert_load(model, reset=True)``.
    adapter_name : str, optional
        Which adapter; the active one if None.

    Raises
    ------
    ConfigError
        If there is no such adapter.
    RouteError
        If the adapter has no router.
    ShapeError
        If there is not one number for each group.

    References
    ----------
    .. [1] arXiv:2408.15664, Algorithm 1.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from tucka.peft import TuckAConfig, expert_load
    >>> config = TuckAConfig(r=2, balance_rate=0.1, target_modules=["0"])
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    >>> y = model(torch.ones(5, 4))
    >>> balance_router(model, expert_load(model, reset=True))
    """
    _, routers = _routed(model, adapter_name)
    total = sum_over_ranks(torch.as_tensor(load), scope_of(model).group)
    for router in routers:
        if router.choice_bias is not None:
            router.update_bias(total)


def _routed(model: nn.Module, adapter_name: str | None) -> tuple[str, list[Router]]:
    """Return an adapter's name and its routers, one for each part of the model."""
    name, scope = chosen_adapter(model, adapter_name), scope_of(model)
    routers = list(scope.routers(name).values())
    if not routers or name in scope.pinned:
        got, cure = f"{name!r}, which has no router", "Give it no start: its route is given or fixed"
        if routers:
            got, cure = f"{name!r}, which is pinned", "Call unpin_route(model) first"
        raise RouteError(expected("adapter_name", "an adapter that is routed", got, cure=cure))
    return name, routers


@torch.no_grad()
def initialize_router(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    adapter_name: str | None = None,
    max_batches: int = 32,
    scale: float | None = None,
    progress: bool = True,
) -> None:
    """Start a router from the user's own data; its load counts start anew.

    The configuration's ``router_init`` says how: directions that split the features evenly (``"balanced"``), the
    paper's data-aware initialisation (``"dai"``), or directions at random (``"kaiming"``). In all three ways, an
    affinity with a centre gets the mean of the features as its centre. Modes and random numbers stay as they were.
    A uniform sample of at most 2,048 features of all batches is kept. For batch routing, give batches of the kind that
    will be routed: the router is fitted to how their means vary. All ranks have to call this; their data is put
    together, and all get the same router.

    Parameters
    ----------
    model : Module
        A model with a TuckA adapter.
    batches : iterable of mapping or Tensor
        Keyword arguments of the model's forward, or its only argument; at most `max_batches` are taken. A loader is
        left as it was; a Python iterator is used up by as many.
    adapter_name : str, optional
        Which adapter; the active one if None.
    max_batches : int
        How many batches to look at.
    scale : float, optional
        The paper's a (Eq. 10), for ``"dai"`` alone; the spread of the features if None.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    ConfigError
        If there is no such active adapter, no batch, a number of batches below 1, or a scale that is
        negative or without ``"dai"``.
    RouteError
        If the adapter has no router, or its parameters are offloaded.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (10).

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from tucka.peft import TuckAConfig, expert_load
    >>> config = TuckAConfig(r=2, routing="sample", target_modules=["0"])
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    >>> batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    >>> initialize_router(model, [batch], progress=False)
    >>> y = model(batch)
    >>> bool((expert_load(model) > 0).all())  # both groups are used
    True
    """
    name, routers = _routed(model, adapter_name)
    check_count("max_batches", max_batches, where="initialize_router")
    _check_scale(scale, routers[0].spec.initialization)
    if any(router.centroids.is_meta for router in routers):
        rule, got = "a router whose parameters are in memory", "one that is offloaded, or on the meta device"
        cure = "Start it before the model is offloaded"
        raise RouteError(expected("model", rule, got, where="initialize_router", cure=cure))
    seen = {id(router): _Seen(router) for router in routers}

    def watch(router: Router, x: Tensor, mask: Tensor | None, _gates: Tensor) -> None:
        seen[id(router)].add(features_of(router, x, mask))

    title = "TuckA router: looking at data"
    observe(model, name, batches, watch, title=title, limit=max_batches, progress=progress)
    group = scope_of(model).group
    found = [data.features(group) for data in seen.values()]
    if not any(len(rows) for rows in found):
        raise ConfigError(expected("batches", "at least one batch", "none", where="initialize_router"))
    for router, rows in zip(routers, found, strict=True):
        if len(rows):  # a part of the model that has not run keeps its start
            with whole_parameters(model, router, written=True):
                start_router(router, rows, scale=scale, group=group)
    scope_of(model).reset_load(name)


class _Seen:
    """What batches show of the features of one router."""

    def __init__(self, router: Router) -> None:
        self._by_batch = router.spec.routing == "batch"
        self._features, self._means = (RowSample(MOST_FEATURES, router.in_features, seed=router.seed) for _ in range(2))
        self._sizes: list[int] = []

    def add(self, rows: Tensor) -> None:
        """Take in the features (n, d) of one batch."""
        if self._by_batch and len(rows):
            self._sizes.append(len(rows))
            mean = rows.mean(dim=0, keepdim=True)
            self._means.add(mean)
            rows = rows - mean
        self._features.add(rows)

    def features(self, group: Any) -> Tensor:
        """Return features (n, d) of the data of all ranks."""
        rows = self._features.gather(group)
        if not self._by_batch or not len(rows):
            return rows
        # A rank that has seen no batch gets the first one's result in the end.
        return like_batches(self._means.gather(group), rows, batch_size=sum(self._sizes) / max(1, len(self._sizes)))


def _check_scale(scale: float | None, way: str) -> None:
    if scale is None:
        return
    if way != "dai":
        rule = f"None with router_init={way!r}, which is not Eq. (10)"
        raise ConfigError(expected("scale", rule, scale, where="initialize_router"))
    if check_finite("scale", scale, where="initialize_router") < 0:
        raise ConfigError(expected("scale", "a number that is not negative", scale, where="initialize_router"))


def set_routing_group(model: nn.Module, group: Any) -> None:
    """Say which ranks route together: those whose batches differ, such as the data-parallel ones of a device mesh.

    Without it, the ranks of the DistributedDataParallel around the model route together, and all ranks under other
    engines.

    Parameters
    ----------
    model : Module
        A model with TuckA adapters.
    group : ProcessGroup or None
        From `torch.distributed.new_group` or a device mesh; None for the default.

    Raises
    ------
    RouteError
        If the model has no TuckA adapter.

    Examples
    --------
    >>> from peft import get_peft_model
    >>> from tucka.peft import TuckAConfig
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), TuckAConfig(r=2, target_modules=["0"]))
    >>> set_routing_group(model, None)
    """
    scope_of(model).group = group
