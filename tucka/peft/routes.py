"""The routes of a model: start its router from data, look at what it decides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.routing import Router
from tucka.backends.torch.scope import scope_of
from tucka.backends.torch.synchronization import broadcast_from_first, gather_rows, shard_like
from tucka.core.initialization import balanced_centroids, data_aware_centroids
from tucka.core.routing import routing_feature
from tucka.errors import ConfigError, RouteError, expected
from tucka.peft.adapters import chosen_adapter as _adapter
from tucka.peft.adapters import spec_of
from tucka.peft.observation import observe
from tucka.spec import Routing

# Enough to find a few principal axes; bounds the memory of token routing.
_FEATURES_PER_BATCH = 4096

__all__ = ["expert_load", "initialize_router", "last_route"]


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
    result = torch.zeros(spec_of(model, name).groups, dtype=torch.int64) if load is None else load.clone()
    if reset:
        scope.load.pop(name, None)
    return result


@torch.no_grad()
def initialize_router(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    adapter_name: str | None = None,
    max_batches: int = 32,
    progress: bool = True,
) -> None:
    """Start a router from the user's own data; its load counts start anew.

    The centred affinities get directions that split the features evenly, ``"dot"`` and ``"group_norm"`` the paper's
    data-aware initialisation. Modes and random numbers of the model stay as they were. With several ranks, all have to
    call this; their data is put together and all get the same router.

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
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    ConfigError
        If there is no such active adapter, or no batch.
    RouteError
        If the adapter has no router.
    """
    name, scope = _adapter(model, adapter_name), scope_of(model)
    router = scope.router(name)
    if router is None or name in scope.pinned:
        raise RouteError(expected("adapter_name", "an adapter that is routed", f"the pinned {name!r}"))
    features = [torch.zeros(0, router.in_features)]
    # Sample means also for batch routing: batch means vary along the same axes, and there are fewer of them.
    granularity: Routing = "token" if router.spec.routing == "token" else "sample"

    def watch(x: Tensor, mask: Tensor | None, _gates: Tensor) -> None:
        mask = None if router.count_padding else mask
        feature = routing_feature(x.float(), mask=mask, granularity=granularity)
        kept = feature if mask is None else feature[mask != 0 if granularity == "token" else (mask != 0).any(dim=1)]
        features.append(kept.reshape(-1, x.shape[-1])[:_FEATURES_PER_BATCH].cpu())

    title = "TuckA router: looking at data"
    observe(model, name, batches, watch, title=title, limit=max_batches, progress=progress)
    rows = gather_rows(torch.cat(features))
    if not len(rows):
        raise ConfigError(expected("batches", "at least one batch", "none", where="initialize_router"))
    _start(router, rows)
    scope.load.pop(name, None)


def _start(router: Router, features: Tensor) -> None:
    """Set a router's centroids and centre from features of shape (n, d), alike on all ranks."""
    spec = router.spec
    groups, experts, seed = spec.groups, spec.experts_per_group, router.seed
    if spec.affinity in ("centered", "directional"):
        centroids, center = balanced_centroids(features, groups=groups, experts_per_group=experts, seed=seed)
    else:
        # The spread of the features themselves: with the authors' a = 10 the scores saturate.
        scale = max(float(features.std(dim=0, correction=0).mean()), 1e-3)
        options: dict[str, Any] = {"groups": groups, "experts_per_group": experts, "scale": scale, "seed": seed}
        centroids, center = data_aware_centroids(features, **options), torch.zeros(features.shape[1])
    device = router.center.device
    centroids, center = centroids.to(device), center.to(device)
    broadcast_from_first(centroids, center)
    router.initialize(shard_like(centroids, router.centroids), center)
