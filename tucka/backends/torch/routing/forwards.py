"""Which call of the model runs: one record for each, opened and closed by the call itself."""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.private import (
    checkpoint_frame,
    outer_checkpoint_frames,
    reentrant_checkpoints,
    running_backward,
)
from tucka.backends.torch.routing.generation import Generation
from tucka.backends.torch.routing.inputs import Inputs, read_inputs
from tucka.backends.torch.routing.parts import Part
from tucka.backends.torch.routing.reentrant import Remake
from tucka.backends.torch.routing.routes import Fit, Route
from tucka.backends.torch.together import Group, Shared

__all__ = ["Forward", "Forwards", "regions_without_gradients"]


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
        self.remakes: dict[str, Remake] = {}  # by adapter: routes that reentrant checkpoints make once more
        self.backward: int | None = None  # the whole backward in which such a checkpoint is computed again
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
            self.again = copy = self._copy(replace(self.inputs, main=None, others={}, labels=None, cache=None))
            for name in ("routes", "known"):
                getattr(copy, name).update(
                    {key: value.detached(leaf=True) for key, value in getattr(self, name).items()}
                )
        return self.again

    def _copy(self, inputs: Inputs) -> Forward:
        copy = Forward(self.part, None, (), {}, None)
        copy.inputs = inputs
        copy.past, copy.encoder_unknown, copy.grad = self.past, self.encoder_unknown, self.grad
        copy.features_unknown, copy.generation, copy.backward = self.features_unknown, self.generation, self.backward
        return copy

    def replay_reentrant(self, where: str) -> Forward:
        """Return the copy for recomputations with a backward of their own, from which gradients have to come back."""
        again = self.replay()
        for name in ("routes", "known"):
            copies = getattr(again, name)
            for adapter, route in getattr(self, name).items():
                if adapter in copies and not copies[adapter].collects():
                    copies[adapter] = route.collecting(where).detached(leaf=True)
        return again

    def computed_again(self, region: Any) -> Forward:
        """Return a copy for one recomputation of a reentrant checkpoint, with copies of the gates."""
        copy = self._copy(self.inputs)
        copy.backward = running_backward() if self.backward is None else self.backward
        copy.remakes = {name: remake for name, remake in self.remakes.items() if region in remake.regions}
        for name in ("routes", "known"):
            getattr(copy, name).update(
                {
                    adapter: route.copied(copy.backward)
                    for adapter, route in getattr(self, name).items()
                    if adapter not in copy.remakes
                }
            )
        return copy


class _State(threading.local):
    """What runs in one thread, so that threads may share a model."""

    def __init__(self) -> None:
        self.open: list[Forward] = []
        self.generations: list[Generation] = []
        self.given: list[dict[str, Tensor]] = []
        self.shared: Shared | None = None  # what the layers of the innermost call have in common


class Forwards:
    """The calls of one model that run now, in each thread, and those that a backward may compute again."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.state = _State()
        self.groups: dict[tuple[str, str, str], Group] = {}  # layers that share cores: by adapter, part and role
        self._by_frame: weakref.WeakKeyDictionary[Any, dict[str, Forward]] = weakref.WeakKeyDictionary()
        # By reentrant checkpoint and part: the backward that computes it again now, and what its layers then use.
        self._now: weakref.WeakKeyDictionary[Any, dict[str, tuple[int, Forward]]] = weakref.WeakKeyDictionary()
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
        if running_backward() != -1:
            found = self._computed_again(part) or found
        if not torch.is_grad_enabled():
            return found if found is None or not found.grad else self._without_gradients(part, found)
        frame, again = checkpoint_frame()
        if frame is None:
            return found
        if found is not None and found.frame is frame:  # the whole call is inside of the checkpoint
            return found
        known = self._by_frame.get(frame, {}).get(part)
        if again or known is not None:
            return known if again or found is None else found
        return self._in_region(frame, part, found)

    def _computed_again(self, part: str) -> Forward | None:
        """Return what the layers of a reentrant checkpoint use that is computed again now."""
        region = next((region for region, again in reentrant_checkpoints() if again), None)
        known = None if region is None else self._by_frame.get(region, {}).get(part)
        if known is None:
            return None
        now = self._now.setdefault(region, {})
        if part not in now or now[part][0] != running_backward():
            now[part] = running_backward(), known.computed_again(region)
        return now[part][1]

    def _without_gradients(self, part: str, found: Forward) -> Forward:
        """Note which call the layers of a reentrant checkpoint, and of those around it, belong to."""
        for region in regions_without_gradients():
            self._by_frame.setdefault(region, {})[part] = found.replay_reentrant(part or "model")
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
        regions = reentrant_checkpoints()
        if regions:
            return regions
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


def regions_without_gradients() -> list[Any]:
    """List the reentrant checkpoints around this call, from inner to outer, up to one that is computed again."""
    if torch.compiler.is_compiling():
        return []
    around = itertools.takewhile(lambda region: not region[1], reentrant_checkpoints())
    return [region for region, _ in around]
