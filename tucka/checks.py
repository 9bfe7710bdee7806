"""The rules that arguments must obey, one function a rule; all run before any tensor work."""

from __future__ import annotations

import difflib
import functools
import inspect
import numbers
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeAlias, TypeVar

from tucka.errors import ArrayError, ConfigError, KeywordError, ShapeError, expected

Array: TypeAlias = Any
Class = TypeVar("Class", bound=type)

__all__ = [
    "check_axes",
    "check_choice",
    "check_count",
    "check_finite",
    "check_floating",
    "check_keywords",
    "check_least",
    "check_mode",
    "check_numeric",
    "check_positive",
    "check_same_dtype",
    "check_shapes",
    "check_size",
    "refuse_unknown_keywords",
]

_FLOATING = {"bfloat16", "float16", "float32", "float64", "float96", "float128"}
_WHOLE = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
_NUMERIC = _FLOATING | _WHOLE | {"complex64", "complex128", "complex192", "complex256"}


def _dtype_name(array: Array) -> str:
    """Name a dtype as all libraries do: without a module's name, whatever the order of its bytes."""
    return str(getattr(array.dtype, "name", array.dtype)).rpartition(".")[2]


def check_axes(name: str, array: Array, axes: str, *, where: str) -> None:
    """Raise unless `array` has the axes in `axes` ("... d r"), each with at least one entry, except those in "..."."""
    names = axes.split()
    open_ended = names[0] == "..."
    named = names[1:] if open_ended else names
    shape = tuple(array.shape)
    if len(shape) < len(named) or (not open_ended and len(shape) != len(named)):
        raise ShapeError(expected(name, f"axes ({', '.join(names)})", f"shape {shape}", where=where))
    sizes = shape[len(shape) - len(named) :]
    if 0 in sizes:
        empty = named[sizes.index(0)]
        raise ShapeError(expected(name, f"at least one entry along {empty}", f"shape {shape}", where=where))


def check_size(name: str, array: Array, axis: int, size: int, *, matches: str, where: str) -> None:
    """Raise unless `array` has `size` entries along `axis`; `matches` says what the size comes from."""
    shape = tuple(array.shape)
    if shape[axis] != size:
        position = axis % len(shape)
        rule = f"size {size} along axis {position} to match {matches}"
        raise ShapeError(expected(name, rule, f"shape {shape}", where=where))


def check_shapes(*, where: str, **described: tuple[Array, str]) -> None:
    """Raise unless each array has its axes, and axes of one name have the size that the first array with them has."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, (array, axes) in described.items():
        check_axes(name, array, axes, where=where)
        letters = axes.removeprefix("...").split()
        for axis, letter in enumerate(letters, start=array.ndim - len(letters)):
            size, owner = sizes.setdefault(letter, (array.shape[axis], f"axis {axis} of {name}"))
            check_size(name, array, axis, size, matches=owner, where=where)


def check_mode(name: str, mode: object, ndim: int, *, where: str) -> int:
    """Return `mode` counted from 0; negative values count from the end."""
    whole = hasattr(mode, "__index__") and not isinstance(mode, bool)
    if not whole or not -ndim <= int(mode) < ndim:  # type: ignore[call-overload]
        raise ConfigError(expected(name, f"a whole number from {-ndim} to {ndim - 1}", repr(mode), where=where))
    return int(mode) % ndim  # type: ignore[call-overload, no-any-return]


def check_floating(*, where: str, **arrays: Array) -> None:
    """Raise unless all arrays hold real floating-point numbers of one dtype."""
    _check_kind(_FLOATING, "a real floating-point array", where, arrays)


def check_numeric(*, where: str, **arrays: Array) -> None:
    """Raise unless all arrays hold numbers of one dtype."""
    _check_kind(_NUMERIC, "an array of numbers", where, arrays)


def _check_kind(dtypes: set[str], rule: str, where: str, arrays: dict[str, Array]) -> None:
    for name, array in arrays.items():
        if _dtype_name(array) not in dtypes:
            raise ArrayError(expected(name, rule, f"dtype {array.dtype}", where=where))
    check_same_dtype(where=where, **arrays)


def check_same_dtype(*, where: str, **arrays: Array) -> None:
    """Raise unless all arrays have the dtype of the first."""
    (first_name, first), *others = arrays.items()
    for name, array in others:
        if array.dtype != first.dtype:
            rule = f"dtype {first.dtype} to match {first_name}"
            raise ArrayError(expected(name, rule, f"dtype {array.dtype}", where=where))


def check_count(name: str, value: Any, *, least: int = 1, where: str = "") -> int:
    """Return a whole number of at least `least`, Python's or NumPy's, as a plain int."""
    whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not whole or int(value) < least:
        raise ConfigError(expected(name, f"a whole number of at least {least}", repr(value), where=where))
    return int(value)


def check_finite(name: str, value: Any, *, where: str = "") -> float:
    """Return a finite real number, Python's, NumPy's or an array's without axes, as a plain float."""
    if not isinstance(value, (int, float)):
        value = _plain_number(value)
    real = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not real or not abs(value) <= sys.float_info.max:  # a compiler can trace this, and not math.isfinite
        raise ConfigError(expected(name, "a finite number", repr(value), where=where))
    return float(value)


