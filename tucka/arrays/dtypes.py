"""Dtypes of arrays of any backend: casting, widening, copying to the host."""

from __future__ import annotations

from typing import Any

import numpy as np

from tucka.arrays.dispatch import Array, backend_of

__all__ = ["cast", "host_values", "is_half", "widen"]

_HALF = ("bfloat16", "float16")


def cast(array: Array, dtype: Any) -> Array:
    """Return `array` with another dtype, differentiably, on any backend.

    TensorLy has no such function (its ``tensor`` detaches).

    Parameters
    ----------
    array : array
        Any array.
    dtype : dtype
        A dtype of the array's own library.

    Returns
    -------
    array
        The same array if it has the dtype already.

    Examples
    --------
    >>> import numpy as np
    >>> cast(np.zeros(2), np.float32).dtype
    dtype('float32')
    """
    if array.dtype == dtype:
        return array
    return array.to(dtype) if hasattr(array, "to") and not hasattr(array, "astype") else array.astype(dtype)


def is_half(array: Array) -> bool:
    """Say whether an array is in 16-bit precision.

    Parameters
    ----------
    array : array
        Any array.

    Returns
    -------
    bool
        True for float16 and bfloat16.

    Examples
    --------
    >>> import numpy as np
    >>> is_half(np.zeros(2, dtype=np.float16))
    True
    """
    return str(array.dtype).rpartition(".")[2] in _HALF


def widen(array: Array) -> Array:
    """Return `array` in float32 if it is in half precision: for small sizes, where the extra digits are free.

    Parameters
    ----------
    array : array
        Any array.

    Returns
    -------
    array
        The same array if it is not in half precision.

    Examples
    --------
    >>> import numpy as np
    >>> widen(np.zeros(2, dtype=np.float16)).dtype
    dtype('float32')
    """
    return cast(array, backend_of(array=array).float32) if is_half(array) else array


def host_values(array: Array) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Copy an array to the host, as NumPy float64 and without its gradient.

    Parameters
    ----------
    array : array
        Real numbers on any device.

    Returns
    -------
    numpy.ndarray
        The values.

    Examples
    --------
    >>> import numpy as np
    >>> host_values(np.ones(2, dtype=np.float32))
    array([1., 1.])
    """
    handle = backend_of(array=array)
    if hasattr(array, "detach"):
        # NumPy does not know every dtype that has gradients: bfloat16 must be widened before it leaves.
        array = array.detach().cpu().double()
    return np.array(handle.to_numpy(array), dtype=np.float64)
