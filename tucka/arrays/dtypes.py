"""Dtypes of arrays of any backend and their derivatives: casting, widening, cutting the graph."""

from __future__ import annotations

from typing import Any

from tucka.arrays.dispatch import Array, Backend, backend_of
from tucka.checks import check_floating

__all__ = ["cast", "detach", "floating_backend", "is_half", "widen"]

_HALF = ("bfloat16", "float16")


def floating_backend(*, where: str, **arrays: Array) -> Backend:
    """Return the one backend of arrays of real floating-point numbers, all of one dtype, or raise."""
    handle = backend_of(**arrays)
    check_floating(where=where, **arrays)
    return handle


def cast(array: Array, dtype: Any) -> Array:
    """Return `array` with a dtype of its own library, differentiably; itself if it has that dtype."""
    # TensorLy has no such function: its `tensor` detaches.
    if array.dtype == dtype:
        return array
    return array.to(dtype) if hasattr(array, "to") and not hasattr(array, "astype") else array.astype(dtype)


def is_half(array: Array) -> bool:
    """Say whether an array is in float16 or bfloat16."""
    return str(array.dtype).rpartition(".")[2] in _HALF


def widen(array: Array) -> Array:
    """Return `array` in float32 if it is in half precision: for small sizes, where the extra digits are free."""
    return cast(array, backend_of(array=array).float32) if is_half(array) else array


def detach(array: Array) -> Array:
    """Return `array` as a constant that derivatives do not pass."""
    if hasattr(array, "detach"):
        return array.detach()
    stop = getattr(backend_of(array=array), "stop_gradient", None)
    return array if stop is None else stop(array)
