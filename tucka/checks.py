"""The rules that arrays must obey, one helper a rule; all run before any tensor work."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

from tucka.errors import ConfigError, ShapeError, expected

Array: TypeAlias = Any

__all__ = [
    "check_axes",
    "check_choice",
    "check_count",
    "check_finite",
    "check_floating",
    "check_mode",
    "check_numeric",
    "check_positive",
    "check_same_dtype",
    "check_shapes",
    "check_size",
]

_FLOATING = {"bfloat16", "float16", "float32", "float64", "float96", "float128"}
_WHOLE = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_NUMERIC = _FLOATING | _WHOLE | {"complex64", "complex128", "complex192", "complex256"}


def _dtype_name(array: Array) -> str:
    """Name a dtype as all libraries do: without a module's name, whatever the order of its bytes."""
    return str(getattr(array.dtype, "name", array.dtype)).rpartition(".")[2]


def _shape(array: Array) -> tuple[int, ...]:
    return tuple(array.shape)


def check_axes(name: str, array: Array, axes: str, *, where: str) -> None:
    """Raise unless `array` has the axes that `axes` lists, each with at least one entry.

    Parameters
    ----------
    name : str
        The argument's name, for the message.
    array : array
        The array given.
    axes : str
        Axis names separated by blanks; a leading ``...`` stands for any number of axes, of any size.
    where : str
        The caller, for the message.

    Raises
    ------
    ShapeError
        If the number of axes is wrong or a named axis is empty.

    Examples
    --------
    >>> import numpy as np
    >>> check_axes("basis", np.zeros((4, 2)), "d r", where="example")
    """
    names = axes.split()
    open_ended = names[0] == "..."
    named = names[1:] if open_ended else names
    shape = _shape(array)
    if len(shape) < len(named) or (not open_ended and len(shape) != len(named)):
        raise ShapeError(expected(name, f"axes ({', '.join(names)})", f"shape {shape}", where=where))
    sizes = shape[len(shape) - len(named) :]
    if 0 in sizes:
        empty = named[sizes.index(0)]
        raise ShapeError(expected(name, f"at least one entry along {empty}", f"shape {shape}", where=where))


def check_size(name: str, array: Array, axis: int, size: int, *, matches: str, where: str) -> None:
    """Raise unless `array` has `size` entries along `axis`.

    Parameters
    ----------
    name : str
        The argument's name, for the message.
    array : array
        The array given.
    axis : int
        The axis looked at.
    size : int
        What it should be.
    matches : str
        What the size comes from, such as ``"mode 1 of tensor"``.
    where : str
        The caller, for the message.

    Raises
    ------
    ShapeError
        If the size differs.

    Examples
    --------
    >>> import numpy as np
    >>> check_size("basis", np.zeros((4, 2)), 0, 4, matches="x", where="example")
    """
    shape = _shape(array)
    if shape[axis] != size:
        position = axis % len(shape)
        rule = f"size {size} along axis {position} to match {matches}"
        raise ShapeError(expected(name, rule, f"shape {shape}", where=where))


def check_shapes(*, where: str, **described: tuple[Array, str]) -> None:
    """Raise unless each array has the axes described, and axes of one name have one size in all arrays.

    Parameters
    ----------
    where : str
        The caller, for the message.
    **described : (array, str)
        Each array, by argument name, with its axes as in `check_axes`. The first array that has an axis sets its size.

    Raises
    ------
    ShapeError
        If an array has another number of axes, an empty axis, or one of a size that differs.

    Examples
    --------
    >>> import numpy as np
    >>> check_shapes(x=(np.zeros((9, 4)), "... d"), basis=(np.zeros((4, 2)), "d r"), where="example")
    """
    sizes: dict[str, tuple[int, str]] = {}
    for name, (array, axes) in described.items():
        check_axes(name, array, axes, where=where)
        letters = axes.removeprefix("...").split()
        for axis, letter in enumerate(letters, start=array.ndim - len(letters)):
            size, owner = sizes.setdefault(letter, (array.shape[axis], f"axis {axis} of {name}"))
            check_size(name, array, axis, size, matches=owner, where=where)


def check_mode(name: str, mode: object, ndim: int, *, where: str) -> int:
    """Return `mode` counted from 0, or raise if there is no such mode.

    Parameters
    ----------
    name : str
        The argument's name, for the message.
    mode : int
        Counted from 0; negative values count from the end.
    ndim : int
        The number of modes.
    where : str
        The caller, for the message.

    Returns
    -------
    int
        A number from 0 to ``ndim - 1``.

    Raises
    ------
    ConfigError
        If `mode` is not such a number.

    Examples
    --------
    >>> check_mode("mode", -1, 3, where="example")
    2
    """
    whole = hasattr(mode, "__index__") and not isinstance(mode, bool)
    if not whole or not -ndim <= int(mode) < ndim:  # type: ignore[call-overload]
        raise ConfigError(expected(name, f"a whole number from {-ndim} to {ndim - 1}", repr(mode), where=where))
    return int(mode) % ndim  # type: ignore[call-overload, no-any-return]


