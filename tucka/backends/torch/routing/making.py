"""Making a route: the router reads the input of the first adapted layer that runs in a call."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tucka.backends.torch.private import (
    has_input_gradients,
    is_computed_again,
    is_exporting,
    is_transformed,
    outside_checkpoints,
)
from tucka.backends.torch.routing.alignment import before_labels, count_groups, first_tokens
from tucka.backends.torch.routing.forms import KNOWN_NAMES, Forms
from tucka.backends.torch.routing.forwards import regions_without_gradients
from tucka.backends.torch.routing.inputs import Inputs
from tucka.backends.torch.routing.layouts import OF_OTHER_TOKENS, OF_OTHERS, Layout, View, view_of
from tucka.backends.torch.routing.masks import fitting_mask
from tucka.backends.torch.routing.parts import is_causal, is_decoder_only
from tucka.backends.torch.routing.permitted import check_features, check_origin, checked_router, misfit, trains_before
from tucka.backends.torch.routing.ranks import gates_over_ranks, has_ranks, ranks_of
from tucka.backends.torch.routing.reentrant import Collected, Remake
from tucka.backends.torch.routing.router import Router
from tucka.backends.torch.routing.routes import Fit, Route
from tucka.backends.torch.routing.starting import FirstBatches, can_start_inside
from tucka.errors import RouteError, expected

if TYPE_CHECKING:
    from tucka.backends.torch.routing.forwards import Forward
    from tucka.backends.torch.routing.scope import RoutingScope

__all__ = ["Maker"]


class Maker:
    """Makes the routes of one scope."""

    def __init__(self, scope: RoutingScope) -> None:
        self.scope = scope
        self.warned: set[str] = set()
        self.forms = Forms()
        self.first: dict[str, dict[str, FirstBatches]] = {}  # by adapter and part, while its router waits

    def make(self, adapter: str, layer: Any, x: Tensor, forward: Forward, layout: Layout) -> Route:
        """Route on the input (..., d) of a layer, for it and all others of its part of the model."""
        if adapter in forward.remakes:
            return self._made_again(adapter, x, forward)
        router = checked_router(self.scope, adapter, layer, x, forward)
        if layout is Layout.PIECES and x.shape[1:-1] != (forward.inputs.tokens,):
            rule, got = "a route that is made of all tokens", "a layer that is called on some of them at a time"
            cure = "Take it out with exclude_modules, set chunk_size_feed_forward=0, or give or pin the route"
            raise RouteError(expected("route", rule, got, where=self.scope.path(layer), cure=cure))
        if forward.part.name is None and forward.inputs.rows is None:  # a layer called by itself in a routing scope
            forward.inputs.rows = x.shape[0]
            forward.inputs.tokens = x.shape[1] if x.ndim == 3 else None
            if forward.again is not None:
                forward.again.inputs.rows, forward.again.inputs.tokens = forward.inputs.rows, forward.inputs.tokens
        by_token, inputs = router.spec.routing == "token", forward.inputs
        check_features(self.scope, layer, forward)
        if not by_token:
            check_origin(self.scope, layer, forward)
            unknown = [name for name in inputs.others if name not in KNOWN_NAMES]
            if unknown:
                self.forms.apply(inputs, unknown, type(layer if forward.module is None else forward.module).__name__)
        view = view_of(x, inputs, layout)
        if view is None and router.spec.routing != "batch":
            raise misfit(self.scope, layer, x, Route(x.new_zeros(forward.inputs.rows or 0, 1, 1)), forward)
        rows = x if view is None else Fit(x, view).rows(x)
        regions = [] if torch.is_grad_enabled() else regions_without_gradients()
        # The first run of a checkpoint; not an evaluation in the mode of training, which no backward follows.
        is_first = bool(regions) and (forward.grad or any(map(has_input_gradients, regions)))
        trains = layer.training and (torch.is_grad_enabled() or is_first)
        is_news = not is_computed_again()  # of a whole call in a checkpoint, whose first run was the forward
        with outside_checkpoints():
            mask, is_known = self._mask(adapter, layer, rows, forward, by_token=by_token)
            documents = self._documents(router, layer, rows, forward, mask)
            if is_news:
                self._start(adapter, layer.tucka_part, router, rows, mask, documents, trains=trains)
            make = _Making(router, mask, documents, *self._ranks(adapter, router, trains=trains))
            gates = make(rows)
            if is_news and not is_transformed(gates) and not is_exporting():
                self._count(adapter, layer.tucka_part, count_groups(gates, mask))
        # The average of a continuing text would tell each token of later ones, and change with the cache.
        is_text = (
            by_token and self.scope.root is not None and is_decoder_only(self.scope.root) and not forward.part.name
        )
        route = Route(
            gates,
            mask,
            documents=documents is not None,
            ordered=layout not in OF_OTHER_TOKENS,
            averages=is_known and not is_text,
            cut=is_first and not forward.grad,
        )
        if is_first and forward.grad:
            is_needed = trains_before(self.scope) or any(map(has_input_gradients, regions))
            collected = Collected(self.scope.path(layer), is_needed=is_needed)
            remake = Remake(replace(route, collected=collected), _Again(make, view, gates), weakref.WeakSet(regions))
            route = self._leaf(adapter, forward, remake)
        else:
            forward.set_route(adapter, route)
        if is_news and adapter in self.scope.observers:
            self.scope.observers[adapter](router, *_as_samples(router, rows, mask, documents, gates))
        return route

    def _leaf(self, adapter: str, forward: Forward, remake: Remake) -> Route:
        """Note a route that a reentrant checkpoint has made without gradients, and how it is made again with them."""
        route = remake.route
        gates = route.collected.copy_of(route.gates, forward.backward)  # type: ignore[union-attr]
        route = replace(route, gates=gates)
        forward.set_route(adapter, route)
        forward.replay().remakes[adapter] = remake
        return route

    def _made_again(self, adapter: str, x: Tensor, forward: Forward) -> Route:
        """Make a route once more, in the recomputation of the reentrant checkpoint that has made it."""
        remake = forward.remakes.pop(adapter)
        if not torch.is_grad_enabled():  # in a checkpoint inside of that one, which is itself computed again later
            regions = weakref.WeakSet(regions_without_gradients())
            return self._leaf(adapter, forward, replace(remake, regions=regions))
        with outside_checkpoints():
            gates = remake.gates(x)
        remake.route.collected.hand_on(gates, forward.backward)  # type: ignore[union-attr]
        route = replace(remake.route, gates=gates)
        forward.set_route(adapter, route)
        return route

    def _start(
        self,
        adapter: str,
        part: str,
        router: Router,
        rows: Tensor,
        mask: Tensor | None,
        documents: Tensor | None,
        *,
        trains: bool,
    ) -> None:
        """Let a router that no data has started look at an input (B, ..., d)."""
        may_start = trains and router.waits and router.centroids.requires_grad
        router.may_change = may_start and self._still_waits(adapter, part, router, rows, mask, documents)
        if not router.may_change and adapter in self.first:  # started, by these batches or by somebody else
            self.first[adapter].pop(part, None)

    def _ranks(self, adapter: str, router: Router, *, trains: bool) -> tuple[bool, Any]:
        """Say whether an input is routed with those of other ranks, and which."""
        common = trains and router.spec.routing == "batch" and self.scope.options[adapter].synchronized
        group = ranks_of(self.scope.group) if common else None
        return common and has_ranks(group), group

    def _still_waits(
        self, adapter: str, part: str, router: Router, rows: Tensor, mask: Tensor | None, documents: Tensor | None
    ) -> bool:
        """Start a router that no data has started from its first batches in training, or say that it is not started."""
        if is_transformed(rows):
            return False
        group = ranks_of(self.scope.group)
        if torch.compiler.is_compiling() or not can_start_inside(router, self.scope.root, group):
            self._warn_of_no_start(adapter)
            return False
        first = self.first.setdefault(adapter, {}).setdefault(part, FirstBatches())
        rows, mask, _ = _as_samples(router, rows.detach(), mask, documents, None)
        return not first.start(router, rows, mask, group)

    def _warn_of_no_start(self, adapter: str) -> None:
        key = f"start of {adapter}"
        is_new = torch.compiler.is_compiling() or key not in self.warned  # a set that changes would compile anew
        if not torch.compiler.is_compiling():
            self.warned.add(key)
        rule = f"a start from data before the model is compiled, or prepared for several devices (adapter {adapter!r})"
        cure = "Call tucka.peft.initialize_router(model, batches) before that; now it trains from random directions"
        if is_new:
            _warn(expected("router", rule, "none", cure=cure))

    def _mask(
        self, adapter: str, layer: Any, rows: Tensor, forward: Forward, *, by_token: bool
    ) -> tuple[Tensor | None, bool]:
        """Say which tokens of an input (B, S, d) count, and whether that is known."""
        inputs: Inputs = forward.inputs
        generation = forward.generation
        widened = isinstance(inputs.mask, Mapping) or getattr(inputs.mask, "ndim", 0) > 2
        if generation is not None and widened:  # for the layers of this generation, from the mask that it was given
            inputs.mask = generation.mask_for(rows, inputs.mask)
        model = forward.module if forward.module is not None else layer
        if layer.tucka_layout in OF_OTHERS.values() and inputs.mask_of_others is not None:
            inputs = replace(inputs, mask=inputs.mask_of_others)
        try:
            mask = fitting_mask(inputs, model, rows, past=forward.past != 0)
        except RouteError:
            if not by_token:  # no average is taken there
                raise
            return None, False
        if by_token:
            return mask, True
        prompt = None if generation is None or layer.tucka_role or rows.ndim != 3 else generation.prompt_tokens
        if prompt is not None and rows.shape[1] > prompt:  # candidates of assisted decoding follow the prompt
            mask = first_tokens(mask, rows.shape[0], rows.shape[1], prompt, rows.device)
        if self.scope.options[adapter].prompt_only:
            mask = self._before_labels(adapter, layer, rows, forward, mask)
        return mask, True

    def _before_labels(
        self, adapter: str, layer: Any, rows: Tensor, forward: Forward, mask: Tensor | None
    ) -> Tensor | None:
        labels = forward.given("labels") if self.scope.root is not None and is_causal(self.scope.root) else None
        if isinstance(labels, Tensor) and tuple(labels.shape) == tuple(rows.shape[:-1]):
            return before_labels(mask, labels)
        if labels is None and layer.training and (torch.is_grad_enabled() or forward.grad):
            self._warn_of_missing_labels(adapter)
        return mask

    def _warn_of_missing_labels(self, adapter: str) -> None:
        """Say once that a causal model in training is routed on all of its tokens, though its prompt was asked for."""
        if adapter in self.warned or self.scope.root is None or not is_causal(self.scope.root):
            return
        self.warned.add(adapter)
        rule = (
            f"labels in training with route_tokens='prompt' (adapter {adapter!r}), since they tell prompt from answer"
        )
        cure = "All tokens count now. Pass labels to the model (the Trainer's label smoothing takes them away)"
        warnings.warn(expected("labels", rule, None, cure=cure), stacklevel=2)

    def _documents(
        self, router: Router, layer: Any, rows: Tensor, forward: Forward, mask: Tensor | None
    ) -> Tensor | None:
        """Number the documents that share rows of an input (B, S, d), where a caller has told of any."""
        inputs: Inputs = forward.inputs
        if router.spec.routing == "token" or not inputs.is_packed() or forward.generation is not None or rows.ndim != 3:
            return None
        if router.spec.routing == "batch" and torch.compiler.is_compiling() and not inputs.are_images:
            return None
        documents = inputs.documents(rows.shape[0], rows.shape[1])
        if documents is None or inputs.are_images or torch.compiler.is_compiling():
            return documents
        kept = torch.ones_like(documents, dtype=torch.bool) if mask is None else mask != 0
        first = documents.masked_fill(~kept, documents.shape[1]).amin(dim=1)
        last = documents.masked_fill(~kept, -1).amax(dim=1)
        # Positions that the caller gives are read, once a forward: most of them tell of one document in each row.
        if not bool((first < last).any()):
            return None
        if router.spec.routing == "batch":
            rule, got = (
                "one document in each row for batch routing",
                "several (position_ids that restart, or cu_seq_lens)",
            )
            cure = "Use routing='sample', which gives each document its own route, or routing='token'"
            raise RouteError(expected("route", rule, got, where=self.scope.path(layer), cure=cure))
        return documents

    def _count(self, adapter: str, part: str, counts: Tensor) -> None:
        """Add to an adapter's counts, on the device where they are made, without waiting for it."""
        loads = self.scope.load[adapter]
        load = loads[part]
        if load.device != counts.device:  # the model has moved
            with torch.inference_mode(False):
                load = loads[part] = load.to(counts.device, non_blocking=counts.is_cuda)
        # In place: what a compiled or captured forward starts from is then the same tensor each time.
        load.add_(counts)


