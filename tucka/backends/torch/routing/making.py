"""Making a route: the router reads the input of the first adapted layer that runs in a call."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tucka.backends.torch.private import is_exporting, is_transformed, outside_checkpoints
from tucka.backends.torch.routing.alignment import before_labels, count_groups, first_tokens
from tucka.backends.torch.routing.caches import check_empty
from tucka.backends.torch.routing.forms import KNOWN_NAMES, Forms
from tucka.backends.torch.routing.inputs import Inputs
from tucka.backends.torch.routing.layouts import OF_OTHER_TOKENS, OF_OTHERS, Layout, view_of
from tucka.backends.torch.routing.masks import fitting_mask
from tucka.backends.torch.routing.parts import is_causal, is_decoder_only
from tucka.backends.torch.routing.ranks import gates_over_ranks, has_ranks, ranks_of
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
        router = self._checked_router(adapter, layer, x, forward)
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
        self._check_features(layer, forward)
        if not by_token:
            self._check_origin(layer, forward)
            unknown = [name for name in inputs.others if name not in KNOWN_NAMES]
            if unknown:
                self.forms.apply(inputs, unknown, type(layer if forward.module is None else forward.module).__name__)
        view = view_of(x, inputs, layout)
        if view is None and router.spec.routing != "batch":
            raise self.scope._misfit(layer, x, Route(x.new_zeros(forward.inputs.rows or 0, 1, 1)), forward)
        rows = x if view is None else Fit(x, view).rows(x)
        with outside_checkpoints():
            mask, is_known = self._mask(adapter, layer, rows, forward, by_token=by_token)
            documents = self._documents(router, layer, rows, forward, mask)
            gates = self._gates(adapter, layer, router, rows, mask, documents)
            if not is_transformed(gates) and not is_exporting():
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
        )
        forward.set_route(adapter, route)
        if adapter in self.scope.observers:
            self.scope.observers[adapter](router, rows, mask, gates)
        return route

    def _gates(
        self, adapter: str, layer: Any, router: Router, rows: Tensor, mask: Tensor | None, documents: Tensor | None
    ) -> Tensor:
        """Call the router on an input (B, ..., d)."""
        trains = layer.training and torch.is_grad_enabled()
        may_start = trains and router.waits and router.centroids.requires_grad
        router.may_change = may_start and self._still_waits(adapter, layer.tucka_part, router, rows, mask)
        if not router.may_change and adapter in self.first:  # started, by these batches or by somebody else
            self.first[adapter].pop(layer.tucka_part, None)
        if documents is not None:
            return router.of_documents(rows, mask, documents)
        common = trains and router.spec.routing == "batch" and self.scope.options[adapter].synchronized
        group = ranks_of(self.scope.group) if common else None
        if common and has_ranks(group):
            return gates_over_ranks(router, rows, mask, group)
        gates: Tensor = router(rows, mask)
        return gates

    def _still_waits(self, adapter: str, part: str, router: Router, rows: Tensor, mask: Tensor | None) -> bool:
        """Start a router that no data has started from its first batches in training, or say that it is not started."""
        if is_transformed(rows):
            return False
        group = ranks_of(self.scope.group)
        if torch.compiler.is_compiling() or not can_start_inside(router, self.scope.root, group):
            self._warn_of_no_start(adapter)
            return False
        first = self.first.setdefault(adapter, {}).setdefault(part, FirstBatches())
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
        if labels is None and layer.training and torch.is_grad_enabled():
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

    def _check_features(self, layer: Any, forward: Forward) -> None:
        """Raise where a method goes on with features of which it is not known who has made them."""
        if forward.features_unknown:
            rule, got = "features that this model's own forward_features has returned", "others, or changed ones"
            cure = "Call the whole model, or give the route (given_route)"
            raise RouteError(expected("route", rule, got, where=self.scope.path(layer), cure=cure))

    def _check_origin(self, layer: Any, forward: Forward) -> None:
        """Raise where a call goes on from earlier ones whose route is not known."""
        cure = "Let the adapted model fill the cache itself, use routing='token', or give the route (given_route)"
        if forward.encoder_unknown and layer.tucka_role == "decoder":
            rule, got = "encoder_outputs that this model's encoder has made", "others, whose route is not known"
            raise RouteError(expected("route", rule, got, where=self.scope.path(layer), cure=cure))
        if forward.past != 0:
            got = "a filled cache that carries no route, or whose rows have been changed"
            message = expected("route", "the route of the cache's prompt", got, where=self.scope.path(layer), cure=cure)
            if not check_empty(forward.inputs.cache, message):
                raise RouteError(message)
        prompt = None if forward.generation is None else forward.generation.prompt_tokens
        tokens = forward.inputs.tokens
        if prompt is not None and tokens is not None and tokens < prompt and not layer.tucka_role:
            rule, got = f"the whole prompt of {prompt} tokens in one call", f"{tokens} of them (prefill_chunk_size)"
            cure = "Generate without prefill_chunk_size, use routing='token', or give the route (given_route)"
            raise RouteError(expected("route", rule, got, where=self.scope.path(layer), cure=cure))

    def _checked_router(self, adapter: str, layer: Any, x: Tensor, forward: Forward) -> Router:
        """Return the router of an adapter if this layer may make the route."""
        scope, where = self.scope, self.scope.path
        router = scope.router(adapter, layer.tucka_part)
        if router is None:
            rule, cure = (
                f"a route for adapter {adapter!r}, which has no router",
                "Call it in `with given_route(model, ...):`",
            )
            raise RouteError(expected("route", rule, "none", where=where(layer), cure=cure))
        owner = scope.owners[adapter][layer.tucka_part]
        if not torch.compiler.is_compiling() and scope.has_lost(owner):
            rule, got = "the layer with the router to be in the model", "a part of the model without it"
            cure = "Pin or give the route in the stages of a pipeline, or let one stage have all adapted layers"
            raise RouteError(expected("route", rule, got, where=where(layer), cure=cure))
        if scope.options[adapter].owner_only and owner is not layer:
            rule, got = f"the layer of router_module, {where(owner)}, to run first", "an earlier one"
            cure = "Name a layer that runs before all other adapted ones, or leave router_module out"
            raise RouteError(expected("route", rule, got, where=where(layer), cure=cure))
        if x.ndim < 2:
            rule, cure = "an input with axes (B, ..., d)", "Add a batch axis with x[None]"
            raise RouteError(expected("route", rule, f"shape {tuple(x.shape)}", where=where(layer), cure=cure))
        if x.shape[-1] != router.in_features:
            cure = "Name the layer that runs first in router_module, or take this one out with exclude_modules"
            rule = f"the first adapted layer that runs to be {router.in_features} wide, as the router"
            raise RouteError(expected("route", rule, f"input {tuple(x.shape)}", where=where(layer), cure=cure))
        if forward.grad and not torch.is_grad_enabled() and self._trains_below():
            cure = "Use gradient_checkpointing_kwargs={'use_reentrant': False}, or pin or give the route"
            rule, got = "gradients where the route is made", "none, as in reentrant gradient checkpointing"
            raise RouteError(expected("route", rule, got, where=where(layer), cure=cure))
        return router

    def _trains_below(self) -> bool:
        """Tell whether anything trains that the route depends on: all but the experts may run before the router."""
        root = self.scope.root
        parameters = root.named_parameters() if root is not None else ()
        return any(value.requires_grad and ".tucka_experts." not in f".{name}" for name, value in parameters)


def _warn_now(message: str) -> None:
    warnings.warn(message, stacklevel=2)


# Run once where a compiler reads the call.
_warn: Callable[[str], None] = torch.compiler.assume_constant_result(_warn_now)
