"""From arrays of any backend to NumPy on the host, and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from tucka.arrays.dispatch import Array, backend_of
from tucka.errors import ArrayError, ConfigError, expected

__all__ = ["Values", "array_like", "finite_values", "host_numbers", "host_values", "placement"]

Values = np.ndarray[Any, Any]


def placement(like: Array) -> dict[str, Any]:
    """Return the dtype and, where the backend knows it, the device of an array, as TensorLy's functions take them."""
    context = backend_of(like=like).context(like)
    return {name: value for name, value in context.items() if name != "requires_grad"}


def array_like(values: Values, like: Array | None) -> Array:
    """Bring `values` to the backend, dtype and device of `like`, without a gradient; leave them if it is None."""
    return values if like is None else backend_of(like=like).tensor(values, **placement(like))


def host_values(array: Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Copy an array of real numbers to the host, as NumPy float64 and without its gradient."""
    handle = backend_of(array=array)
    if hasattr(array, "detach"):
        # NumPy does not know every dtype that has gradients: bfloat16 must be widened before it leaves.
        array = array.detach().cpu().double()
    return np.array(handle.to_numpy(array), dtype=np.float64)


def host_numbers(name: str, values: Any, *, where: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Copy an array, a number or nested lists of numbers to the host, as NumPy float64."""
    if not isinstance(values, (int, float, list, tuple)):
        backend_of(**{name: values})
        return host_values(values)
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        rule = "an array or a sequence of numbers"
        raise ArrayError(expected(name, rule, repr(values), where=where)) from error


def finite_values(name: str, values: Any, *, where: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Copy numbers to the host as `host_numbers`, or raise if one is NaN or infinite."""
    numbers = host_numbers(name, values, where=where)
    if not np.isfinite(numbers).all():
        raise ConfigError(expected(name, "finite numbers", "NaN or infinity", where=where))
    return numbers
