"""What the torch functions ask of their arguments, before any tensor work and without reading a tensor's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tucka.errors import ShapeError, TuckaError, expected

__all__ = [
    "Where",
    "check_activations",
    "check_base_dtype",
    "check_lead",
    "check_parts",
    "check_rank",
    "has_autocast",
    "named",
]

# Who calls, for messages; a function where finding the name takes time.
Where: TypeAlias = str | Callable[[], str]

_STRICT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def named(where: Where) -> str:
    """Return the name of who calls.

    Parameters
    ----------
    where : str or callable
        The name, or what finds it.

    Returns
    -------
    str
        The name.

    Examples
    --------
    >>> named("example"), named(lambda: "found")
    ('example', 'found')
    """
    return where if isinstance(where, str) else where()


def check_activations(x: Tensor, basis: Tensor, where: Where) -> None:
    """Raise unless thin products of `x` with `basis` exist.

    Parameters
    ----------
    x : Tensor, shape (..., d)
        Activations.
    basis : Tensor, shape (d, r)
        U.
    where : str or callable
        Who asks, for the message.

    Raises
    ------
    ShapeError
        If the widths differ.
    TuckaError
        If `x` is not real floating-point, or the two are on different devices.

    Examples
    --------
    >>> import torch
    >>> check_activations(torch.ones(2, 3), torch.ones(3, 1), "example")
    """
    if x.ndim == 0 or basis.ndim != 2 or x.shape[-1] != basis.shape[0]:
        rule = f"axes (..., d) with d = {basis.shape[0]} to match basis {tuple(basis.shape)}"
        cure = "Give the layer inputs of the width that it was adapted for"
        raise ShapeError(expected("x", rule, f"shape {tuple(x.shape)}", where=named(where), cure=cure))
    if not x.is_floating_point():
        cure = "Convert it with x.to(torch.get_default_dtype())"
        raise TuckaError(expected("x", "a real floating-point dtype", x.dtype, where=named(where), cure=cure))
    if x.device != basis.device:
        cure = "Move one of them with .to(device)"
        rule = f"a tensor on {basis.device}, where the basis is"
        raise TuckaError(expected("x", rule, f"one on {x.device}", where=named(where), cure=cure))


def check_base_dtype(layer: nn.Module, x: Tensor, where: Where) -> None:
    """Raise if torch's own layer would refuse an input for its dtype, in a message that does not name the layer.

    Parameters
    ----------
    layer : Module
        The base layer. One of another class, with hooks of its own or under autocast may convert its input.
    x : Tensor
        Its input.
    where : str or callable
        Who asks, for the message.

    Raises
    ------
    TuckaError
        If the layer's weight is of another dtype.

    Examples
    --------
    >>> import torch
    >>> check_base_dtype(nn.Linear(3, 1), torch.ones(2, 3), "example")
    """
    if type(layer) not in _STRICT or layer._forward_pre_hooks or has_autocast(x.device.type):
        return
    weight = layer.weight
    plain = type(weight) is nn.Parameter and weight.is_floating_point() and x.is_floating_point()
    if plain and weight.dtype != x.dtype:
        rule = f"dtype {weight.dtype}, as the layer's weight"
        cure = f"Convert it with x.to({weight.dtype}), or use autocast"
        raise TuckaError(expected("x", rule, x.dtype, where=named(where), cure=cure))


def has_autocast(device: str) -> bool:
    """Tell whether autocast is on.

    Parameters
    ----------
    device : str
        Type of the device.

    Returns
    -------
    bool
        Whether torch casts what it multiplies there.

    Examples
    --------
    >>> has_autocast("cpu")
    False
    """
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def check_parts(cores: Tensor, expert_factor: Tensor, gates: Tensor, where: Where) -> None:
    """Raise unless cores, expert factor and gates fit each other.

    Parameters
    ----------
    cores : Tensor, shape (k, p, r, r)
        The groups' cores.
    expert_factor : Tensor, shape (t, p)
        The factor of the expert mode.
    gates : Tensor, shape (..., k, t)
        Any gates.
    where : str or callable
        Who asks, for the message.

    Raises
    ------
    ShapeError
        If they do not.

    Examples
    --------
    >>> import torch
    >>> check_parts(torch.ones(2, 1, 3, 3), torch.ones(4, 1), torch.ones(2, 4), "example")
    """
    if cores.ndim != 4 or cores.shape[2] != cores.shape[3]:
        raise ShapeError(expected("cores", "axes (k, p, r, r)", f"shape {tuple(cores.shape)}", where=named(where)))
    if expert_factor.ndim != 2 or expert_factor.shape[1] != cores.shape[1]:
        rule = f"axes (t, p) with p = {cores.shape[1]} to match cores {tuple(cores.shape)}"
        raise ShapeError(expected("expert_factor", rule, f"shape {tuple(expert_factor.shape)}", where=named(where)))
    if gates.ndim < 2 or gates.shape[-2:] != (cores.shape[0], expert_factor.shape[0]):
        rule = f"axes (..., k, t) with (k, t) = {(cores.shape[0], expert_factor.shape[0])}"
        raise ShapeError(expected("gates", rule, f"shape {tuple(gates.shape)}", where=named(where)))


def check_rank(name: str, cores: Tensor, basis: Tensor, where: Where) -> None:
    """Raise unless the last two axes of cores are as long as the basis has columns.

    Parameters
    ----------
    name : str
        What the cores are called.
    cores : Tensor, shape (..., r, r)
        Cores, mixed or not.
    basis : Tensor, shape (d, r)
        U.
    where : str or callable
        Who asks, for the message.

    Raises
    ------
    ShapeError
        If they are not.

    Examples
    --------
    >>> import torch
    >>> check_rank("cores", torch.ones(3, 3), torch.ones(5, 3), "example")
    """
    rank = basis.shape[1]
    if cores.ndim < 2 or cores.shape[-2:] != (rank, rank):
        rule = f"axes (..., r, r) with r = {rank} to match basis {tuple(basis.shape)}"
        raise ShapeError(expected(name, rule, f"shape {tuple(cores.shape)}", where=named(where)))


def check_lead(name: str, lead: tuple[int, ...], x: Tensor, where: Where) -> None:
    """Raise unless leading axes align with those of `x` from the left.

    Parameters
    ----------
    name : str
        Whose axes they are.
    lead : tuple of int
        Their sizes.
    x : Tensor, shape (..., d)
        Activations.
    where : str or callable
        Who asks, for the message.

    Raises
    ------
    ShapeError
        If they do not.

    Examples
    --------
    >>> import torch
    >>> check_lead("gates", (2,), torch.ones(2, 5, 3), "example")
    """
    if lead != tuple(x.shape[:-1])[: len(lead)]:
        rule = f"leading axes that are the first of x's {tuple(x.shape[:-1])}"
        raise ShapeError(expected(name, rule, f"leading axes {lead}", where=named(where)))
