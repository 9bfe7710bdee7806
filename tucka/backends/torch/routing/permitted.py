"""Whether a layer may make or use a route, and the error if not: what a route belongs to is known or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tucka.backends.torch.routing.caches import check_empty
from tucka.backends.torch.routing.forwards import regions_without_gradients
from tucka.backends.torch.routing.router import Router
from tucka.errors import RouteError, expected

if TYPE_CHECKING:
    from tucka.backends.torch.routing.forwards import Forward
    from tucka.backends.torch.routing.routes import Route
    from tucka.backends.torch.routing.scope import RoutingScope

__all__ = ["check_features", "check_graph", "check_origin", "checked_router", "misfit", "trains_before"]


def check_features(scope: RoutingScope, layer: Any, forward: Forward) -> None:
    """Raise where a method goes on with features of which it is not known who has made them."""
    if forward.features_unknown:
        rule, got = "features that this model's own forward_features has returned", "others, or changed ones"
        cure = "Call the whole model, or give the route (given_route)"
        raise RouteError(expected("route", rule, got, where=scope.path(layer), cure=cure))


def check_origin(scope: RoutingScope, layer: Any, forward: Forward) -> None:
    """Raise where a call goes on from earlier ones whose route is not known."""
    cure = "Let the adapted model fill the cache itself, use routing='token', or give the route (given_route)"
    if forward.encoder_unknown and layer.tucka_role == "decoder":
        rule, got = "encoder_outputs that this model's encoder has made", "others, whose route is not known"
        raise RouteError(expected("route", rule, got, where=scope.path(layer), cure=cure))
    if forward.past != 0:
        got = "a filled cache that carries no route, or whose rows have been changed"
        message = expected("route", "the route of the cache's prompt", got, where=scope.path(layer), cure=cure)
        if not check_empty(forward.inputs.cache, message):
            raise RouteError(message)
    prompt = None if forward.generation is None else forward.generation.prompt_tokens
    tokens = forward.inputs.tokens
    if prompt is not None and tokens is not None and tokens < prompt and not layer.tucka_role:
        rule, got = f"the whole prompt of {prompt} tokens in one call", f"{tokens} of them (prefill_chunk_size)"
        cure = "Generate without prefill_chunk_size, use routing='token', or give the route (given_route)"
        raise RouteError(expected("route", rule, got, where=scope.path(layer), cure=cure))


def checked_router(scope: RoutingScope, adapter: str, layer: Any, x: Tensor, forward: Forward) -> Router:
    """Return the router of an adapter if this layer may make the route."""
    where = scope.path
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
    if forward.grad and not torch.is_grad_enabled() and not regions_without_gradients():
        check_graph(scope, layer)
    return router


def check_graph(scope: RoutingScope, layer: Any) -> None:
    """Raise where a route has no graph, though anything that trains may have made it."""
    if trains_before(scope):
        rule = "gradients where the route is made"
        got = "none (torch.no_grad, a checkpoint around a whole part of the model, or another library's checkpoints)"
        cure = "Use gradient_checkpointing_kwargs={'use_reentrant': False}, or pin or give the route"
        raise RouteError(expected("route", rule, got, where=scope.path(layer), cure=cure))


def trains_before(scope: RoutingScope) -> bool:
    """Tell whether anything trains that the route depends on: all but the experts may run before the router."""
    root = scope.root
    parameters = root.named_parameters() if root is not None else ()
    return any(value.requires_grad and ".tucka_experts." not in f".{name}" for name, value in parameters)


def misfit(scope: RoutingScope, layer: Any, x: Tensor, route: Route, forward: Forward) -> RouteError:
    """Return the error where it is not known which rows of a layer's input belong to which route."""
    cure = (
        "Take this layer out with exclude_modules, route by batch (routing='batch'), pin the route, or say with "
        "samples_first in the configuration which axis of the model's inputs counts samples"
    )
    rule = f"an input whose rows are known to belong to the {route.rows} samples that were routed"
    got = f"input {tuple(x.shape)}"
    if route.given:
        rule, cure = f"as many samples as given_route was told of, {route.rows}", "Give one group or gates a sample"
    elif forward.several:
        rule, got = (
            "one call of the model's body in this forward",
            "several, so the route of this layer is not known",
        )
    return RouteError(expected("route", rule, got, where=scope.path(layer), cure=cure))
