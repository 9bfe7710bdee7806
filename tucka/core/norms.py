"""Norms whose squares neither overflow nor vanish, and whose gradient at zero is no NaN."""

from __future__ import annotations

from tucka.arrays import Array, backend_of, detach

__all__ = ["largest_entry", "norms_of_rows", "scaled_rows"]


def largest_entry(array: Array, axis: int | None = None) -> Array:
    """Return the largest absolute entry, of all or along one axis, as a constant; 1 where that is zero."""
    handle = backend_of(array=array)
    largest = handle.max(handle.abs(detach(array)), axis=axis)
    return handle.where(largest == 0, largest + 1, largest)


def scaled_rows(vectors: Array) -> Array:
    """Divide each row (last axis) by its largest absolute entry: any function of its direction stays the same."""
    return vectors / largest_entry(vectors, axis=-1)[..., None]


def norms_of_rows(scaled: Array) -> Array:
    """Return the norms of rows from `scaled_rows`; a norm of zero counts as one."""
    handle = backend_of(scaled=scaled)
    squares = handle.sum(scaled * scaled, axis=-1)
    return handle.sqrt(squares + (squares == 0))
