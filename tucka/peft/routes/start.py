"""Starting a router from data, and keeping its groups balanced."""

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
from tucka.peft.adapters import chosen_adapter
from tucka.peft.files.sharded import whole_parameters
from tucka.peft.routes.observation import RowSample, observe, unmasked
from tucka.spec import Routing

# Enough to find a few principal axes. The limit bounds memory and time, above all with token routing.
_FEATURES = 2048

__all__ = ["balance_router", "initialize_router"]


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
    _, router = _routed(model, adapter_name)
    if router.choice_bias is not None:
        router.update_bias(sum_over_ranks(torch.as_tensor(load)))


def _routed(model: nn.Module, adapter_name: str | None) -> tuple[str, Router]:
    name, scope = chosen_adapter(model, adapter_name), scope_of(model)
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
    >>> expert_load(model)  # both groups are used
    tensor([3, 5])
    """
    name, router = _routed(model, adapter_name)
    check_count("max_batches", max_batches, where="initialize_router")
    _check_scale(scale, router.spec.initialization)
    features, means = (RowSample(_FEATURES, router.in_features, seed=router.seed) for _ in range(2))
    sizes: list[int] = []
    # For batch routing, features of samples are kept too: a few batches alone do not show how batches vary.
    routing: Routing = "token" if router.spec.routing == "token" else "sample"

    def watch(x: Tensor, mask: Tensor | None, _gates: Tensor) -> None:
        mask = None if router.count_padding else mask
        feature = routing_feature(x.float(), mask=mask, routing=routing)
        rows = unmasked(feature, mask, ndim=1)
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
        # A rank without batches computes something here, which the first rank's result replaces below.
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
        centroids, center = balanced_centroids(features, affinity=spec.affinity, **sizes)
    elif spec.initialization == "dai":
        if scale is None:
            # The spread of the features themselves: with the authors' a = 10 the scores saturate.
            scale = max(float(features.std(dim=0, correction=0).mean()), 1e-3)
        # Relative to the centre, as the router compares features.
        centroids = data_aware_centroids(features - center, scale=scale, **sizes)
    else:
        shape = (spec.groups, spec.experts_per_group, features.shape[1])
        centroids = kaiming_centroids(shape, seed=seed, like=features)
    device = router.center.device
    centroids, center = centroids.to(device), center.to(device)
    broadcast_from_first(centroids, center)
    router.initialize(shard_like(centroids, router.centroids), center)
