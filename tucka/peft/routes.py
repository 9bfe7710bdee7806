"""What one does with a routed model: start its router from data, look at its routes, pin them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tucka.backends.torch.routing import Router
from tucka.backends.torch.scope import scope_of
from tucka.core.initialization import balanced_centroids, data_aware_centroids
from tucka.core.routing import routing_feature
from tucka.errors import ConfigError, RouteError, expected
from tucka.peft.layer import TuckALayer
from tucka.spec import Routing, TuckerSpec

# Enough to find a few principal axes; bounds the memory of token routing.
_FEATURES_PER_BATCH = 4096

__all__ = [
    "AdaptedModule",
    "adapted_modules",
    "expert_load",
    "initialize_router",
    "last_route",
    "pin_route",
    "unpin_route",
]


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted layer in the report of `adapted_modules`.

    Parameters
    ----------
    name : str
        The layer's path in the model.
    adapter : str
        The adapter's name.
    kind : str
        Class of the base layer.
    in_features : int
        Width of the adapted input.
    shapes : dict
        Name to shape of each trained tensor.
    parameters : int
        How many numbers they hold, the router's included where the layer owns it.
    owns_router : bool
        Whether the adapter's router is here.
    """

    name: str
    adapter: str
    kind: str
    in_features: int
    shapes: dict[str, tuple[int, ...]]
    parameters: int
    owns_router: bool

    def __str__(self) -> str:
        """Write the row on one line."""
        shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in self.shapes.items())
        return f"{self.name} [{self.adapter}] {self.kind}: {self.parameters:,} parameters ({shapes})"


def _layers(model: nn.Module) -> Iterator[tuple[str, TuckALayer]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, TuckALayer))


def adapted_modules(model: nn.Module) -> list[AdaptedModule]:
    """List the layers of a model that TuckA adapts.

    Parameters
    ----------
    model : Module
        From `peft.get_peft_model`, or any model with TuckA adapters.

    Returns
    -------
    list of AdaptedModule
        A row for each layer and adapter; printing a row gives one line. Empty if nothing is adapted.

    Examples
    --------
    >>> adapted_modules(nn.Linear(2, 2))
    []
    """
    rows = []
    for name, layer in _layers(model):
        for adapter, parts in layer.tucka_experts.items():
            shapes = {key: tuple(value.shape) for key, value in parts.named_parameters()}
            owns = adapter in layer.tucka_router
            if owns:
                shapes["centroids"] = tuple(cast(Router, layer.tucka_router[adapter]).centroids.shape)
            count = sum(torch.Size(shape).numel() for shape in shapes.values())
            kind = type(layer.get_base_layer()).__name__
            rows.append(AdaptedModule(name, adapter, kind, layer.in_features, shapes, count, owns))
    return rows


def _adapter(model: nn.Module, adapter: str | None) -> str:
    """Return the adapter asked for, or the one active one."""
    if adapter is None:
        active = dict.fromkeys(name for _, layer in _layers(model) for name in layer.active_adapters)
        if len(active) != 1:
            raise ConfigError(expected("adapter_name", "given where not exactly one adapter is active", list(active)))
        adapter = next(iter(active))
    if not any(adapter in layer.tucka_experts for _, layer in _layers(model)):
        raise ConfigError(expected("adapter_name", "the name of a TuckA adapter of this model", repr(adapter)))
    return adapter


def _spec(model: nn.Module, adapter: str) -> TuckerSpec:
    return next(layer.experts(adapter) for _, layer in _layers(model) if adapter in layer.tucka_experts).spec


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
    result = torch.zeros(_spec(model, name).groups, dtype=torch.float64) if load is None else load.clone()
    if reset:
        scope.load.pop(name, None)
    return result


@torch.no_grad()
def initialize_router(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    adapter_name: str | None = None,
    max_batches: int = 32,
    progress: bool = True,
) -> None:
    """Start a router from the user's own data; its load counts start anew.

    The centred affinities get directions that split the features evenly, ``"dot"`` and ``"group_norm"`` the paper's
    data-aware initialisation.

    Parameters
    ----------
    model : Module
        A model with a TuckA adapter.
    batches : iterable of mapping
        Keyword arguments of the model's forward; at most `max_batches` are taken.
    adapter_name : str, optional
        Which adapter; the active one if None.
    max_batches : int
        How many batches to look at.
    progress : bool
        Whether to show a progress bar.

    Raises
    ------
    ConfigError
        If there is no such adapter, or no batch.
    RouteError
        If the adapter has no router.
    """
    name, scope = _adapter(model, adapter_name), scope_of(model)
    router = scope.router(name)
    if router is None or name in scope.pinned:
        raise RouteError(expected("adapter_name", "an adapter that is routed", f"the pinned {name!r}"))
    features: list[Tensor] = []
    # Sample means also for batch routing: batch means vary along the same axes, and there are fewer of them.
    granularity: Routing = "token" if router.spec.routing == "token" else "sample"

    def watch(x: Tensor, mask: Tensor | None, _gates: Tensor) -> None:
        feature = routing_feature(x.float(), mask=mask, granularity=granularity)
        kept = feature if granularity == "sample" or mask is None else feature[mask != 0]
        features.append(kept.reshape(-1, x.shape[-1])[:_FEATURES_PER_BATCH].cpu())

    _observe(model, name, itertools.islice(batches, max_batches), watch, progress=progress)
    if not features:
        raise ConfigError(expected("batches", "at least one batch", "none", where="initialize_router"))
    _start(router, torch.cat(features))
    scope.load.pop(name, None)


