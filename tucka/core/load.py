"""How evenly the groups of experts are used."""

from __future__ import annotations

from typing import Any

import numpy as np

from tucka.backends import Array, backend_of, host_values
from tucka.errors import ConfigError, ShapeError, expected

__all__ = ["load_entropy"]


def load_entropy(load: Array) -> float:
    r"""Measure how evenly groups are used: :math:`-\sum_i p_i \log p_i / \log k` with :math:`p` the shares.

    Parameters
    ----------
    load : array_like, shape (k,)
        Counts or weights of the groups; not negative, not all zero.

    Returns
    -------
    float
        1 if all groups are used alike, 0 if one takes everything. One group alone is balanced: 1. A number on the
        host, so this is no function to differentiate or compile.

    Raises
    ------
    ShapeError
        If `load` is not a vector.
    ConfigError
        If an entry is negative or not finite, or all are zero.
    TypeError
        If `load` is neither an array nor a sequence of numbers.

    Examples
    --------
    >>> load_entropy([10, 10]), load_entropy([20, 0])
    (1.0, 0.0)
    """
    where = "load_entropy"
    counts = _counts(load)
    if counts.ndim != 1 or counts.size == 0:
        raise ShapeError(expected("load", "axes (k)", f"shape {counts.shape}", where=where))
    if not np.all(np.isfinite(counts)) or counts.min() < 0 or counts.max() == 0:
        rule = "finite counts, none negative, not all zero"
        raise ConfigError(expected("load", rule, counts.tolist(), where=where))
    if counts.size == 1:
        return 1.0
    used = counts[counts > 0] / counts.max()  # so that no sum can overflow
    shares = used / used.sum()
    return float(abs(np.sum(shares * np.log(shares))) / np.log(counts.size))


def _counts(load: Array) -> np.ndarray[Any, Any]:
    if not isinstance(load, (list, tuple)):
        backend_of(load=load)
        return host_values(load)
    try:
        return np.asarray(load, dtype=np.float64)
    except (TypeError, ValueError) as error:
        rule = "an array or a sequence of numbers"
        raise TypeError(expected("load", rule, repr(load), where="load_entropy")) from error
