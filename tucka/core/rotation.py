"""A rotation inside the span of a basis, which all experts have in common."""

from __future__ import annotations

import math

from tucka.arrays import Array, backend_of, cast, floating_backend, placement, widen
from tucka.checks import check_axes, check_finite

__all__ = ["rotation_core", "rotation_strength"]


def rotation_core(basis: Array, *, strength: float | None = None) -> Array:
    r"""Compute the core B of a rotation :math:`I + U B U^\top` that turns half of the columns of U to the other half.

    With :math:`S = c \sum_i (e_i e_{r'+i}^\top - e_{r'+i} e_i^\top)`, where column i of the first
    :math:`r' = \lceil r/2 \rceil` is paired with column r' + i, it is the Cayley transform of
    :math:`U S U^\top`: :math:`B = (I - \tfrac{1}{2} S\, U^\top U)^{-1} S`. Where the columns are orthogonal, a pair
    v, w is a plane that turns by :math:`2 \arctan(\tfrac{c}{2} \|v\| \|w\|)`. With ``factor_norm="rotation"``, the
    core of every expert is B and what the expert has of its own, divided by r.

    Parameters
    ----------
    basis : array, shape (d, r)
        U. Any columns: the result is a rotation whatever their lengths and angles.
    strength : float, optional
        c; :math:`\sqrt{8/r}` if not given, which suits a layer of typical weights. An adapter keeps that of each layer
        in a buffer, ``strength``.

    Returns
    -------
    array, shape (r, r)
        In the dtype of `basis`. With a zero second half, :math:`I + U B U^\top` is the identity.

    Raises
    ------
    ShapeError
        If `basis` is not two-dimensional.
    ArrayError
        If it is no array of a known library, or not floating.
    ConfigError
        If `strength` is no finite number.

    See Also
    --------
    householder_gamma : The same for a product of reflections, which HRA trains.

    References
    ----------
    .. [1] tucka's own: a core in Eq. (3) of arXiv:2511.06859, as Γ in its Eq. (2) is one.

    Examples
    --------
    >>> import numpy as np
    >>> basis = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> np.eye(3) + basis @ rotation_core(basis) @ basis.T
    array([[ 0.,  1.,  0.],
           [-1.,  0.,  0.],
           [ 0.,  0.,  1.]])
    """
    handle = floating_backend(where="rotation_core", basis=basis)
    check_axes("basis", basis, "d r", where="rotation_core")
    wide = widen(basis)
    rank = wide.shape[1]
    given = rotation_strength(rank) if strength is None else check_finite("strength", strength, where="rotation_core")
    pairs = given * _pairs(rank, wide)  # S
    gram = handle.matmul(handle.transpose(wide), wide)
    identity = handle.eye(rank, **placement(wide))
    product = 0.5 * handle.matmul(pairs, gram)
    core = handle.solve(identity - product, pairs)
    # The same once more, B = S + S UᵀU B / 2: its first half is then exact where the second half of U is zero.
    return cast(pairs + handle.matmul(product, core), basis.dtype)


def _pairs(rank: int, like: Array) -> Array:
    """Return S / c (r, r): 1 where a column of the first half meets its partner, −1 the other way round."""
    handle, first = backend_of(like=like), rank - rank // 2
    identity = handle.eye(rank, **placement(like))
    shifted = handle.concatenate([identity[first:], handle.zeros_like(identity[:first])], axis=0)  # e_i to e_{r'+i}
    return shifted - handle.transpose(shifted)


def rotation_strength(rank: int) -> float:
    """Return c for a layer of typical weights: a step of training then turns inputs much alike at all ranks."""
    return math.sqrt(8 / rank)
