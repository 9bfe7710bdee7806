"""Comparison of values, with a tolerance from the precision and the length of the sums."""

import numpy as np


def assert_close(actual, desired, *, eps: float, terms: int = 1, scale: float | None = None) -> None:
    """Assert that `actual` is `desired` up to the rounding of sums of `terms` products.

    `scale` is the size of the numbers that were added; by default that of `desired`, at least 1.
    """
    actual, desired = np.asarray(actual), np.asarray(desired)
    assert actual.shape == desired.shape, f"shape {actual.shape} instead of {desired.shape}"
    if scale is None:
        scale = max(1.0, float(np.abs(desired).max(initial=0.0)))
    np.testing.assert_allclose(actual, desired, rtol=0, atol=32 * eps * max(terms, 1) * scale)


def largest(*arrays) -> float:
    """Return a bound on the products of entries, one of each array: a `scale` for sums of such products."""
    return float(np.prod([max(1.0, np.abs(array).max(initial=0.0)) for array in arrays]))
