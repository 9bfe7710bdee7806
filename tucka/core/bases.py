"""A basis whose columns stay shorter than one, however far training moves them."""

from __future__ import annotations

from tucka.arrays import Array, cast, floating_backend, widen
from tucka.checks import check_axes
from tucka.core.norms import largest_entry

__all__ = ["SOFTNESS", "soft_unit_columns"]

#: Columns much shorter than this grow in proportion; much longer ones have a length of nearly one.
SOFTNESS = 0.25


def soft_unit_columns(basis: Array) -> Array:
    r"""Scale each column u of a basis to :math:`u / \sqrt{\|u\|^2 + 1/16}`, which is shorter than one.

    A short column is four times as long afterwards, and a zero column stays zero. A long column keeps its direction
    only. So a column that grows in training has ever less influence on the size of the update, and turns ever more
    slowly. With ``factor_norm="columns"``, adapters have this basis in place of U.

    Parameters
    ----------
    basis : array, shape (d, r)
        The numbers that are trained.

    Returns
    -------
    array, shape (d, r)
        The basis U as it enters the equations. Same dtype as `basis`.

    Raises
    ------
    ShapeError
        If `basis` is not two-dimensional.
    ArrayError
        If it is no array of a known library, or not floating.

    References
    ----------
    .. [1] tucka's own. The paper has no such scale; the authors' code divides the whole basis by its norm.

    Examples
    --------
    >>> import numpy as np
    >>> soft_unit_columns(np.array([[0.25, 0.0, 3.0], [0.0, 0.0, 4.0]])).round(3)
    array([[0.707, 0.   , 0.599],
           [0.   , 0.   , 0.799]])
    """
    handle = floating_backend(where="soft_unit_columns", basis=basis)
    check_axes("basis", basis, "d r", where="soft_unit_columns")
    wide = widen(basis)
    # Divided by the largest entry first, so that no square overflows.
    largest = largest_entry(wide, axis=0)
    largest = handle.where(largest > SOFTNESS, largest, largest * 0 + SOFTNESS)
    scaled = wide / largest
    lengths = handle.sqrt(handle.sum(scaled * scaled, axis=0) + (SOFTNESS / largest) ** 2)
    return cast(scaled / lengths, basis.dtype)
