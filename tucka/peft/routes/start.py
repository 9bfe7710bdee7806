"""The routes of a model: start its router from data, look at what it decides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.routing.ranks import broadcast_from_first, shard_like, sum_over_ranks
from tucka.backends.torch.routing.router import Router
from tucka.backends.torch.routing.scope import scope_of
from tucka.checks import check_count, check_finite
from tucka.core.centroids import balanced_centroids, data_aware_centroids, features_like_batches, kaiming_centroids
from tucka.core.routing import routing_feature
from tucka.errors import ConfigError, RouteError, expected
from tucka.peft.adapters import chosen_adapter as _adapter
from tucka.peft.adapters import spec_of
from tucka.peft.files.sharded import whole_parameters
from tucka.peft.routes.observation import RowSample, observe
from tucka.spec import Routing

# Enough to find a few principal axes; bounds memory and time, of token routing above all.
_FEATURES = 2048

__all__ = ["balance_router", "expert_load", "initialize_router", "last_route"]


def last_route(model: nn.Module, adapter_name: str | None = None) -> Tensor:
    """Return the gates of the latest forward.

    Parameters
    ----------
    model : Module
        A model with TuckA adapters.
    adapter_name : str, optional
        Which adapter; the active one if None.

    Returns
    -------
    Tensor, shape (k, t), (B, k, t) or (B, S, k, t)
        The gates, detached; the pinned ones for a pinned adapter.

    Raises
    ------
    RouteError
        If the model has not run yet.
    ConfigError
        If there is no such adapter.
    """
    scope, name = scope_of(model), _adapter(model, adapter_name)
    gates = scope.pinned.get(name, scope.last.get(name))
    if gates is None:
        raise RouteError(
            expected("last_route", "a model that has run", "one that has not", cure="Call the model first")
        )
    return gates


def expert_load(model: nn.Module, reset: bool = False, adapter_name: str | None = None) -> Tensor:
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
        Batches, samples or unmasked tokens, by the routing's granularity; zeros if nothing ran.

    Raises
    ------
    ConfigError
        If there is no such adapter.
    """
    scope, name = scope_of(model), _adapter(model, adapter_name)
    load = scope.load.get(name)
    if load is None:  # created pinned, without a router
        return torch.zeros(spec_of(model, name).groups, dtype=torch.int64)
    if reset:
        scope.reset_load(name)
    return load.clone()


def balance_router(model: nn.Module, load: Tensor | Sequence[int], *, adapter_name: str | None = None) -> None:
    """Move the bias on the choice of groups against their load, where ``balance_rate`` is above zero.

    `RouterCallback` does this after each training step; in a loop of one's own, call it there. With several ranks, all
    have to call it.

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
    """
    _, router = _routed(model, adapter_name)
    if router.choice_bias is not None:
        router.update_bias(sum_over_ranks(torch.as_tensor(load)))


def _routed(model: nn.Module, adapter_name: str | None) -> tuple[str, Router]:
    name, scope = _adapter(model, adapter_name), scope_of(model)
    router = scope.router(name)
    if router is None or name in scope.pinned:
        raise RouteError(expected("adapter_name", "an adapter that is routed", f"the pinned {name!r}"))
    return name, router


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
    paper's data-aware initialisation (``"dai"``), or directions at random (``"kaiming"``); the affinities with a centre
    get the mean of the features as theirs, whatever the way. Modes and random numbers of the model stay as they were.
    Batches are streamed: of all features, a uniform sample of at most 2,048 is kept. For batch routing, give batches of
    the kind that will be routed: how their means vary counts, see `tucka.core.centroids.features_like_batches`.
    With several ranks, all have to call this; their data is put together and all get the same router.

    Parameters
    ----------
    model : Module
        A model with a TuckA adapter.
    batches : iterable of mapping or Tensor
        Keyword arguments of the model's forward, or its only argument; at most `max_batches` are taken.
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
        If the adapter has no router.
    """
    name, router = _routed(model, adapter_name)
    check_count("max_batches", max_batches, where="initialize_router")
    _check_scale(scale, router.spec.initialization)
    features, means = (RowSample(_FEATURES, router.in_features, seed=router.seed) for _ in range(2))
    sizes: list[int] = []
    # Of samples also for batch routing: there are too few batches to tell from them alone how batches vary.
    granularity: Routing = "token" if router.spec.routing == "token" else "sample"

    def watch(x: Tensor, mask: Tensor | None, _gates: Tensor) -> None:
        mask = None if router.count_padding else mask
        feature = routing_feature(x.float(), mask=mask, granularity=granularity)
        kept = feature if mask is None else feature[mask != 0 if granularity == "token" else (mask != 0).any(dim=1)]
        rows = kept.reshape(-1, x.shape[-1])
        if router.spec.routing == "batch" and len(rows):
            sizes.append(len(rows))
            mean = rows.mean(dim=0, keepdim=True)
            means.add(mean)
            rows = rows - mean
        features.add(rows)

    title = "TuckA router: looking at data"
    observe(model, name, batches, watch, title=title, limit=max_batches, progress=progress)
    rows = features.gather()
    if not len(rows):
        raise ConfigError(expected("batches", "at least one batch", "none", where="initialize_router"))
    if router.spec.routing == "batch":
        # A rank that has seen no batch gets the first one's result below.
        rows = features_like_batches(means.gather(), rows, batch_size=sum(sizes) / max(1, len(sizes)) or 1.0)
    with whole_parameters(model, router):
        _start(router, rows, scale)
    scope_of(model).reset_load(name)


def _check_scale(scale: float | None, way: str) -> None:
    if scale is None:
        return
    if way != "dai":
        rule = f"None with router_init={way!r}, which is not Eq. (10)"
        raise ConfigError(expected("scale", rule, scale, where="initialize_router"))
    if check_finite("scale", scale, where="initialize_router") < 0:
        raise ConfigError(expected("scale", "a number that is not negative", scale, where="initialize_router"))


def _start(router: Router, features: Tensor, scale: float | None) -> None:
    """Set a router's centroids and centre from features of shape (n, d), alike on all ranks."""
    spec, seed = router.spec, router.seed
    sizes: dict[str, Any] = {"groups": spec.groups, "experts_per_group": spec.experts_per_group, "seed": seed}
    center = features.mean(dim=0) if spec.has_center else torch.zeros(features.shape[1])
    if spec.initialization == "balanced":
        centroids, center = balanced_centroids(features, kind=spec.affinity, **sizes)
    elif spec.initialization == "dai":
        if scale is None:
            # The spread of the features themselves: with the authors' a = 10 the scores saturate.
            scale = max(float(features.std(dim=0, correction=0).mean()), 1e-3)
        # Seen from the centre, as the features are.
        centroids = data_aware_centroids(features - center, scale=scale, **sizes)
    else:
        shape = (spec.groups, spec.experts_per_group, features.shape[1])
        centroids = kaiming_centroids(shape, seed=seed, like=features)
    device = router.center.device
    centroids, center = centroids.to(device), center.to(device)
    broadcast_from_first(centroids, center)
    router.initialize(shard_like(centroids, router.centroids), center)
