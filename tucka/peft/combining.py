"""One adapter for the weighted sum of pinned ones: exact, since bases that are put side by side hold all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tucka.backends.torch.functional import mix_cores
from tucka.backends.torch.routing.scope import RoutingScope
from tucka.checks import check_finite
from tucka.errors import ConfigError, RouteError, expected
from tucka.peft.config import TuckAConfig
from tucka.peft.layer import TuckALayer

__all__ = ["check_combination", "config_of_sum", "sum_of_updates", "write_sum"]

_WHERE = "add_weighted_adapter"
_EXACT = ("linear", "cat", "svd")  # what PEFT's LoRA calls its ways; the sum here is the same in all of them


def check_combination(
    configs: Mapping[str, TuckAConfig], scope: RoutingScope, names: Any, weights: Any, new: str, kind: str
) -> dict[str, float]:
    """Return the weight of each adapter of a sum, or raise before anything is made."""
    listed = list(names) if isinstance(names, (list, tuple)) else []
    if not listed or any(name not in configs for name in listed) or len(set(listed)) != len(listed):
        rule = f"different names of adapters of this model, {list(configs)}"
        raise ConfigError(expected("adapters", rule, repr(names), where=_WHERE))
    if not isinstance(weights, (list, tuple)) or len(weights) != len(listed):
        raise ConfigError(expected("weights", f"{len(listed)} numbers, one for each adapter", weights, where=_WHERE))
    if new in configs:
        raise ConfigError(expected("adapter_name", "a name that is free", repr(new), where=_WHERE))
    if kind not in _EXACT:
        rule = f"one of {', '.join(map(repr, _EXACT))}, which all are the exact sum here"
        raise ConfigError(expected("combination_type", rule, repr(kind), where=_WHERE))
    routed = [name for name in listed if name not in scope.pinned]
    if routed:
        rule, cure = "pinned adapters, since the updates of routed ones depend on the input", "Pin them with pin_route"
        raise RouteError(expected("adapters", rule, ", ".join(routed), where=_WHERE, cure=cure))
    whole = [name for name in listed if configs[name].modules_to_save or configs[name].bias != "none"]
    if whole:
        rule = "adapters without modules_to_save and biases, which have no sum"
        raise ConfigError(expected("adapters", rule, ", ".join(whole), where=_WHERE))
    return {name: check_finite("weights", weight, where=_WHERE) for name, weight in zip(listed, weights, strict=True)}


@torch.no_grad()
def sum_of_updates(layer: TuckALayer, weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
    """Return the core (r, r) and the basis (d, r) of the weighted sum of pinned adapters, in float32 at least."""
    bases, cores = [], []
    for name in (name for name in weights if name in layer.tucka_experts):
        parts = layer.experts(name)
        core, expert_factor, basis = parts.factors()
        mixed = mix_cores(core, expert_factor, layer.tucka_scope.pinned[name].to(core.device))
        bases.append(basis.to(mixed.dtype))
        cores.append(weights[name] * parts.alpha * mixed)
    basis, core = torch.cat(bases, dim=1), torch.block_diag(*cores)
    if basis.shape[1] > basis.shape[0]:  # no more directions than the layer is wide
        basis, triangle = torch.linalg.qr(basis)
        core = triangle @ core @ triangle.T
    return core, basis


def config_of_sum(like: TuckAConfig, ranks: Mapping[str, int]) -> TuckAConfig:
    """Return the configuration of a sum on layers of these ranks: one expert, and a route of 1."""
    largest = max(ranks.values())
    return TuckAConfig(
        r=largest,
        k=1,
        t=1,
        p=1,
        rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != largest},
        target_modules=list(ranks),
        pinned_gates=[[1.0]],
        routing="sample",
        factor_norm=None,
        task_type=like.task_type,
        base_model_name_or_path=like.base_model_name_or_path,
        revision=like.revision,
    )


def write_sum(layer: TuckALayer, new: str, core: Tensor, basis: Tensor) -> None:
    """Write a sum into the adapter that was made for it."""
    parts = layer.experts(new)
    with torch.no_grad():
        parts.cores.copy_(core)
        parts.basis.copy_(basis)
        parts.expert_factor.fill_(1.0)
