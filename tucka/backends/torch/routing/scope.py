"""The routing scope: what all adapted layers of one model share while it runs.

A route is made once in a forward of the model, by the first adapted layer that runs, and used by all others. Two hooks
on the model mark where a forward begins and ends. Everything here belongs to one model: there is no global state.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.routing.alignment import count_groups
from tucka.backends.torch.routing.forwards import ForwardHooks
from tucka.backends.torch.routing.generation import is_causal
from tucka.backends.torch.routing.ranks import gates_over_ranks, takes_common_decision
from tucka.backends.torch.routing.router import Router
from tucka.backends.torch.routing.runs import Run, is_transformed, outside_checkpoints
from tucka.errors import RouteError, expected

__all__ = ["RouteOptions", "RoutingScope", "routing_scope", "scope_of"]


@dataclass(frozen=True)
class RouteOptions:
    """How an adapter is routed, beyond what its `TuckerSpec` says.

    Parameters
    ----------
    prompt_only : bool
        Whether a causal language model is routed on the tokens before the first label only.
    owner_only : bool
        Whether only the layer that owns the router makes the route, instead of the first one that runs.
    synchronized : bool
        Whether data-parallel ranks take one decision in training with batch routing.

    Examples
    --------
    >>> RouteOptions().synchronized
    True
    """

    prompt_only: bool = False
    owner_only: bool = False
    synchronized: bool = True


class RoutingScope(ForwardHooks):
    """The routes of one model's current forward, and the routers that make them.

    Attributes
    ----------
    owners : dict
        Adapter name to the layer that holds its router.
    options : dict
        Adapter name to its `RouteOptions`, where they are not the default.
    pinned : dict
        Adapter name to fixed gates; such an adapter is not routed.
    load : dict
        Adapter name to the number of routings that each group got.
    last : dict
        Adapter name to the gates of the latest forward, detached; None before the first one.
    observers : dict
        Adapter name to a function that is called with input, token mask and gates of each new route.

    Examples
    --------
    >>> RoutingScope().owners
    {}
    """

    def __init__(self) -> None:
        super().__init__()
        self.owners: dict[str, Any] = {}
        self.options: dict[str, RouteOptions] = {}
        self.pinned: dict[str, Tensor] = {}
        self.load: dict[str, Tensor] = {}
        self.observers: dict[str, Callable[[Tensor, Tensor | None, Tensor], None]] = {}
        self._warned: set[str] = set()

    def own(self, adapter: str, layer: Any) -> None:
        """Make a layer the owner of an adapter's router, and start the adapter's counts.

        Parameters
        ----------
        adapter : str
            Its name.
        layer : Module
            The layer that holds its router.
        """
        self.owners[adapter] = layer
        # From the start, so that a compiled forward finds them when it is traced, and is not traced again.
        self.last[adapter] = None
        self.reset_load(adapter)

    def reset_load(self, adapter: str) -> None:
        """Count an adapter's routings from zero again.

        Parameters
        ----------
        adapter : str
            Name of one that has a router.
        """
        router = self.owners[adapter].tucka_router[adapter]
        device = router.centroids.device
        device = torch.device("cpu") if device.type == "meta" else device
        with torch.inference_mode(False):  # else counting would fail in training, which may come later
            self.load[adapter] = torch.zeros(router.spec.groups, dtype=torch.int64, device=device)

    def forget(self, adapter: str) -> None:
        """Drop all that is kept for an adapter; with the last one, leave the model.

        Parameters
        ----------
        adapter : str
            Its name.
        """
        entries: dict[str, Any]
        for entries in (self.owners, self.options, self.pinned, self.load, self.last, self.observers):
            entries.pop(adapter, None)
        self._warned.discard(adapter)
        for run in self.known_runs():
            run.forget(adapter)
        if not self.owners and not self.pinned:
            self.detach()

    def router(self, adapter: str) -> Router | None:
        """Return an adapter's router.

        Parameters
        ----------
        adapter : str
            Its name.

        Returns
        -------
        Router or None
            None if the adapter was created pinned.
        """
        owner = self.owners.get(adapter)
        return None if owner is None else owner.tucka_router[adapter]

    # What layers ask for

    def gates(self, adapter: str, layer: Any, x: Tensor) -> Tensor:
        """Return the gates of one adapter for one layer's input, making the route if there is none yet.

        Parameters
        ----------
        adapter : str
            Name of the adapter.
        layer : Module
            The layer that asks; its ``in_decoder`` tells whether it is in the decoder of an encoder-decoder.
        x : Tensor, shape (B, ..., d)
            Its input, channels last.

        Returns
        -------
        Tensor, shape (..., k, t)
            Aligned with `x` from the left.

        Raises
        ------
        RouteError
            If no forward of the model is running, or the route does not fit the input.
        """
        fixed = self.pinned.get(adapter)
        if fixed is not None:
            if fixed.device != x.device:
                fixed = self.pinned[adapter] = fixed.to(x.device)
            return fixed
        run = self._running(layer)
        if adapter not in run.routes:
            self._make(adapter, layer, x, run)
        gates = run.fit(adapter, x, in_decoder=layer.in_decoder)
        if gates is None:
            cure = "Take this layer out with exclude_modules, or use routing='batch'"
            rule = f"an input whose rows match the route of {run.routes[adapter].shape[0]} samples"
            raise RouteError(expected("route", rule, f"input {tuple(x.shape)}", where=self.path(layer), cure=cure))
        return gates

    def _running(self, layer: nn.Module) -> Run:
        run = self.running()
        if run is None:
            cure = "Call the whole model, or wrap the call in `with tucka.backends.torch.routing_scope(model):`"
            rule, got = "a forward of the adapted model", "a layer called by itself"
            raise RouteError(expected("route", rule, got, where=self.path(layer), cure=cure))
        return run

    def _make(self, adapter: str, layer: Any, x: Tensor, run: Run) -> None:
        """Route on the input of this layer, for it and all others."""
        options = self.options.get(adapter, RouteOptions())
        router = self._checked_router(adapter, layer, x, run, options)
        # Token routing has no feature that averages; its mask only tells which tokens to count.
        prompt = options.prompt_only and router.spec.routing != "token"
        if prompt and run.labels is None and layer.training and torch.is_grad_enabled():
            self._warn_of_missing_labels(adapter)
        with outside_checkpoints():
            mask = run.mask_for(x, in_decoder=layer.in_decoder, prompt=prompt)
            if options.synchronized and layer.training and takes_common_decision(router):
                gates = gates_over_ranks(router, x, mask)
            else:
                gates = router(x, mask)
            if not is_transformed(gates):
                self._count(adapter, count_groups(gates, mask))
        run.routes[adapter], run.token_masks[adapter] = gates, mask
        run.made_in_decoder[adapter] = layer.in_decoder
        if adapter in self.observers:
            self.observers[adapter](x, mask, gates)

    def _warn_of_missing_labels(self, adapter: str) -> None:
        """Say once that a causal model in training is routed on all of its tokens, though its prompt was asked for."""
        if adapter in self._warned or self._root is None or not is_causal(self._root):
            return
        self._warned.add(adapter)
        rule = (
            f"labels in training with route_tokens='prompt' (adapter {adapter!r}), since they tell prompt from answer"
        )
        cure = "All tokens count now. Pass labels to the model (the Trainer's label smoothing takes them away)"
        warnings.warn(expected("labels", rule, None, cure=cure), stacklevel=2)

    def _count(self, adapter: str, counts: Tensor) -> None:
        """Add to an adapter's counts, on the device where they are made, without waiting for it."""
        load = self.load[adapter]
        if load.device != counts.device:  # the model has moved
            with torch.inference_mode(False):
                load = self.load[adapter] = load.to(counts.device, non_blocking=counts.is_cuda)
        # In place: what a compiled or captured forward starts from is then the same tensor each time.
        load.add_(counts)

    def _checked_router(self, adapter: str, layer: Any, x: Tensor, run: Run, options: RouteOptions) -> Router:
        """Return the router of an adapter if this layer may make the route."""
        router, where = self.router(adapter), self.path
        if router is None:
            rule = f"a router or pinned gates for adapter {adapter!r}"
            raise RouteError(expected("route", rule, "neither", where=where(layer)))
        if getattr(layer, "_is_replica", False):  # set by nn.DataParallel, which copies layers past their scope
            rule, got = "one process for each device", "nn.DataParallel, which cannot train or run a router"
            cure = "Start the script with `accelerate launch` or `torchrun`, or pin the route"
            raise RouteError(expected("model", rule, got, where=where(self.owners[adapter]), cure=cure))
        if options.owner_only and self.owners[adapter] is not layer:
            rule, got = f"the layer of router_module, {where(self.owners[adapter])}, to run first", "an earlier one"
            cure = "Name a layer that runs before all other adapted ones, or leave router_module out"
            raise RouteError(expected("route", rule, got, where=where(layer), cure=cure))
        if x.ndim < 2:
            rule, cure = "an input with axes (B, ..., d)", "Add a batch axis with x[None]"
            raise RouteError(expected("route", rule, f"shape {tuple(x.shape)}", where=where(layer), cure=cure))
        if x.shape[-1] != router.in_features:
            cure = "Adapt one tower only (exclude_modules), or name the layer that routes in router_module"
            rule = f"the first adapted layer that runs to be {router.in_features} wide, as the router"
            raise RouteError(expected("route", rule, f"input {tuple(x.shape)}", where=where(layer), cure=cure))
        if run.grad and not torch.is_grad_enabled() and router.centroids.requires_grad:
            cure = "Use gradient_checkpointing_kwargs={'use_reentrant': False}, or pin the route"
            rule, got = "gradients where the route is made", "none, as in reentrant gradient checkpointing"
            raise RouteError(expected("route", rule, got, where=where(layer), cure=cure))
        return router

    def token_routed(self) -> set[str]:
        """Return the adapters whose tokens are routed one by one.

        Returns
        -------
        set of str
            Their names.
        """
        return {name for name in self.owners if self.owners[name].tucka_router[name].spec.routing == "token"}

    def path(self, layer: nn.Module) -> str:
        """Find a layer's full name in the model, for messages.

        Parameters
        ----------
        layer : Module
            The layer.

        Returns
        -------
        str
            Its dotted path, or its class if it is not in the model.
        """
        modules = self._root.named_modules() if self._root is not None else ()
        return next((name for name, module in modules if module is layer), type(layer).__name__)


