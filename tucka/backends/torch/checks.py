"""What the torch functions ask of their arguments, before any tensor work and without reading a tensor's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from tucka.errors import ArrayError, ConfigError, ShapeError, expected
from tucka.spec import TuckerSpec

__all__ = [
    "Where",
    "check_activations",
    "check_device",
    "check_fits_width",
    "check_gates",
    "check_lead",
    "check_parts",
    "check_rank",
    "check_spec_type",
    "check_tensors",
    "check_thin",
    "named",
]

# Who calls, for messages; a function where finding the name takes time.
Where: TypeAlias = str | Callable[[], str]


def named(where: Where) -> str:
    """Return the name of who calls."""
    return where if isinstance(where, str) else where()


def check_tensors(where: Where, **given: object) -> None:
    """Raise unless all arguments are torch tensors on one device."""
    device, owner = None, ""
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            value = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
            cure = "Convert it with torch.as_tensor"
            raise ArrayError(expected(name, "a torch tensor", value, where=named(where), cure=cure))
        if device is None:
            device, owner = tensor.device, name
        elif tensor.device != device:
            check_device(name, tensor, device, where, owner=owner)


def check_device(name: str, tensor: Tensor, device: torch.device, where: Where, *, owner: str) -> None:
    """Raise unless a tensor is on the device that its `owner`, the tensor or module it meets, is on."""
    if tensor.device != device:
        rule, cure = f"a tensor on device {device} as {owner}", "Move one of them with .to(device)"
        raise ArrayError(expected(name, rule, f"one on {tensor.device}", where=named(where), cure=cure))


def check_activations(x: Tensor, width: int, where: Where, *, source: str, cure: str = "") -> None:
    """Raise unless `x` holds real floating-point numbers (..., d); `source` says what the width d comes from."""
    if x.ndim == 0 or x.shape[-1] != width:
        rule = f"axes (..., d) with d = {width}, {source}"
        raise ShapeError(expected("x", rule, f"shape {tuple(x.shape)}", where=named(where), cure=cure))
    if not x.is_floating_point():
        cure = "Convert it with x.to(torch.get_default_dtype())"
        raise ArrayError(expected("x", "a real floating-point dtype", x.dtype, where=named(where), cure=cure))


def check_thin(name: str, basis: Tensor, x: Tensor, where: Where) -> None:
    """Raise unless `basis` (d, r) can be multiplied with activations `x` (..., d)."""
    if basis.ndim != 2:
        raise ShapeError(expected(name, "axes (d, r)", f"shape {tuple(basis.shape)}", where=named(where)))
    check_activations(x, basis.shape[0], where, source=f"to match {name} of shape {tuple(basis.shape)}")


def check_parts(cores: Tensor, expert_factor: Tensor, gates: Tensor, where: Where) -> None:
    """Raise unless cores (k, p, r, r), expert factor (t, p) and gates (..., k, t) fit each other."""
    if cores.ndim != 4 or cores.shape[2] != cores.shape[3]:
        raise ShapeError(expected("cores", "axes (k, p, r, r)", f"shape {tuple(cores.shape)}", where=named(where)))
    if expert_factor.ndim != 2 or expert_factor.shape[1] != cores.shape[1]:
        rule = f"axes (t, p) with p = {cores.shape[1]} to match cores {tuple(cores.shape)}"
        raise ShapeError(expected("expert_factor", rule, f"shape {tuple(expert_factor.shape)}", where=named(where)))
    check_gates(gates, cores.shape[0], expert_factor.shape[0], where)


def check_gates(gates: Tensor, groups: int, experts: int, where: Where) -> None:
    """Raise unless gates have axes (..., k, t)."""
    if gates.ndim < 2 or gates.shape[-2:] != (groups, experts):
        rule = f"axes (..., k, t) with (k, t) = {(groups, experts)}"
        raise ShapeError(expected("gates", rule, f"shape {tuple(gates.shape)}", where=named(where)))


def check_rank(name: str, cores: Tensor, basis: Tensor, where: Where) -> None:
    """Raise unless cores (..., r, r), mixed or not, have the rank of a basis (d, r)."""
    rank = basis.shape[1]
    if cores.ndim < 2 or cores.shape[-2:] != (rank, rank):
        rule = f"axes (..., r, r) with r = {rank} to match basis {tuple(basis.shape)}"
        raise ShapeError(expected(name, rule, f"shape {tuple(cores.shape)}", where=named(where)))


def check_lead(name: str, lead: tuple[int, ...], x: Tensor, where: Where) -> None:
    """Raise unless leading axes align with those of `x` (..., d) from the left."""
    if lead != tuple(x.shape[:-1])[: len(lead)]:
        rule = f"leading axes that are the first of x's {tuple(x.shape[:-1])}"
        raise ShapeError(expected(name, rule, f"leading axes {lead}", where=named(where)))


def check_spec_type(spec: object, where: str) -> None:
    """Raise unless `spec` is a `TuckerSpec`."""
    if not isinstance(spec, TuckerSpec):
        cure = "Give config.spec" if hasattr(spec, "spec") else "Make one with tucka.TuckerSpec(...)"
        raise ConfigError(expected("spec", "a TuckerSpec", type(spec).__name__, where=where, cure=cure))


def check_fits_width(rank: int, width: int, where: str) -> None:
    """Raise if an adapter's rank exceeds the width of its layer."""
    if rank > width:
        cure = "Choose a smaller rank or exclude the layer"
        raise ConfigError(expected("rank", f"at most the layer's width {width}", rank, where=where, cure=cure))
