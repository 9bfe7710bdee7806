"""How evenly the groups of experts are used."""

from __future__ import annotations

import math
import warnings

import numpy as np
from scipy.special import entr

from tucka.arrays import Array, Values, finite_values, host_numbers
from tucka.checks import check_count, check_positive
from tucka.errors import ConfigError, ShapeError, expected

__all__ = ["CollapseAlarm", "load_entropy", "relative_entropy"]

_CURE = (
    "Start the router from data of the kind that it is trained on (initialize_router or RouterCallback), use "
    "affinity='directional', lower the learning rate of the centroids, or set balance_rate; the documentation's page "
    "'A router has collapsed' says how to find out which"
)


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
    ArrayError
        If `load` is neither an array nor a sequence of numbers.

    Examples
    --------
    >>> load_entropy([10, 10]), load_entropy([20, 0])
    (1.0, 0.0)
    """
    where = "load_entropy"
    counts = finite_values("load", load, where=where)
    if counts.ndim != 1 or counts.size == 0:
        raise ShapeError(expected("load", "axes (k)", f"shape {counts.shape}", where=where))
    if counts.min() < 0 or counts.max() == 0:
        raise ConfigError(expected("load", "counts, none negative, not all zero", counts.tolist(), where=where))
    return float(relative_entropy(counts))


def relative_entropy(counts: Values) -> Values:
    """Divide the entropy of the shares (..., k) by its largest value, log k; 1 for one group."""
    groups = counts.shape[-1]
    if groups == 1:
        return np.ones(counts.shape[:-1])
    used = counts / counts.max(axis=-1, keepdims=True)  # so that no sum can overflow
    shares = used / used.sum(axis=-1, keepdims=True)
    return np.asarray(entr(shares).sum(axis=-1) / math.log(groups))


class CollapseAlarm:
    """Warn, once, when a few groups take almost all routings of a number of steps.

    Parameters
    ----------
    name : str
        Of the router, for the warning.
    window : int
        Steps that are looked at together. Only after so many are numbers read from a device.
    below : float
        The load entropy under which it warns, above 0.

    Raises
    ------
    ConfigError
        If an argument is outside its rule.

    Examples
    --------
    >>> alarm = CollapseAlarm("router", window=2)
    >>> alarm.add([5, 3])
    >>> alarm.add([2, 4])  # balanced: nothing is said
    >>> import warnings
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     CollapseAlarm("router", window=1).add([99, 1])
    >>> print(caught[0].message)
    router: expected a load entropy of at least 0.5, got 0.08: 99% of the routings of the last 1 steps went to ...
    """

    def __init__(self, name: str, *, window: int = 32, below: float = 0.5) -> None:
        self._name = name
        self._window = check_count("window", window, where="CollapseAlarm")
        self._below = check_positive("below", below, where="CollapseAlarm")
        if self._below > 1:
            raise ConfigError(expected("below", "a load entropy, which is at most 1", below, where="CollapseAlarm"))
        self._total: Array | None = None
        self._steps = 0
        self.has_warned = False

    def add(self, load: Array) -> None:
        """Take a step's load in, and look at the last `window` steps if they are complete.

        Parameters
        ----------
        load : array_like, shape (k,)
            How often each group was chosen in the step.

        Examples
        --------
        >>> CollapseAlarm("router").add([5, 3])
        """
        if self.has_warned:
            return
        load = host_numbers("load", load, where="CollapseAlarm") if isinstance(load, (list, tuple)) else load
        self._total = load if self._total is None else self._total + load
        self._steps += 1
        if self._steps >= self._window:
            self.check()

    def check(self, *, least: int = 1) -> None:
        """Look at the steps since the last look, if they have enough routings.

        Parameters
        ----------
        least : int
            Routings for each group, on average, below which nothing is said.

        Examples
        --------
        >>> alarm = CollapseAlarm("router")
        >>> alarm.add([5, 3])
        >>> alarm.check()  # balanced: nothing is said
        """
        total, steps = self._total, self._steps
        self._total, self._steps = None, 0
        if total is None or self.has_warned:
            return
        counts = host_numbers("load", total, where="CollapseAlarm")
        if counts.sum() < max(1, least * counts.size):
            return
        entropy = load_entropy(counts)
        if entropy < self._below:
            self.has_warned = True
            group = int(counts.argmax())
            share = f"{counts[group] / counts.sum():.0%} of the routings of the last {steps} steps"
            found = f"{share} went to group {group} of {counts.size}"
            rule = f"a load entropy of at least {self._below:g}"
            value = f"{entropy:.2f}: {found}"
            warnings.warn(expected(self._name, rule, value, cure=_CURE), UserWarning, stacklevel=3)
