"""Which routes are known when a call of the model begins, and what is kept for later calls when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tucka.backends.torch.private import is_transformed
from tucka.backends.torch.routing.caches import attach_routes, cached_length, routes_of
from tucka.backends.torch.routing.forwards import Forward
from tucka.backends.torch.routing.routes import Route

if TYPE_CHECKING:
    from tucka.backends.torch.routing.generation import Generation
    from tucka.backends.torch.routing.scope import RoutingScope

__all__ = ["Memory", "after"]


class Memory:
    """Carries the routes of one scope from call to call: in generations, with caches and with encoders' outputs."""

    def __init__(self, scope: RoutingScope) -> None:
        self.scope = scope

    def prepare(self, generation: Generation) -> None:
        """Let the layers of a model whose calls are not recorded, since no route is made in any, go on as before."""
        if self.scope.is_pinned() and not self.scope.forwards.state.given and not torch.compiler.is_compiling():
            generation.steps.open(tuple(each.shape for each in generation.prepared))

    def begin(self, forward: Forward) -> None:
        """Find the routes that are known when a call of the model begins."""
        state, parent = self.scope.forwards.state, forward.parent
        for given in state.given:
            forward.known.update({name: Route(gates, given=True) for name, gates in given.items()})
        if parent is not None and parent.part.name == forward.part.name:
            forward.generation, forward.past, forward.earlier = parent.generation, parent.past, parent.earlier
            forward.encoder_unknown = parent.encoder_unknown
            forward.known.update(parent.known)
            if forward.part.role == "decoder":
                forward.known.update(
                    {name: route for name, route in parent.encoded.items() if name not in parent.known}
                )
            return
        if state.generations and state.generations[-1].owns(forward.kwargs):
            forward.generation = state.generations[-1]
        self._recall(forward)
        if state.generations and not torch.compiler.is_compiling():
            steps = state.generations[-1].steps
            if forward.generation is None or state.given:
                steps.close()
            else:  # inputs of one size get the gates of a route in the same way in every call
                gates = [id(route.gates) for route in forward.known.values()]
                steps.open((forward.inputs.rows, forward.inputs.tokens, *gates))

    def _recall(self, forward: Forward) -> None:
        """Look for the route of a generation, of a cache or of an encoder's output that a call continues."""
        generation = forward.generation
        hidden = _encoder_output(forward.kwargs)
        if hidden is None and self.scope.has_decoder and not torch.compiler.is_compiling():
            hidden = self._noted(forward)
        if hidden is not None:  # before what is held: a generation may encode one window after the other
            routes = getattr(hidden, "_tucka_routes", {}).get(self.scope.key)
            if routes is None and generation is not None:
                routes = generation.expanded(hidden)
                if routes is not None:
                    _note_on(hidden, self.scope.key, routes)
            if routes is not None:
                forward.encoded.update(routes)
                forward.known.update({name: route for name, route in routes.items() if name not in forward.known})
            forward.encoder_unknown = routes is None and self._has_role("encoder")
            return
        if generation is not None and generation.held:
            forward.known.update({name: gates for name, gates in generation.held.items() if name not in forward.known})
            return
        cache = forward.inputs.cache
        if cache is None:
            forward.past = -1 if forward.inputs.has_states else 0
            return
        forward.past = cached_length(cache)
        found = None if forward.past == 0 else routes_of(cache, self.scope.key)
        if found is not None:
            routes = {name: Route(gates) for name, gates in found.routes.items() if name not in forward.known}
            forward.known.update(routes)
            forward.earlier = found.tokens

    def _noted(self, forward: Forward) -> Tensor | None:
        """Find an output of the model's encoder by the routes that it carries, under whatever name it is passed."""
        main = forward.inputs.main
        for value in forward.kwargs.values():
            if isinstance(value, (Tensor, tuple, list, dict)):
                for tensor in _tensors_in(value):
                    routes = getattr(tensor, "_tucka_routes", None)
                    if routes and self.scope.key in routes and tensor is not main:
                        return tensor
        return None

    def go_on(self, forward: Forward) -> None:
        """Find the routes of the features that a method of the model goes on with."""
        features = forward.inputs.main
        routes = getattr(features, "_tucka_routes", {}).get(self.scope.key)
        forward.features_unknown = routes is None
        forward.known.update({name: route for name, route in (routes or {}).items() if name not in forward.known})

    def hand_on(self, forward: Forward, output: Any) -> None:
        """Let the routes of a call travel with the features that it returned."""
        if torch.compiler.is_compiling():
            return
        for features in _tensors_in(output):
            _note_on(features, self.scope.key, {**forward.known, **forward.routes})

    def _has_role(self, role: str) -> bool:
        modules = self.scope.root.modules() if self.scope.root is not None else ()
        return any(getattr(module, "tucka_role", "") == role for module in modules)

    def end(self, forward: Forward, output: Any, cache: Any) -> None:
        """Keep what later calls need of one that has ended well."""
        routes = {
            **forward.routes,
            **{name: route for name, route in forward.known.items() if name in self.scope.options},
        }
        for name, route in routes.items():
            is_news = name in forward.made or (forward.parent is None and name not in forward.noted)
            if is_news and not is_transformed(route.gates):
                self.scope.note(name, forward.part.name, route.gates)
                forward.noted.add(name)
        parent = forward.parent
        if parent is not None and parent.part.name == forward.part.name:
            self._tell(parent, forward, routes)
        if forward.part.role == "encoder":
            averaged = {name: route.averaged() for name, route in routes.items()}
            self._encoded(forward, output, averaged)
            return
        if parent is not None and parent.part.name == forward.part.name:
            return
        kept = {name: route for name, route in routes.items() if not self._by_token(name) and not route.documents}
        cache = forward.inputs.cache if cache is None else cache
        tokens = self._all_tokens(forward, routes) if cache is not None and self.scope.sees_again else {}
        generation = forward.generation
        if generation is not None:
            generation.prepared = []
            generation.last = (forward, cache, kept, tokens)
            if generation.held and not tokens:  # once more when it ends: nobody else has the cache before that
                return
            if forward.part.name == "":
                generation.held = {name: route.detached() for name, route in kept.items()}
        self._attach(forward, cache, kept, tokens)

    def end_generation(self, generation: Generation) -> None:
        """Let the cache of a generation that ends, whatever ends it, carry its routes."""
        # Calls of others inside may have run after the last of its own.
        for name, route in generation.held.items():
            self.scope.note(name, "", route.gates)
        if generation.last is not None:
            self._attach(*generation.last)

    def _attach(self, forward: Forward, cache: Any, kept: dict[str, Route], tokens: dict[str, Tensor]) -> None:
        if cache is None:
            return
        rows = forward.inputs.rows
        kept = {name: self.scope.expanded(route, forward) for name, route in kept.items()}
        kept = {name: route for name, route in kept.items() if route.rows in (None, rows)}
        if (kept or tokens) and not any(is_transformed(route.gates) for route in kept.values()):
            attach_routes(cache, self.scope.key, {name: route.gates.detach() for name, route in kept.items()}, tokens)

    def _all_tokens(self, forward: Forward, routes: dict[str, Route]) -> dict[str, Tensor]:
        """Return the gates (B, L, k, t) of a call's tokens after those of earlier calls."""
        found = {}
        for name, route in routes.items():
            if route.gates.ndim == 4:
                found[name] = after(forward.earlier.get(name), route.gates.detach(), forward.past)
        return found

    def _tell(self, parent: Forward, forward: Forward, routes: dict[str, Route]) -> None:
        """Hand the routes of the model's body on to the call around it, whose head uses them."""
        parent.noted |= forward.noted
        if forward.part.role == "encoder":
            parent.encoded.update({name: route.averaged() for name, route in routes.items()})
            return
        parent.several = parent.told and bool(forward.routes)
        if parent.several:  # it is not known which of the calls inside the next layers belong to
            parent.fits.clear()
        parent.told = parent.told or bool(forward.routes)
        parent.inputs = forward.inputs
        parent.routes.update({name: route for name, route in routes.items() if name not in parent.known})

    def _encoded(self, forward: Forward, output: Any, routes: dict[str, Route]) -> None:
        """Let the routes of an encoder travel with its output, to the decoder that is called with it."""
        hidden = output[0] if isinstance(output, (tuple, list)) else getattr(output, "last_hidden_state", output)
        if not isinstance(hidden, Tensor) or torch.compiler.is_compiling():
            return
        _note_on(hidden, self.scope.key, routes)
        generations = self.scope.forwards.state.generations
        if generations and forward.parent is None:
            generations[-1].encoded.append((hidden, routes))

    def _by_token(self, adapter: str) -> bool:
        return any(router.spec.routing == "token" for router in self.scope.routers(adapter).values())


def after(earlier: Tensor | None, gates: Tensor, past: int) -> Tensor:
    return gates if earlier is None or past < 1 else torch.cat([earlier[:, :past], gates], dim=1)


def _encoder_output(kwargs: Any) -> Tensor | None:
    outputs = kwargs.get("encoder_outputs")
    hidden = (
        outputs[0] if isinstance(outputs, (tuple, list)) and outputs else getattr(outputs, "last_hidden_state", None)
    )
    return hidden if isinstance(hidden, Tensor) else None


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    for value in values:
        yield from _tensors_in(value)


def _note_on(hidden: Tensor, key: str, routes: dict[str, Route]) -> None:
    noted = dict(getattr(hidden, "_tucka_routes", {}))
    noted[key] = routes
    hidden._tucka_routes = noted  # type: ignore[attr-defined]
