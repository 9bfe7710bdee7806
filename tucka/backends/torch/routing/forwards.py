"""Which call of the model runs: one record for each, opened and closed by the call itself."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.private import checkpoint_frame, outer_checkpoint_frames, reentrant_checkpoint
from tucka.backends.torch.routing.generation import Generation
from tucka.backends.torch.routing.inputs import Inputs, caches_in, read_inputs
from tucka.backends.torch.routing.parts import Part
from tucka.backends.torch.routing.routes import Fit, Route

__all__ = ["Call", "Forward", "Forwards", "Parent"]


class Forward:
    """One call of the model or of a part of it: what it was given, and the routes of its layers."""

    def __init__(
        self,
        part: Part,
        module: nn.Module | None,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        parent: Forward | None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.part = part
        self.names = names  # what some of the arguments are, as a caller has said
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.parent = parent
        self.grad = torch.is_grad_enabled()
        self.frame: Any = None  # the checkpointed region that this call runs in
        self.generation: Generation | None = None  # whose own call this is
        self.past = 0  # tokens in the cache that the call continues; -1 if there are some
        self.earlier: dict[str, Tensor] = {}  # the gates of tokens that earlier calls have cached
        self.encoder_unknown = False  # whether the outputs of an encoder were given whose route is not known
        self.features_unknown = False  # the same of features that a method goes on with
        self.routes: dict[str, Route] = {}
        self.known: dict[str, Route] = {}  # the routes that were known when the call began
        self.encoded: dict[str, Route] = {}  # those that an encoder inside has made
        self.fits: dict[Any, Fit] = {}  # by adapter and shape of the input
        self.made: set[str] = set()  # the adapters whose route was made in this very call
        self.noted: set[str] = set()  # those whose latest route has been noted, here or in a call inside
        self.told = False  # whether a call of the model's body inside has ended
        self.several = False  # whether more than one has
        self.of_samples: tuple[Any, ...] = ()  # the tensors that the parent of a layer was called with
        self.again: Forward | None = None  # the copy that recomputations use
        self._inputs: Inputs | None = None

    @property
    def inputs(self) -> Inputs:
        """What the call was given; after a call of the model's body inside, what that was given."""
        if self._inputs is None:
            module = self.module
            self._inputs = Inputs() if module is None else read_inputs(module, self.args, self.kwargs, self.names)
        return self._inputs

    @inputs.setter
    def inputs(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def given(self, name: str) -> Any:
        """Return an argument of this call, or of one around it."""
        module = self.module
        value = self.inputs if module is None else read_inputs(module, self.args, self.kwargs, self.names)
        found = getattr(value, name)
        return found if found is not None or self.parent is None else self.parent.given(name)

    def generating(self) -> Generation | None:
        """Return the generation that this call, or one around it, belongs to."""
        return self.generation if self.generation is not None or self.parent is None else self.parent.generating()

    def set_route(self, adapter: str, route: Route) -> None:
        """Note a route that was made in this call, for its recomputation too."""
        self.routes[adapter] = route
        self.made.add(adapter)
        if self.again is not None:
            self.again.routes[adapter] = route.detached(leaf=True)

    def replay(self) -> Forward:
        """Return a copy for recomputations: it holds no graph, which would hold what holds the copy."""
        if self.again is None:
            self.again = copy = Forward(self.part, None, (), {}, None)
            copy.inputs = replace(self.inputs, main=None, others={}, labels=None, cache=None)
            copy.past, copy.encoder_unknown, copy.grad = self.past, self.encoder_unknown, self.grad
            copy.features_unknown = self.features_unknown
            copy.generation = self.generation
            for name in ("routes", "known"):
                getattr(copy, name).update(
                    {key: value.detached(leaf=True) for key, value in getattr(self, name).items()}
                )
        return self.again


class _State(threading.local):
    """What runs in one thread, so that threads may share a model."""

    def __init__(self) -> None:
        self.open: list[Forward] = []
        self.generations: list[Generation] = []
        self.given: list[dict[str, Tensor]] = []


class Forwards:
    """The calls of one model that run now, in each thread, and those that a backward may compute again."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.state = _State()
        self._by_frame: weakref.WeakKeyDictionary[Any, dict[str, Forward]] = weakref.WeakKeyDictionary()
        self._given_by_frame: weakref.WeakKeyDictionary[Any, dict[str, Tensor]] = weakref.WeakKeyDictionary()
        self._has_given_regions = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave running calls behind: they hold graphs, which cannot be copied."""
        return {}

    def __setstate__(self, _state: dict[str, Any]) -> None:
        self._forget()

    def innermost(self, part: str) -> Forward | None:
        """Return the call that a layer of a part which runs now belongs to."""
        stack = self.state.open
        found = stack[-1] if stack else None
        if found is not None and found.part.name not in (part, None):
            found = next((forward for forward in reversed(stack) if forward.part.name in (part, None)), None)
        if torch.compiler.is_compiling():
            return found
        if not torch.is_grad_enabled():
            return found if found is None or not found.grad else self._without_gradients(part, found)
        frame, again = checkpoint_frame()
        if frame is None:
            return self._in_reentrant(part) if found is None else found
        if found is not None and found.frame is frame:  # the whole call is inside of the checkpoint
            return found
        known = self._by_frame.get(frame, {}).get(part)
        if again or known is not None:
            return known if again or found is None else found
        return self._in_region(frame, part, found)

    def _in_reentrant(self, part: str) -> Forward | None:
        region = reentrant_checkpoint()
        return None if region is None else self._by_frame.get(region, {}).get(part)

    def _without_gradients(self, part: str, found: Forward) -> Forward:
        """Note which call the layers of a reentrant checkpoint belong to."""
        region = reentrant_checkpoint()
        if region is not None:
            self._by_frame.setdefault(region, {})[part] = found.replay()
        return found

    def _in_region(self, frame: Any, part: str, found: Forward | None) -> Forward | None:
        """Note which call the layers of a checkpointed region, and of those around it, belong to."""
        outer = outer_checkpoint_frames()
        if found is None:  # a region around this one is computed again
            again = next((self._by_frame.get(around) for around, is_again in outer if is_again), None) or {}
            found = again.get(part)
        if found is not None:
            for around in (frame, *(around for around, _ in outer)):
                if found.frame is not around:
                    self._by_frame.setdefault(around, {})[part] = found.replay()
        return found

    def given(self, adapter: str) -> Tensor | None:
        """Return a caller's gates for an adapter of which no calls are recorded; in a recomputation, those of then."""
        stack = self.state.given
        known = next((gates[adapter] for gates in reversed(stack) if adapter in gates), None) if stack else None
        if (known is None and not self._has_given_regions) or torch.compiler.is_compiling():
            return known
        regions = self._regions()
        for frame, again in regions:
            if again:
                known = self._given_by_frame.get(frame, {}).get(adapter)
        if known is not None and regions:
            self._has_given_regions = True
            for frame, _ in regions:
                self._given_by_frame.setdefault(frame, {})[adapter] = known
        return known

    def has_given(self) -> bool:
        """Tell whether a caller's route may be in use here, or in a recomputation."""
        return self._has_given_regions or bool(self.state.given)

    @staticmethod
    def _regions() -> list[tuple[Any, bool]]:
        """List the checkpointed regions around this call, and whether each is computed again."""
        region = reentrant_checkpoint()
        if region is not None:
            return [(region, torch.is_grad_enabled())]
        frame, again = checkpoint_frame() if torch.is_grad_enabled() else (None, False)
        return [] if frame is None else [(frame, again), *outer_checkpoint_frames()]

    @contextlib.contextmanager
    def opened(self, forward: Forward) -> Iterator[Forward]:
        """Keep a record of a call while it runs, whatever ends it."""
        stack = self.state.open
        stack.append(forward)
        try:
            yield forward
        finally:
            del stack[stack.index(forward) :]


class Call:
    """The ``forward`` of a module that begins a call: its class's own, with a record of it while it runs."""

    def __init__(self, scope: Any, module: nn.Module, part: Part) -> None:
        self.scope = scope
        self.module = module
        self.part = part
        # Another library's, put there before.
        self.inner = vars(module).get("forward")

    @property
    def __wrapped__(self) -> Any:
        """What is called, for `inspect.signature`."""
        return type(self.module).forward.__get__(self.module) if self.inner is None else self.inner

    @property
    def __code__(self) -> Any:
        """The code of what is called, for `torch.export`."""
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, with the arguments of that."""
        return self.run(self.__wrapped__, args, kwargs)

    def run(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], method: Any = None) -> Any:
        """Run the forward, or another method of the module, with a record of it."""
        forwards: Forwards = self.scope.forwards
        stack = forwards.state.open
        parent = stack[-1] if stack else None
        if any(running.module is self.module for running in stack):  # for somebody else, from inside of itself
            parent = None
        generations = forwards.state.generations
        steps = generations[-1].steps if generations else None
        around = None if steps is None else steps.now
        forward = Forward(self.part, self.module, args, kwargs, parent, self.scope.names)
        if forward.grad and not torch.compiler.is_compiling():
            forward.frame = checkpoint_frame()[0]
        self.scope.memory.begin(forward)
        if method is not None and method.goes_on:
            self.scope.memory.go_on(forward)
        stack.append(forward)
        try:
            output = function(*args, **kwargs)
            self.scope.memory.end(forward, output, next(caches_in(_parts_of(output)), None))
            if method is not None and not method.goes_on:
                self.scope.memory.hand_on(forward, output)
        finally:  # whatever ends the call
            del stack[stack.index(forward) :]
            if steps is not None and not torch.compiler.is_compiling():
                steps.now = around
        return output

    @classmethod
    def put_on(cls, module: nn.Module, scope: Any, part: Part) -> None:
        """Let calls of a module be recorded."""
        vars(module)["forward"] = cls(scope, module, part)

    @classmethod
    def take_off(cls, module: nn.Module, scope: Any) -> None:
        """Put back what was there before."""
        call = vars(module).get("forward")
        if isinstance(call, cls) and call.scope is scope:
            del vars(module)["forward"]
            if call.inner is not None:
                vars(module)["forward"] = call.inner


def _parts_of(output: Any) -> Any:
    return output if isinstance(output, (dict, tuple, list)) else ()


class Parent:
    """Notes what the parent of a layer was called with, where the layer gets tokens and tables of positions."""

    @staticmethod
    def put_on(module: nn.Module, scope: Any) -> None:
        """Note the tensors of each call of a module."""
        notes = vars(module).setdefault("_tucka_notes", {})
        if scope.key not in notes:
            notes[scope.key] = module.register_forward_pre_hook(_Note(scope), with_kwargs=True)

    @staticmethod
    def take_off(module: nn.Module, scope: Any) -> None:
        """Stop noting."""
        handle = vars(module).get("_tucka_notes", {}).pop(scope.key, None)
        if handle is not None:
            handle.remove()


class _Note:
    """A hook that tells the running call which tensors belong to its samples."""

    def __init__(self, scope: Any) -> None:
        self.scope = scope

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        forward = self.scope.forwards.innermost(self.scope.part_around(_module))
        if forward is not None:
            named = (*args[:1], kwargs.get("hidden_states"), kwargs.get("query_states"))
            forward.of_samples = tuple(value for value in named if isinstance(value, Tensor))
