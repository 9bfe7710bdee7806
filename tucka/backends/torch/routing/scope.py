"""The routing scope: what all adapted layers of one model share while it runs."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tucka.backends.torch.private import is_replica
from tucka.backends.torch.routing.calls import Call, Parent
from tucka.backends.torch.routing.forwards import Forward, Forwards
from tucka.backends.torch.routing.generation import Generating, Preparing, Sharing
from tucka.backends.torch.routing.inputs import Inputs
from tucka.backends.torch.routing.layouts import OF_OTHER_TOKENS, Layout, View, view_of
from tucka.backends.torch.routing.making import Maker
from tucka.backends.torch.routing.memory import Memory, after
from tucka.backends.torch.routing.methods import Method
from tucka.backends.torch.routing.parts import Anatomy, Part
from tucka.backends.torch.routing.permitted import check_graph, misfit
from tucka.backends.torch.routing.router import Router
from tucka.backends.torch.routing.routes import AS_IT_IS, Fit, Route, even_mixture, fitted
from tucka.errors import RouteError, expected

__all__ = ["RouteOptions", "RoutingScope", "routing_scope", "scope_of"]

_WHOLE = Part(None)


@dataclass(frozen=True)
class RouteOptions:
    """How an adapter is routed, beyond what its `TuckerSpec` says."""

    prompt_only: bool = False
    owner_only: bool = False
    synchronized: bool = True
    samples_first: bool | None = None
    input_names: Mapping[str, str] = field(default_factory=dict)


class RoutingScope:
    """The routes of one model's current forward, and the routers that make them.

    All adapted layers of a model share one scope. Nothing in it is global: two models share no state, and two threads
    of one model share none either. Copying or pickling a model leaves running forwards behind.

    Examples
    --------
    >>> scope = RoutingScope()
    >>> scope.routers("default")
    {}
    """

    def __init__(self) -> None:
        self.key = secrets.token_hex(8)  # by which a cache knows whose routes it carries
        self.forwards = Forwards()
        self.maker = Maker(self)
        self.memory = Memory(self)
        # By adapter and part of the model: the layer that holds the router, the counts, the latest gates.
        self.owners: dict[str, dict[str, Any]] = {}
        self.options: dict[str, RouteOptions] = {}
        self.names: dict[str, str] = {}  # what some of the model's arguments are, as the options say
        self.pinned: dict[str, Tensor] = {}
        self._pinned_fits: dict[str, Fit] = {}
        self.load: dict[str, dict[str, Tensor]] = {}
        self.last: dict[str, dict[str, Tensor | None]] = {}
        # What is called with each route that is made: router, input (B, ..., d), mask and gates.
        self.observers: dict[str, Callable[[Router, Tensor, Tensor | None, Tensor], None]] = {}
        self.group: Any = None  # the ranks that route together; None for those of the running DDP, or all
        self._root: nn.Module | None = None
        self.layers: list[Any] = []  # the adapted ones of the model
        self._places: dict[int, str] = {}  # by layer: where it was when the model was attached
        self.sees_again = False  # whether any layer sees cached tokens again
        self.has_decoder = False  # whether any sees what an encoder has made
        self._called: list[nn.Module] = []
        self._handles: list[Any] = []

    # Adapters

    def own(self, adapter: str, layer: Any) -> None:
        """Make a layer the owner of an adapter's router for its part of the model, and start the adapter's counts."""
        self.owners.setdefault(adapter, {})[layer.tucka_part] = layer
        # From the start, so that a compiled forward finds the entry when it is traced, and is not traced again.
        self.last.setdefault(adapter, {})[layer.tucka_part] = None
        self.reset_load(adapter)
        layer.tucka_router[adapter].look()

    def reset_load(self, adapter: str) -> None:
        """Count an adapter's routings from zero again."""
        self.load[adapter] = {}
        for part, router in self.routers(adapter).items():
            device = router.centroids.device
            device = torch.device("cpu") if device.type == "meta" else device
            with torch.inference_mode(False):  # else counting would fail in training, which may come later
                self.load[adapter][part] = torch.zeros(router.spec.groups, dtype=torch.int64, device=device)

    def forget(self, adapter: str) -> None:
        """Drop all that is kept for an adapter; with the last one, leave the model."""
        entries: dict[str, Any]
        for entries in (
            self.owners,
            self.options,
            self.pinned,
            self._pinned_fits,
            self.load,
            self.last,
            self.observers,
        ):
            entries.pop(adapter, None)
        self.maker.first.pop(adapter, None)
        self.forwards.groups.clear()  # they hold the layers' parts
        for forward in self.forwards.state.open:
            for routes in (forward.routes, forward.known, forward.encoded):
                routes.pop(adapter, None)
        if not self.options:
            self.detach()

    def routers(self, adapter: str) -> dict[str, Router]:
        """Return an adapter's routers by the parts of the model that they route."""
        owners = self.owners.get(adapter, {})
        return {part: cast(Router, layer.tucka_router[adapter]) for part, layer in owners.items()}

    def router(self, adapter: str, part: str | None = None) -> Router | None:
        """Return an adapter's router: that of one part, or the first."""
        routers = self.routers(adapter)
        return next(iter(routers.values()), None) if part is None else routers.get(part)

    # The model

    def attach(self, root: nn.Module) -> None:
        """Let the calls of a model be recorded, as its adapted layers now need it."""
        self.detach()
        self._root = root
        self.names = {name: role for options in self.options.values() for name, role in options.input_names.items()}
        self._called.append(root)
        layers = {path: module for path, module in root.named_modules() if getattr(module, "tucka_scope", None) is self}
        self.layers = list(layers.values())
        if self.is_pinned():  # no call has a route of its own
            for kind in (Sharing, Generating, Preparing):
                kind.put_on(root, self)
            return
        self._handles = [root.register_forward_pre_hook(self._refuse_replicas)]
        self._places = {id(layer): path for path, layer in layers.items()}
        self.sees_again = any(layer.tucka_layout is Layout.CACHED_TOKENS for layer in layers.values())
        self.has_decoder = any(layer.tucka_role == "decoder" for layer in layers.values())
        for module, part in list(Anatomy(root).calls({layer.tucka_part for layer in layers.values()})):
            Call.put_on(module, self, part)
            Method.put_on(module)
            Generating.put_on(module, self)
            Preparing.put_on(module, self)
            self._called.append(module)
        for path, layer in layers.items():
            if layer.tucka_layout is Layout.AS_THE_PARENT_SAYS:
                parent = root.get_submodule(path.rpartition(".")[0])
                Parent.put_on(parent, self)
                self._called.append(parent)

    def is_pinned(self) -> bool:
        """Tell whether all adapters are pinned, so that no calls are recorded."""
        return all(adapter in self.pinned for adapter in self.options)

    def part_around(self, module: nn.Module) -> str:
        """Return the part of the model that the adapted layers inside a module belong to."""
        layers: Any = module.modules()
        return next(str(layer.tucka_part) for layer in layers if getattr(layer, "tucka_scope", None) is self)

    def detach(self) -> None:
        """Take everything off the model again that `attach` put there."""
        for module in reversed(self._called):
            for kind in (Preparing, Generating, Parent, Method, Call, Sharing):
                kind.take_off(module, self)
        for handle in self._handles:
            handle.remove()
        self._called, self._handles, self.layers, self._root = [], [], [], None
        self.forwards.groups.clear()

    def refresh(self) -> None:
        """Attach or detach after adapters have been pinned, or lifted from their pins."""
        if self._root is not None:
            self.attach(self._root)

    def _refuse_replicas(self, module: nn.Module, _args: Any) -> None:
        if is_replica(module):  # of nn.DataParallel, which copies modules past their scope
            rule, got = "one process for each device", "nn.DataParallel, which cannot train or run a router"
            cure = "Start the script with `accelerate launch` or `torchrun`, or pin the route"
            raise RouteError(expected("model", rule, got, where=type(module).__name__, cure=cure))

    def has_lost(self, layer: nn.Module) -> bool:
        """Tell whether a layer has been cut out of the model, as stages of a pipeline are."""
        path = self._places.get(id(layer))
        if path is None or self._root is None:
            return False
        module: Any = self._root
        for name in path.split("."):
            module = getattr(module, name, None)
        return module is not layer

    @property
    def root(self) -> nn.Module | None:
        """The model whose calls are recorded."""
        return self._root

    def path(self, layer: nn.Module) -> str:
        """Find a layer's full name in the model, for messages."""
        modules = self._root.named_modules() if self._root is not None else ()
        return next((name for name, module in modules if module is layer), type(layer).__name__)

    # What layers ask for

    def fit(self, adapter: str, layer: Any, x: Tensor) -> Fit:
        """Return one adapter's gates for a layer's input (..., d), making the route if there is none yet."""
        fixed = self.pinned.get(adapter)
        if fixed is not None:
            known = self._pinned_fits.get(adapter)
            is_same = known is not None and known.gates is fixed and fixed.device == x.device
            if known is not None and is_same and not self.forwards.has_given():
                return known
            return self._pinned_fit(adapter, layer, fixed, x)
        stack = self.forwards.state.open
        forward = stack[-1] if stack and not torch.is_grad_enabled() else None
        if forward is None or forward.grad or forward.part.name != layer.tucka_part:
            forward = self._running(layer)
        if layer.tucka_place is None or torch.compiler.is_compiling():
            return self._fit(adapter, layer, x, forward)
        # Inputs of one shape get one answer in one call: there are as many of them as adapted layers.
        # But one without gradients, in a reentrant checkpoint, and another with them: only that has the route's graph.
        key = (adapter, layer.tucka_place, x.shape, x.device, torch.is_grad_enabled())
        found = forward.fits.get(key)
        if found is None:
            found = forward.fits[key] = self._fit(adapter, layer, x, forward)
        return found

    def _pinned_fit(self, adapter: str, layer: Any, fixed: Tensor, x: Tensor) -> Fit:
        given = self.forwards.given(adapter)
        if given is not None:
            return self._given_to_pinned(layer, given, x)
        if fixed.device != x.device:
            with torch.inference_mode(False):  # else training could not use it later
                fixed = self.pinned[adapter] = fixed.to(x.device)
        found = self._pinned_fits[adapter] = Fit(fixed, AS_IT_IS)
        return found

    def _fit(self, adapter: str, layer: Any, x: Tensor, forward: Forward) -> Fit:
        layout = self._layout_now(layer, x, forward)
        if layout is Layout.NO_SAMPLE:
            spec = layer.experts(adapter).spec
            gates = even_mixture(spec.groups, spec.experts_per_group, x)
            return fitted(Route(gates), None, x, same_tokens=True, longer=False)  # type: ignore[return-value]
        route = forward.known.get(adapter) or forward.routes.get(adapter)
        if route is None:
            route = self.maker.make(adapter, layer, x, forward, layout)
        elif route.cut and torch.is_grad_enabled():
            check_graph(self, layer)
        route = route.on(x.device)
        view = view_of(x, forward.inputs, layout)
        if layout is Layout.CACHED_TOKENS and route.gates.ndim == 4:
            route = self._with_earlier(adapter, layer, route, view, forward)
        is_same = route.ordered and layout not in OF_OTHER_TOKENS
        same = is_same and (layer.tucka_role != "decoder" or adapter not in forward.known)
        if layout is Layout.PIECES and route.gates.ndim == 4 and x.shape[1:-1] != route.gates.shape[1:-2]:
            view = None  # it is not known which tokens it is called on
        found = fitted(self.expanded(route, forward), view, x, same_tokens=same, longer=forward.past != 0)
        if found is None or (forward.several and not route.given):
            raise misfit(self, layer, x, route, forward)
        return found

    def _given_to_pinned(self, layer: Any, gates: Tensor, x: Tensor) -> Fit:
        """Let a caller's route take the place of a pinned one, where no calls may be recorded."""
        route = Route(gates.to(x.device), given=True)
        forward = self.forwards.innermost(layer.tucka_part)
        inputs = Inputs(rows=route.rows) if forward is None else forward.inputs
        found = fitted(route, view_of(x, inputs, layer.tucka_layout), x, same_tokens=True, longer=False)
        if found is None:
            raise misfit(self, layer, x, route, Forward(_WHOLE, None, (), {}, None))
        return found

    def _layout_now(self, layer: Any, x: Tensor, forward: Forward) -> Layout:
        layout: Layout = layer.tucka_layout
        if layout is not Layout.AS_THE_PARENT_SAYS:
            return layout
        known = any(x is tensor for tensor in forward.of_samples)
        return Layout.SAMPLES_FIRST if known else Layout.NO_SAMPLE

    def _with_earlier(self, adapter: str, layer: Any, route: Route, view: View | None, forward: Forward) -> Route:
        """Put the gates of earlier calls' tokens before this call's, up to the length of a cache of fixed size."""
        earlier, past = forward.earlier.get(adapter), forward.past
        if past and (past < 0 or earlier is None or earlier.shape[1] < past):
            got = "a cache that carries no routes of its tokens, or a compiled call, which cannot count them"
            cure = "Let the adapted model fill the cache itself, or take this layer out with exclude_modules"
            rule = "the routes of all cached tokens, which this layer sees again"
            raise RouteError(expected("route", rule, got, where=self.path(layer), cure=cure))
        gates = after(earlier, route.gates, past)
        length = 0 if view is None or view.lead is None else view.lead[1]
        return replace(
            route, gates=nn.functional.pad(gates, (0, 0, 0, 0, 0, max(0, length - gates.shape[1]))), mask=None
        )

    def expanded(self, route: Route, forward: Forward) -> Route:
        """Repeat a caller's route as generation repeats the rows for its beams."""
        generation = forward.generating() if route.given and not forward.part.name else None
        if generation is None or generation.rows is None or route.rows is None:
            return route
        if route.rows != generation.rows:  # though it may be as many as there are beams or sequences
            return replace(route, unknown=True)
        return route.repeated(generation.times) if forward.inputs.rows == route.rows * generation.times else route

    def _running(self, layer: Any) -> Forward:
        forward = self.forwards.innermost(layer.tucka_part)
        if forward is None:
            cure = "Call the whole model, or wrap the call in `with tucka.backends.torch.routing_scope(model):`"
            rule, got = "a forward of the adapted model", "a layer called by itself"
            raise RouteError(expected("route", rule, got, where=self.path(layer), cure=cure))
        return forward

    def note(self, adapter: str, part: str | None, gates: Tensor) -> None:
        """Remember the latest gates of a part of the model."""
        self.last.setdefault(adapter, {})[part or ""] = gates.detach()

    # What callers say

    @contextlib.contextmanager
    def manual(self, mask: Tensor | None) -> Iterator[None]:
        """Take the layers that are called by themselves inside as one forward."""
        forward = Forward(_WHOLE, None, (), {}, None)
        forward.inputs = Inputs(mask=mask)
        with self.forwards.opened(forward):
            yield
        for name, route in forward.routes.items():
            self.note(name, "", route.gates)

    @contextlib.contextmanager
    def given(self, gates: dict[str, Tensor]) -> Iterator[None]:
        """Use a caller's gates in every call inside."""
        stack = self.forwards.state.given
        stack.append(gates)
        try:
            yield
        finally:
            del stack[next(place for place, known in enumerate(stack) if known is gates)]