@dataclass(frozen=True)
class _Making:
    """How one route is made from an input (B, ..., d), also when it is made once more."""

    router: Router
    mask: Tensor | None
    documents: Tensor | None
    over_ranks: bool
    group: Any

    def __call__(self, rows: Tensor, like: Tensor | None = None) -> Tensor:
        """Call the router; the groups are chosen anew unless gates are given whose groups are kept."""
        if self.documents is not None:
            return self.router.of_documents(rows, self.mask, self.documents, like)
        if self.over_ranks:
            return gates_over_ranks(self.router, rows, self.mask, self.group, like)
        gates: Tensor = self.router(rows, self.mask, like)
        return gates


class _Again:
    """The gates of an earlier forward, with the graph of a recomputation."""

    def __init__(self, make: _Making, view: View | None, gates: Tensor) -> None:
        self.make, self.view, self.gates = make, view, gates
        self.waited = make.router.waits

    def __call__(self, x: Tensor) -> Tensor:
        """Make them from the same layer's input."""
        if self.waited and not self.make.router.waits:
            rule, got = "a router that is as it was in the forward", "one that data has started before the backward"
            cure = "Call tucka.peft.initialize_router(model, batches) before training"
            raise RouteError(expected("router", rule, got, where="reentrant gradient checkpointing", cure=cure))
        rows = x if self.view is None else Fit(x, self.view).rows(x)
        gates = self.make(rows, self.gates)
        return self.gates + (gates - gates.detach())  # the very numbers of the forward, whatever rounding says now


def _as_samples(
    router: Router, rows: Tensor, mask: Tensor | None, documents: Tensor | None, gates: Tensor | None
) -> tuple[Tensor, Tensor | None, Any]:
    """Return rows (B, ..., d), mask and gates; documents that share rows as samples of one token, their mean."""
    if documents is None:
        return rows, mask, gates
    means, lengths, places = router.means_of_documents(rows, mask, documents)
    if gates is not None and gates.ndim > 2:  # by token, alike in each document
        by_place = gates.new_zeros(len(means), *gates.shape[-2:]).index_copy(0, places, gates.flatten(0, 1))
        gates = by_place[lengths > 0]
    return means[lengths > 0][:, None], None, gates


def _warn_now(message: str) -> None:
    warnings.warn(message, stacklevel=2)


# Run once where a compiler reads the call.
_warn: Callable[[str], None] = torch.compiler.assume_constant_result(_warn_now)