def check_floating(*, where: str, **arrays: Array) -> None:
    """Raise unless every array holds real floating-point numbers, all of one dtype.

    Parameters
    ----------
    where : str
        The caller, for the message.
    **arrays : array
        The arrays, by argument name.

    Raises
    ------
    TypeError
        If one is of another kind, or if two dtypes differ.

    Examples
    --------
    >>> import numpy as np
    >>> check_floating(where="example", x=np.zeros(2), y=np.ones(2))
    """
    for name, array in arrays.items():
        if _dtype_name(array) not in _FLOATING:
            raise TypeError(expected(name, "a real floating-point array", f"dtype {array.dtype}", where=where))
    check_same_dtype(where=where, **arrays)


def check_numeric(*, where: str, **arrays: Array) -> None:
    """Raise unless every array holds numbers, all of one dtype.

    Parameters
    ----------
    where : str
        The caller, for the message.
    **arrays : array
        The arrays, by argument name.

    Raises
    ------
    TypeError
        If one holds no numbers, or if two dtypes differ.

    Examples
    --------
    >>> import numpy as np
    >>> check_numeric(where="example", x=np.zeros(2), y=np.ones(2))
    """
    for name, array in arrays.items():
        if _dtype_name(array) not in _NUMERIC:
            raise TypeError(expected(name, "an array of numbers", f"dtype {array.dtype}", where=where))
    check_same_dtype(where=where, **arrays)


def check_same_dtype(*, where: str, **arrays: Array) -> None:
    """Raise unless all arrays have the dtype of the first.

    Parameters
    ----------
    where : str
        The caller, for the message.
    **arrays : array
        The arrays, by argument name.

    Raises
    ------
    TypeError
        If a dtype differs.

    Examples
    --------
    >>> import numpy as np
    >>> check_same_dtype(where="example", x=np.zeros(2), y=np.ones(2))
    """
    (first_name, first), *others = arrays.items()
    for name, array in others:
        if array.dtype != first.dtype:
            rule = f"dtype {first.dtype} to match {first_name}"
            raise TypeError(expected(name, rule, f"dtype {array.dtype}", where=where))


def check_count(name: str, value: Any, *, least: int = 1, where: str = "") -> int:
    """Return `value` as an int, or say why it is not a whole number of at least `least`.

    Parameters
    ----------
    name : str
        The argument's name, for the message.
    value : object
        The value given.
    least : int
        The smallest value allowed.
    where : str
        The caller, for the message.

    Returns
    -------
    int
        The value.

    Raises
    ------
    ConfigError
        If `value` is not an integer (booleans are refused) or is too small.

    Examples
    --------
    >>> check_count("rank", 8)
    8
    """
    whole = not isinstance(value, bool) and hasattr(value, "__index__")
    if not whole or int(value) < least:
        raise ConfigError(expected(name, f"a whole number of at least {least}", repr(value), where=where))
    return int(value)


def check_finite(name: str, value: Any, *, where: str = "") -> float:
    """Return `value` as a float, or say why it is not a finite real number.

    Parameters
    ----------
    name : str
        The argument's name, for the message.
    value : object
        The value given.
    where : str
        The caller, for the message.

    Returns
    -------
    float
        The value.

    Raises
    ------
    ConfigError
        If `value` is not a finite real number.

    Examples
    --------
    >>> check_finite("alpha", 2)
    2.0
    """
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not abs(value) < math.inf:  # a compiler can trace this, and not math.isfinite
        raise ConfigError(expected(name, "a finite number", repr(value), where=where))
    return float(value)


def check_positive(name: str, value: Any, *, where: str = "") -> float:
    """Return `value` as a float, or say why it is not a finite number above zero.

    Parameters
    ----------
    name : str
        The argument's name, for the message.
    value : object
        The value given.
    where : str
        The caller, for the message.

    Returns
    -------
    float
        The value.

    Raises
    ------
    ConfigError
        If `value` is not a finite number above zero.

    Examples
    --------
    >>> check_positive("temperature", 0.5)
    0.5
    """
    if check_finite(name, value, where=where) <= 0:
        raise ConfigError(expected(name, "a positive number", repr(value), where=where))
    return float(value)


def check_choice(name: str, value: Any, choices: tuple[Any, ...], *, where: str = "") -> None:
    """Raise unless `value` is one of `choices`.

    Parameters
    ----------
    name : str
        The argument's name, for the message.
    value : object
        The value given.
    choices : tuple
        The values allowed.
    where : str
        The caller, for the message.

    Raises
    ------
    ConfigError
        If `value` is none of them.

    Examples
    --------
    >>> check_choice("routing", "batch", ("batch", "sample"))
    """
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ConfigError(expected(name, f"one of {listed}", repr(value), where=where))