def _start(router: Router, features: Tensor) -> None:
    """Set a router's centroids and centre from features of shape (n, d)."""
    spec = router.spec
    groups, experts, seed = spec.groups, spec.experts_per_group, router.seed
    if spec.affinity in ("centered", "directional"):
        router.initialize(*balanced_centroids(features, groups=groups, experts_per_group=experts, seed=seed))
    else:
        # The spread of the features themselves: with the authors' a = 10 the scores saturate.
        scale = max(float(features.std(dim=0, correction=0).mean()), 1e-3)
        router.initialize(
            data_aware_centroids(features, groups=groups, experts_per_group=experts, scale=scale, seed=seed)
        )


@torch.no_grad()
def _observe(
    model: nn.Module,
    name: str,
    batches: Iterable[Mapping[str, Any]],
    watch: Callable[[Tensor, Tensor | None, Tensor], None],
    *,
    progress: bool,
) -> None:
    """Run the model in evaluation mode and call `watch` with each new route of an adapter."""
    scope = scope_of(model)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    scope.observers[name] = watch
    try:
        for batch in tqdm(batches, desc="TuckA router: looking at data", disable=not progress, leave=False):
            model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    finally:
        del scope.observers[name]
        model.train(was_training)


def pin_route(
    model: nn.Module,
    *,
    gates: Any = None,
    group: int | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    adapter_name: str | None = None,
) -> Tensor:
    """Fix an adapter's route, so that it is an ordinary update of the weights: it can be merged afterwards.

    Parameters
    ----------
    model : Module
        A model with a TuckA adapter.
    gates : array_like, shape (k, t), optional
        The gates themselves.
    group : int, optional
        A group, all of whose experts get the gate 1/t; with `batches`, the mean gates of what was routed to it.
    batches : iterable of mapping, optional
        Keyword arguments of the model's forward; the mean of the gates that they get.
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
    """
    where = "pin_route"
    name = _adapter(model, adapter_name)
    spec = _spec(model, name)
    shape = (spec.groups, spec.experts_per_group)
    if (gates is None) == (group is None and batches is None):
        raise ConfigError(expected("pin_route", "gates, or group and/or batches", "both or none"))
    if group is not None and not (isinstance(group, int) and 0 <= group < shape[0]):
        raise ConfigError(expected("group", f"a whole number from 0 to {shape[0] - 1}", repr(group), where=where))
    if batches is not None:
        fixed = _measured_gates(model, name, batches, group)
    elif group is not None:
        fixed = torch.zeros(shape)
        fixed[group] = 1.0 / spec.experts_per_group
    else:
        fixed = torch.as_tensor(gates, dtype=torch.float32).detach().clone()
    if tuple(fixed.shape) != shape or not torch.isfinite(fixed).all():
        raise ConfigError(expected("gates", f"finite numbers of shape {shape}", fixed.tolist(), where=where))
    _set_pinned(model, name, fixed)
    return fixed.clone()


def _measured_gates(model: nn.Module, name: str, batches: Iterable[Mapping[str, Any]], group: int | None) -> Tensor:
    """Average the gates that batches get, or those of them that go to one group."""
    decisions: list[Tensor] = []

    def watch(_x: Tensor, mask: Tensor | None, gates: Tensor) -> None:
        rows = gates[mask != 0] if mask is not None and gates.ndim - 2 == mask.ndim else gates
        decisions.append(rows.reshape(-1, *gates.shape[-2:]).cpu())

    _observe(model, name, batches, watch, progress=True)
    gates = torch.cat(decisions) if decisions else torch.zeros(0, 1, 1)
    if group is not None and decisions:
        gates = gates[(gates[:, group] != 0).any(dim=-1)]
    if not len(gates):
        rule = "batches with a routing decision" if group is None else f"batches of which one goes to group {group}"
        raise ConfigError(expected("batches", rule, "none", where="pin_route"))
    return gates.mean(dim=0)


def unpin_route(model: nn.Module, adapter_name: str | None = None) -> None:
    """Route an adapter again that was pinned with `pin_route`.

    Parameters
    ----------
    model : Module
        A model with a TuckA adapter.
    adapter_name : str, optional
        Which adapter; the active one if None.

    Raises
    ------
    RouteError
        If the adapter was created with pinned gates: it has no router.
    ConfigError
        If there is no such adapter.
    """
    name, scope = _adapter(model, adapter_name), scope_of(model)
    if scope.router(name) is None:
        raise RouteError(expected("adapter_name", "an adapter with a router", f"{name!r}, which was created pinned"))
    _set_pinned(model, name, None)


def _set_pinned(model: nn.Module, name: str, gates: Tensor | None) -> None:
    """Set or lift a pin in the scope and in the configuration, and freeze or free the router."""
    scope = scope_of(model)
    config = cast(Any, model).peft_config[name]
    config.pinned_gates = None if gates is None else gates.tolist()
    if gates is None:
        scope.pinned.pop(name, None)
    else:
        scope.pinned[name] = gates
    for _, layer in _layers(model):
        if name in layer.tucka_router:
            layer.frozen_peft_weight_names.pop(name, None)
            if gates is not None:
                layer.frozen_peft_weight_names[name] = ("tucka_router",)
            trains = gates is None and name in layer.active_adapters and layer.tucka_experts[name].basis.requires_grad
            layer.tucka_router[name].requires_grad_(bool(trains))