def _plain_number(value: Any) -> Any:
    """Return the number that NumPy or an array without axes holds; anything else as it is."""
    if isinstance(value, numbers.Real):
        return float(value)
    if getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except Exception:  # a traced array has no value, and each library raises its own error
        return value


def check_least(name: str, value: Any, least: float, *, where: str = "") -> float:
    """Return a finite number of at least `least` as a plain float."""
    number = check_finite(name, value, where=where)
    if number < least:
        rule = "a number that is not negative" if least == 0 else f"a number of at least {least:g}"
        raise ConfigError(expected(name, rule, repr(value), where=where))
    return number


def check_positive(name: str, value: Any, *, where: str = "") -> float:
    """Return a finite number above zero as a plain float."""
    number = check_finite(name, value, where=where)
    if number <= 0:
        raise ConfigError(expected(name, "a positive number", repr(value), where=where))
    return number


def check_choice(name: str, value: Any, choices: tuple[Any, ...], *, where: str = "") -> Any:
    """Return the one of `choices` that equals `value`."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ConfigError(expected(name, f"one of {listed}", repr(value), where=where))
    return choices[choices.index(value)]


def check_keywords(name: str, given: Iterable[str], known: Collection[str], *, also_called: Mapping[str, str]) -> None:
    """Raise unless the callable `name` has all keywords `given`; `also_called` maps words to its own, or to a cure."""
    for word in given:
        if word in known:
            continue
        likely = [also_called.get(word), *difflib.get_close_matches(word, known, n=1)]
        right = next((other for other in likely if other in known), None)
        cure = f"The word here is {right}" if right else f"Use one of {', '.join(known)}" if known else ""
        if word in also_called and also_called[word] not in known and " " in also_called[word]:
            cure = also_called[word]
        # PEFT drops entries of newer files, with a warning, where it finds Python's own words in the message.
        value = "an unexpected keyword argument"
        raise KeywordError(expected(word, f"an argument of {name}", value, cure=cure))


def refuse_unknown_keywords(also_called: Mapping[str, str]) -> Callable[[Class], Class]:
    """Decorate a class: its constructor refuses keywords by `check_keywords`, and keeps its signature."""

    def decorated(kind: Class) -> Class:
        construct: Callable[..., None] = kind.__init__  # type: ignore[misc]
        known = [name for name in inspect.signature(construct).parameters if name != "self"]

        @functools.wraps(construct)
        def checked(self: object, *args: Any, **keywords: Any) -> None:
            check_keywords(kind.__name__, keywords, known, also_called=also_called)
            construct(self, *args, **keywords)

        kind.__init__ = checked  # type: ignore[misc]
        return kind

    return decorated
