"""What a fixed route writes into a layer's weight (Eq. 4), as thin factors of its update and as the whole weight."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from tucka.backends.torch.base_layers import input_axis, layer_weight, open_weight, weight_rows
from tucka.backends.torch.functional import mix_cores
from tucka.errors import RouteError, TuckaError, expected

if TYPE_CHECKING:
    from tucka.peft.layer import TuckALayer

__all__ = ["check_merge", "check_own_weights", "merged_weight", "readable_weight", "thin_update", "unmerged_weight"]


# Layers that compute with their weight standardised: what is added to the weight is not added to the update.
_STANDARDISED = ("WeightStandardizedConv2d", "StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")


def readable_weight(layer: TuckALayer) -> Tensor | None:
    """Return the base weight; None for quantised or hidden ones, and for layouts that are not known."""
    return open_weight(layer.get_base_layer(), layer.in_features)


def check_merge(layer: TuckALayer, names: list[str], *, safe_merge: bool) -> None:
    """Raise what merging these adapters would raise, and write nothing."""
    if names and safe_merge:
        merged_weight(layer, names, safe_merge=True)
    elif names:
        _mergeable_weight(layer, names)


@torch.no_grad()
def merged_weight(
    layer: TuckALayer, names: list[str], *, safe_merge: bool
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Compute the merged weight, and for each adapter the thin update that is in it; write nothing."""
    weight = _mergeable_weight(layer, names)
    rows, updates = _wide_rows(layer, weight), {}
    for name in names:
        left, right = updates[name] = thin_update(layer, name, layer.tucka_scope.pinned[name])
        rows = rows + left @ right
        if safe_merge and not torch.isfinite(rows.to(weight.dtype)).all():
            # PEFT's own sentence: its users look for it.
            msg = f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
            raise ValueError(msg)
    return _from_rows(layer, rows), updates


@torch.no_grad()
def unmerged_weight(layer: TuckALayer) -> Tensor:
    """Compute the base weight without the adapters that are merged into it."""
    rows = _wide_rows(layer, layer_weight(layer.get_base_layer()))
    for name in reversed(layer.merged_adapters):
        left, right = layer.tucka_merged[name]
        rows = rows - left.to(rows.device) @ right.to(rows.device)
    return _from_rows(layer, rows)


@torch.no_grad()
def thin_update(layer: TuckALayer, name: str, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Return α W U (out, r) and (U Ḡ)ᵀ (r, d) of the original weight W, for gates (k, t); in float32 at least."""
    # The rows of W are its outputs, and with a convolution one for each kernel position.
    parts = layer.experts(name)
    cores, expert_factor, basis = parts.factors()
    mixed = mix_cores(cores, expert_factor, gates.to(cores.device))
    dtype = torch.promote_types(mixed.dtype, basis.dtype)
    weight = readable_weight(layer)
    if weight is None:
        reduced = _called_on(layer, basis).to(dtype)
    else:
        rows = _wide_rows(layer, weight)
        dtype = torch.promote_types(rows.dtype, dtype)
        reduced = rows.to(dtype) @ basis.to(dtype)
        for left, right in layer.tucka_merged.values():  # what other adapters added is not part of the original
            reduced = reduced - left.to(reduced) @ (right.to(reduced) @ basis.to(dtype))
    return parts.alpha * reduced, (basis.to(dtype) @ mixed.to(dtype)).t().contiguous()


def _mergeable_weight(layer: TuckALayer, names: list[str]) -> Tensor:
    """Return the base weight if these adapters can be merged into it."""
    where = layer.tucka_scope.path(layer)
    for name in names:
        if name not in layer.tucka_scope.pinned:
            rule = f"adapter {name!r} pinned, since the update of a routed one depends on the input"
            cure = "Pin it with tucka.peft.pin_route(model, ...) or set pinned_gates in its configuration"
            raise RouteError(expected("merge", rule, "a routed adapter", where=where, cure=cure))
        if any(name in given for given in layer.tucka_scope.forwards.state.given):
            cure = "Leave `with given_route(model, ...):` first"
            rule, got = f"the pinned route of adapter {name!r} to be in use", "one that given_route gives"
            raise RouteError(expected("merge", rule, got, where=where, cure=cure))
    weight = readable_weight(layer)
    kind = type(layer.get_base_layer()).__name__
    if kind in _STANDARDISED:
        rule = "a base layer that computes with its weight as it is"
        raise TuckaError(expected("merge", rule, kind, where=where, cure="Keep the adapter beside the base"))
    if weight is None:
        rule = "a base layer with an ordinary floating-point weight"
        cure = "Load the base in full precision to merge, or use tucka.peft.export_lora"
        raise TuckaError(expected("merge", rule, kind, where=where, cure=cure))
    return weight


def check_own_weights(model: nn.Module, layers: list[TuckALayer]) -> None:
    """Raise where a weight that is to be merged into belongs to another module as well, which would change too."""
    owned = Counter(id(value) for module in model.modules() for value in module.parameters(recurse=False))
    weights = [layer_weight(layer.get_base_layer()) for layer in layers]
    adapted = Counter(map(id, weights))
    for layer, weight in zip(layers, weights, strict=True):
        if owned[id(weight)] > 1 or adapted[id(weight)] > 1:
            rule, where = "a base layer with a weight of its own", layer.tucka_scope.path(layer)
            cure = "Keep the adapter beside the base, or untie the weights first"
            raise TuckaError(expected("merge", rule, "one that another layer shares", where=where, cure=cure))


def _called_on(layer: TuckALayer, basis: Tensor) -> Tensor:
    """Return W U (out, r) of a linear layer that hides its weight, by calling it; the zero row gives its bias."""
    base = layer.get_base_layer()
    bias = getattr(base, "bias", None)
    dtype = bias.dtype if isinstance(bias, Tensor) and bias.is_floating_point() else basis.dtype
    rows = torch.cat([basis.t(), basis.new_zeros(1, basis.shape[0])]).to(dtype)
    outputs = base(rows).to(torch.promote_types(dtype, torch.float32))
    return cast(Tensor, outputs[:-1] - outputs[-1:]).t()


def _wide_rows(layer: TuckALayer, weight: Tensor) -> Tensor:
    """View a weight as a matrix whose last axis is the adapted input axis, in float32 at least."""
    rows = weight_rows(weight, input_axis(layer.get_base_layer()))
    return rows.to(torch.promote_types(weight.dtype, torch.float32))


def _from_rows(layer: TuckALayer, rows: Tensor) -> Tensor:
    """Undo `_wide_rows`, except for the dtype."""
    base = layer.get_base_layer()
    axis = input_axis(base)
    return rows.reshape(layer_weight(base).movedim(axis, -1).shape).movedim(-1, axis)