def scope_of(model: Any) -> RoutingScope:
    """Find the scope that a model's adapted layers share.

    Parameters
    ----------
    model : Module or RoutingScope
        A model with adapted layers, or any part of it that has one.

    Returns
    -------
    RoutingScope
        The scope.

    Raises
    ------
    RouteError
        If there is no adapted layer inside.

    Examples
    --------
    >>> scope = RoutingScope()
    >>> scope_of(scope) is scope
    True
    """
    if isinstance(model, RoutingScope):
        return model
    for module in model.modules() if isinstance(model, nn.Module) else ():
        scope = getattr(module, "tucka_scope", None)
        if isinstance(scope, RoutingScope):
            return scope
    raise RouteError(expected("model", "a model with TuckA layers", type(model).__name__, where="scope_of"))


@contextlib.contextmanager
def routing_scope(model: Any, *, attention_mask: Tensor | None = None) -> Iterator[RoutingScope]:
    """Take all calls inside as one forward: for those that bypass the model's own, of a backbone, an encoder, a layer.

    The first adapted layer that runs makes the route, and everything that follows uses it, the whole model included.
    Use one block for each batch.

    Parameters
    ----------
    model : Module or RoutingScope
        The adapted model, or a part of it.
    attention_mask : Tensor, shape (B, S), optional
        Padding does not count in the routing feature.

    Yields
    ------
    RoutingScope
        The model's scope.

    Raises
    ------
    RouteError
        If there is no adapted layer inside.

    Examples
    --------
    >>> with routing_scope(RoutingScope()) as scope:
    ...     scope.last
    {}
    """
    scope = scope_of(model)
    with scope.manual_run(attention_mask):
        yield scope
