"""The routing scope: what all adapted layers of one model share while it runs.

A route is made once in a forward of the model, by the first adapted layer that runs, and used by all others. Two hooks
on the model mark where a forward begins and ends. Everything here belongs to one model: there is no global state.

Gradient checkpointing runs layers again after the forward has ended. A hook on the forward's outputs fires first in its
backward and puts the route of *that* forward back, so several forwards before one backward do not mix.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tucka.backends.torch.alignment import align_gates, fitting_mask, prompt_mask
from tucka.backends.torch.routing import Router
from tucka.errors import RouteError, expected

__all__ = ["RoutingScope", "routing_scope", "scope_of"]


class _Forward:
    """One run of the model: its masks, its routes, and who made them."""

    def __init__(self, mask: Tensor | None = None, labels: Tensor | None = None, grad: bool = False) -> None:
        self.mask = mask
        self.labels = labels
        self.grad = grad
        self.routes: dict[str, Tensor] = {}
        self.token_masks: dict[str, Tensor | None] = {}
        self.makers: dict[str, nn.Module] = {}


class RoutingScope:
    """The routes of one model's current forward, and the routers that make them.

    Attributes
    ----------
    owners : dict
        Adapter name to the layer that holds its router.
    pinned : dict
        Adapter name to fixed gates; such an adapter is not routed.
    load : dict
        Adapter name to the number of routings that each group got.
    last : dict
        Adapter name to the gates of the latest forward, detached.
    prompt_only : set
        Names of the adapters that route on the prompt only.
    observers : dict
        Adapter name to a function that is called with input, token mask and gates of each new route.

    Examples
    --------
    >>> RoutingScope().owners
    {}
    """

    def __init__(self) -> None:
        self.owners: dict[str, Any] = {}
        self.pinned: dict[str, Tensor] = {}
        self.load: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}
        self.prompt_only: set[str] = set()
        self.observers: dict[str, Callable[[Tensor, Tensor | None, Tensor], None]] = {}
        self._root: nn.Module | None = None
        self._handles: list[Any] = []
        self._forget_runs()

    def _forget_runs(self) -> None:
        self._current: _Forward | None = None
        self._replayed: _Forward | None = None
        self._held: _Forward | None = None
        self._session: dict[str, Any] | None = None
        self._by_cache: weakref.WeakKeyDictionary[Any, _Forward] = weakref.WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the routes of running forwards behind: they hold graphs, which cannot be copied."""
        runs = ("_current", "_replayed", "_held", "_session", "_by_cache")
        return {name: value for name, value in self.__dict__.items() if name not in runs}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_runs()

    # Attaching to a model

    def attach(self, root: nn.Module) -> None:
        """Put the two hooks on a model; once, however often it is called.

        Parameters
        ----------
        root : Module
            The model whose forward is one routing decision.
        """
        if self._root is not None:
            return
        self._root = root
        # Bound methods and not closures: a deep copy of the model then calls the copy of this scope.
        self._handles = [
            root.register_forward_pre_hook(self._before, with_kwargs=True),
            root.register_forward_hook(self._after, with_kwargs=True),
        ]

    def detach(self) -> None:
        """Take the hooks off the model again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._root = None
        self._forget_runs()

    def forget(self, adapter: str) -> None:
        """Drop all that is kept for an adapter.

        Parameters
        ----------
        adapter : str
            Its name.
        """
        entries: dict[str, Any]
        for entries in (self.owners, self.pinned, self.load, self.last, self.observers):
            entries.pop(adapter, None)
        self.prompt_only.discard(adapter)
        self._forget_runs()

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

    # The run of a model

    def begin(self, *, mask: Tensor | None = None, labels: Tensor | None = None, cache: Any = None) -> None:
        """Start a forward: the next adapted layer that runs makes the route, unless one is held for this forward.

        Parameters
        ----------
        mask : Tensor, shape (B, S), optional
            Attention mask; padding does not count in the routing feature.
        labels : Tensor, optional
            Where they have the shape of the tokens, they tell prompt from answer.
        cache : object, optional
            The key-value cache that the forward continues.
        """
        self._replayed = None
        run = _Forward(mask, labels, torch.is_grad_enabled())
        kept = self._held if self._session is not None else self._by_cache.get(cache) if cache is not None else None
        if kept is not None:
            run.routes = {name: gates for name, gates in kept.routes.items() if not self._routes_tokens(name)}
            run.makers = {name: kept.makers[name] for name in run.routes if name in kept.makers}
        self._current = run

    def end(self, output: Any = None, *, cache: Any = None) -> None:
        """End a forward: keep what its backward, its cache or its generation will need.

        Parameters
        ----------
        output : object, optional
            What the model returned.
        cache : object, optional
            The key-value cache that the forward filled.
        """
        run, self._current = self._current, None
        if run is None:
            return
        self.last.update({name: gates.detach() for name, gates in run.routes.items()})
        if torch.compiler.is_compiling():
            return
        if self._session is not None and self._held is None:
            self._held = run
        if cache is not None:
            with contextlib.suppress(TypeError):  # tuples, the old kind of cache, take no weak references
                self._by_cache[cache] = _detached(run)
        if run.grad:
            for leaf in pytree.tree_leaves(_plain(output)):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(_Replay(self, run))

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = _named_arguments(module, args, kwargs)
        mask, labels = named.get("attention_mask"), named.get("labels")
        self.begin(mask=mask, labels=labels, cache=named.get("past_key_values"))

    def _after(self, _module: nn.Module, _args: Any, _kwargs: dict[str, Any], output: Any) -> None:
        self.end(output, cache=getattr(output, "past_key_values", None))

    @contextlib.contextmanager
    def session(self, **kwargs: Any) -> Iterator[None]:
        """Hold the first route (of batch and sample routing) for all forwards inside: one generation.

        Parameters
        ----------
        **kwargs : object
            Arguments of the generation; its ``attention_mask`` serves an encoder that is called by itself.

        Yields
        ------
        None
            Nothing.
        """
        if self._session is not None:
            yield
            return
        self._session, self._held = kwargs, None
        try:
            yield
        finally:
            self._session, self._held, self._current = None, None, None

    def _end_replay(self) -> None:
        self._replayed = None

    # What layers ask for

    def gates(self, adapter: str, layer: nn.Module, x: Tensor) -> Tensor:
        """Return the gates of one adapter for one layer's input, making the route if there is none yet.

        Parameters
        ----------
        adapter : str
            Name of the adapter.
        layer : Module
            The layer that asks.
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
        gates = run.routes.get(adapter)
        if gates is None:
            gates = self._make(adapter, layer, x, run)
        elif run is self._replayed and run.makers.get(adapter) is layer:
            # The layer that made the route must run the same operations when it is computed again.
            return self._align(self._route(adapter, x, run), adapter, layer, x, run)
        return self._align(gates, adapter, layer, x, run)

    def _running(self, layer: nn.Module) -> _Forward:
        if self._current is None and self._session is not None:
            # An encoder that generation calls by itself.
            self._current = self._held = _Forward(self._session.get("attention_mask"))
        run = self._current or self._replayed
        if run is None:
            cure = "Call the whole model, or wrap the call in `with tucka.backends.torch.routing_scope(model):`"
            raise RouteError(
                expected(
                    "route",
                    "a forward of the adapted model",
                    "a layer called by itself",
                    where=self.path(layer),
                    cure=cure,
                )
            )
        return run

    def _make(self, adapter: str, layer: nn.Module, x: Tensor, run: _Forward) -> Tensor:
        router = self.router(adapter)
        if router is None:
            raise RouteError(
                expected(
                    "route", f"a router or pinned gates for adapter {adapter!r}", "neither", where=self.path(layer)
                )
            )
        if x.shape[-1] != router.in_features:
            cure = "Adapt one tower only (exclude_modules), or name the layer that routes in router_module"
            rule = f"the first adapted layer that runs to be {router.in_features} wide, as the router"
            raise RouteError(expected("route", rule, f"input {tuple(x.shape)}", where=self.path(layer), cure=cure))
        if run.grad and not torch.is_grad_enabled() and router.centroids.requires_grad and self._root is not None:
            cure = "Use gradient_checkpointing_kwargs={'use_reentrant': False}"
            raise RouteError(
                expected(
                    "route",
                    "gradients in the layer that routes",
                    "reentrant gradient checkpointing",
                    where=self.path(layer),
                    cure=cure,
                )
            )
        gates = self._route(adapter, x, run)
        run.routes[adapter], run.makers[adapter] = gates, layer
        self._count(adapter, gates, run.token_masks.get(adapter))
        if adapter in self.observers:
            self.observers[adapter](x, run.token_masks.get(adapter), gates)
        return gates

    def _route(self, adapter: str, x: Tensor, run: _Forward) -> Tensor:
        router = self.router(adapter)
        assert router is not None
        mask = fitting_mask(run.mask, x)
        if adapter in self.prompt_only and run.labels is not None:
            mask = prompt_mask(mask, run.labels, x)
        run.token_masks[adapter] = mask
        return router(x, mask)  # type: ignore[no-any-return]

    def _routes_tokens(self, adapter: str) -> bool:
        router = self.router(adapter)
        return router is not None and router.spec.routing == "token"

    @torch.no_grad()
    def _count(self, adapter: str, gates: Tensor, mask: Tensor | None) -> None:
        """Add the decisions to the load, on the device; padding does not count."""
        chosen = (gates != 0).any(dim=-1).to(torch.float64 if gates.device.type == "cpu" else torch.float32)
        if mask is not None and gates.ndim > 2:
            counted = mask != 0 if gates.ndim - 2 == mask.ndim else (mask != 0).flatten(1).any(dim=1)
            chosen = chosen * counted[..., None]
        counts = chosen.reshape(-1, chosen.shape[-1]).sum(dim=0)
        known = self.load.get(adapter)
        if known is None or known.device != counts.device:
            self.load[adapter] = counts if known is None else known.to(counts.device) + counts
        else:
            known.add_(counts)

    def _align(self, gates: Tensor, adapter: str, layer: nn.Module, x: Tensor, run: _Forward) -> Tensor:
        fitted = align_gates(gates, x, run.token_masks.get(adapter))
        if fitted is None:
            cure = "Take this layer out with exclude_modules, or use routing='batch'"
            rule = f"an input whose rows match the route of {gates.shape[0]} samples"
            raise RouteError(expected("route", rule, f"input {tuple(x.shape)}", where=self.path(layer), cure=cure))
        return fitted

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


class _Replay:
    """A hook on an output's gradient: the backward of this forward starts now."""

    def __init__(self, scope: RoutingScope, run: _Forward) -> None:
        self.scope = scope
        self.run = run

    def __call__(self, _gradient: Tensor) -> None:
        self.scope._replayed = self.run
        # At the end of this backward: a stale route must not serve a later call, nor keep a graph alive.
        torch.autograd.Variable._execution_engine.queue_callback(self.scope._end_replay)


def _plain(output: Any) -> Any:
    """Transformers' outputs are dictionaries that torch's tree functions may not know."""
    return dict(output) if isinstance(output, dict) else output


def _detached(run: _Forward) -> _Forward:
    kept = _Forward()
    kept.routes = {name: gates.detach() for name, gates in run.routes.items()}
    return kept


def _named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if len(args) <= 1:  # the usual call, which needs no look at the signature
        return kwargs
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


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
    """Mark a forward by hand, for calls that bypass the model's own: a backbone, an encoder, one layer.

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
    scope.begin(mask=attention_mask)
    try:
        yield scope
    finally:
        scope.end()