def scope_of(model: Any) -> RoutingScope:
    """Find the scope that a model's adapted layers share, not that of an adapted model inside of it."""
    if isinstance(model, RoutingScope):
        return model
    scopes = _outermost(model) if isinstance(model, nn.Module) else []
    if len(scopes) == 1:
        return scopes[0]
    rule, cure = "a model with TuckA layers", "Make one with peft.get_peft_model(model, TuckAConfig(...))"
    if scopes:
        rule, cure = "one adapted model", f"Name one of the {len(scopes)} in it, each of which has routes of its own"
    raise RouteError(expected("model", rule, type(model).__name__, cure=cure))


def _outermost(model: nn.Module) -> list[RoutingScope]:
    """List the scopes in a model, but for those of adapted models inside of others."""
    found: dict[int, RoutingScope] = {}
    for module in model.modules():
        scope = getattr(module, "tucka_scope", None)
        if isinstance(scope, RoutingScope):
            found[id(scope)] = scope
    if len(found) < 2:
        return list(found.values())
    inside = set()
    for scope in found.values():
        others = () if scope.root is None else scope.root.modules()
        inside |= {id(other) for other in others if other is not scope.root}
    return [scope for scope in found.values() if id(scope.root) not in inside]


@contextlib.contextmanager
def routing_scope(model: Any, *, attention_mask: Tensor | None = None) -> Iterator[RoutingScope]:
    """Take the layers that are called by themselves inside as one forward, whose first layer makes the route.

    Calls of the model, of its backbone, encoder or towers need no scope: each is a forward with a route of its own,
    inside of this context too.

    Parameters
    ----------
    model : Module or RoutingScope
        An adapted model, or its scope.
    attention_mask : Tensor, shape (B, S), optional
        True or nonzero where a token counts.

    Yields
    ------
    RoutingScope
        The model's scope.

    Raises
    ------
    RouteError
        If the model has no adapted layers.

    Examples
    --------
    >>> with routing_scope(RoutingScope()) as scope:
    ...     scope.routers("default")
    {}
    """
    scope = scope_of(model)
    with scope.manual(attention_mask):
        yield scope
