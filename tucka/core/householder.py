"""Householder adaptation (HRA): a product of reflections as one Tucker expert."""

from __future__ import annotations

from typing import Any, overload

import numpy as np

from tucka.arrays import Array, backend_of, cast, floating_backend, placement, widen
from tucka.checks import check_axes
from tucka.core.experts import ArrayT, NumbersT, TuckerExperts
from tucka.errors import ShapeError, expected

__all__ = ["householder_experts", "householder_gamma", "householder_product"]


def _check_vectors(vectors: Array, where: str) -> None:
    floating_backend(where=where, vectors=vectors)
    check_axes("vectors", vectors, "d r", where=where)
    width, count = vectors.shape
    if count > width:
        # More reflections than dimensions are a legal product, but no adapter: r is a rank.
        raise ShapeError(expected("vectors", f"at most {width} columns", f"shape {(width, count)}", where=where))


def _identity(size: int, like: Array) -> Array:
    """Return the identity matrix with the backend, dtype and device of `like`."""
    return backend_of(like=like).eye(size, **placement(like))


def householder_gamma(vectors: Array) -> Array:
    r"""Compute the Γ with :math:`\prod_{i=1}^{r} (I - 2 u_i u_i^\top) = I + U \Gamma U^\top`.

    The paper's recursion makes Γ column by column. This is its closed form, one triangular solve:
    :math:`\Gamma^{-1} = -(\tfrac{1}{2} I + \mathrm{striu}(U^\top U))`.

    Parameters
    ----------
    vectors : array, shape (d, r)
        Unit columns; their length is not checked.

    Returns
    -------
    array, shape (r, r)
        Upper triangular, in the dtype of `vectors`.

    Raises
    ------
    ShapeError
        If `vectors` is not a matrix with at most as many columns as rows.
    ArrayError
        If `vectors` is no real floating-point array.

    Notes
    -----
    The paper's Eq. (2) prints :math:`-2u_r^\top` as the lower left block. Its shape (1, d) does not fit there;
    expanding the product gives 0, which makes Γ triangular: the compact WY form.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (1) and (2).

    Examples
    --------
    >>> import numpy as np
    >>> vectors = np.array([[1.0, 0.6], [0.0, 0.8]])
    >>> householder_gamma(vectors).round(6) + 0.0
    array([[-2. ,  2.4],
           [ 0. , -2. ]])
    """
    _check_vectors(vectors, "householder_gamma")
    handle = backend_of(vectors=vectors)
    wide = widen(vectors)
    gram = handle.matmul(handle.transpose(wide), wide)
    identity = _identity(gram.shape[0], gram)
    # Column sums of the identity count 1..r; comparing them selects what lies strictly above the diagonal.
    order = handle.cumsum(handle.sum(identity, axis=0), 0)
    above = order[:, None] < order[None, :]
    inverse = -(0.5 * identity + handle.where(above, gram, handle.zeros_like(gram)))
    # The matrix is triangular with a constant diagonal, so the general solver does no pivoting: it substitutes.
    return cast(handle.solve(inverse, identity), vectors.dtype)


def householder_product(vectors: Array) -> Array:
    r"""Form :math:`\prod_{i=1}^{r} (I - 2 u_i u_i^\top)` by multiplying the reflections out, for small d.

    Parameters
    ----------
    vectors : array, shape (d, r)
        Unit columns; their length is not checked.

    Returns
    -------
    array, shape (d, d)
        An orthogonal matrix with determinant (−1)^r. Reversing the columns inverts it. Same dtype as `vectors`.

    Raises
    ------
    ShapeError, ArrayError
        As `householder_gamma`.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (1), left-hand side.

    Examples
    --------
    >>> import numpy as np
    >>> householder_product(np.eye(2)[:, :1])
    array([[-1.,  0.],
           [ 0.,  1.]])
    """
    _check_vectors(vectors, "householder_product")
    handle = backend_of(vectors=vectors)
    wide = widen(vectors)
    product = _identity(wide.shape[0], wide)
    for column in range(wide.shape[1]):
        unit = wide[:, column : column + 1]
        product = product - 2.0 * handle.matmul(handle.matmul(product, unit), handle.transpose(unit))
    return cast(product, vectors.dtype)


@overload
def householder_experts(vectors: np.ndarray[Any, NumbersT]) -> TuckerExperts[np.ndarray[Any, NumbersT]]: ...


@overload
def householder_experts(vectors: ArrayT) -> TuckerExperts[ArrayT]: ...


def householder_experts(vectors: Array) -> TuckerExperts[Any]:
    r"""Write a product of reflections as Tucker experts with one group of one expert.

    With gates [[1]] and α = 1, ``householder_experts(U).apply(x, gates)`` is ``x @ householder_product(U)``.

    Parameters
    ----------
    vectors : array, shape (d, r)
        Unit columns; their length is not checked.

    Returns
    -------
    TuckerExperts
        k = t = p = 1, core Γ(U), expert factor [[1]], basis U.

    Raises
    ------
    ShapeError, ArrayError
        As `householder_gamma`.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (1) and (3).

    Examples
    --------
    >>> import numpy as np
    >>> experts = householder_experts(np.eye(3)[:, :2])
    >>> experts.apply(np.ones((1, 3)), np.ones((1, 1)))
    array([[-1., -1.,  1.]])
    """
    gamma = householder_gamma(vectors)
    return TuckerExperts(gamma[None, None], _identity(1, vectors), vectors)
