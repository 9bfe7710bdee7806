"""Mode-n products: a tensor times a matrix along one of its modes."""

from __future__ import annotations

from collections.abc import Sequence

from tucka.backends import Array, backend_of
from tucka.core.checks import check_axes, check_mode, check_numeric, check_size
from tucka.errors import ConfigError, ShapeError, expected

__all__ = ["mode_product", "multi_mode_product"]


def mode_product(tensor: Array, matrix: Array, *, mode: int) -> Array:
    r"""Multiply a tensor by a matrix along one mode.

    With :math:`\mathcal{Y} = \mathcal{X} \times_n A`, entry
    :math:`\mathcal{Y}_{\ldots j \ldots} = \sum_{i_n} \mathcal{X}_{\ldots i_n \ldots} A_{j i_n}`.

    Parameters
    ----------
    tensor : array, shape (I_0, ..., I_{N-1})
        Any number of modes from one on.
    matrix : array, shape (J, I_mode)
        Of the same backend and dtype.
    mode : int
        Counted from 0; negative values count from the end.

    Returns
    -------
    array, shape (I_0, ..., J, ..., I_{N-1})
        Same dtype and device as `tensor`. Neither input is modified.

    Raises
    ------
    ShapeError
        If `tensor` has no modes, `matrix` is not a matrix, or ``matrix.shape[1] != tensor.shape[mode]``.
    ConfigError
        If there is no such mode.
    TypeError
        If the arrays are of different backends or dtypes, or hold no numbers.

    References
    ----------
    .. [1] arXiv:2511.06859, the definition below Eq. (3), where modes count from 1.

    Examples
    --------
    >>> import numpy as np
    >>> mode_product(np.ones((2, 3)), np.ones((5, 3)), mode=1).shape
    (2, 5)
    """
    where = "mode_product"
    handle = backend_of(tensor=tensor, matrix=matrix)
    check_numeric(where=where, tensor=tensor, matrix=matrix)
    if tensor.ndim == 0:
        raise ShapeError(expected("tensor", "at least one mode", "shape ()", where=where))
    mode = check_mode("mode", mode, tensor.ndim, where=where)
    if matrix.ndim != 2:
        raise ShapeError(expected("matrix", "axes (J, I)", f"shape {tuple(matrix.shape)}", where=where))
    check_size("matrix", matrix, 1, tensor.shape[mode], matches=f"mode {mode} of tensor", where=where)
    return handle.moveaxis(handle.tensordot(tensor, matrix, axes=([mode], [1])), -1, mode)


def multi_mode_product(tensor: Array, matrices: Sequence[Array], *, modes: Sequence[int] | None = None) -> Array:
    r"""Multiply a tensor by several matrices, each along a mode of its own.

    The order does not matter, since products along different modes commute.

    Parameters
    ----------
    tensor : array, shape (I_0, ..., I_{N-1})
        Any number of modes from one on.
    matrices : sequence of array
        ``matrices[m]`` has shape (J_m, I_{modes[m]}).
    modes : sequence of int, optional
        All different. The first modes, in order, if None.

    Returns
    -------
    array
        `tensor` with the size of each of `modes` replaced.

    Raises
    ------
    ShapeError
        If a matrix does not fit its mode.
    ConfigError
        If there is no such mode, a mode is given twice, or `modes` and `matrices` differ in length.
    TypeError
        If the arrays are of different backends or dtypes.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (3), which is this with the modes 0, 1, 2.

    Examples
    --------
    >>> import numpy as np
    >>> core, factor, basis = np.ones((2, 3, 3)), np.ones((4, 2)), np.ones((6, 3))
    >>> multi_mode_product(core, [factor, basis, basis]).shape
    (4, 6, 6)
    """
    where = "multi_mode_product"
    backend_of(tensor=tensor, **{f"matrices[{index}]": matrix for index, matrix in enumerate(matrices)})
    given = range(len(matrices)) if modes is None else modes
    if len(given) != len(matrices):
        rule = f"one mode for each of {len(matrices)} matrices"
        raise ConfigError(expected("modes", rule, list(given), where=where))
    counted = [check_mode("modes", mode, tensor.ndim, where=where) for mode in given]
    if len(set(counted)) != len(counted):
        raise ConfigError(expected("modes", "different modes", list(given), where=where))
    for index, (matrix, mode) in enumerate(zip(matrices, counted, strict=True)):
        check_axes(f"matrices[{index}]", matrix, "J I", where=where)
        check_size(f"matrices[{index}]", matrix, 1, tensor.shape[mode], matches=f"mode {mode} of tensor", where=where)
    for matrix, mode in zip(matrices, counted, strict=True):
        tensor = mode_product(tensor, matrix, mode=mode)
    return tensor
