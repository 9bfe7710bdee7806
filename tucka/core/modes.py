"""Mode-n products: a tensor times a matrix along one of its modes."""

from __future__ import annotations

from collections.abc import Sequence

from tucka.arrays import Array, backend_of
from tucka.checks import check_axes, check_mode, check_numeric, check_size
from tucka.errors import ConfigError, ShapeError, expected

__all__ = ["mode_product", "multi_mode_product", "times_matrices", "times_matrix"]


def times_matrix(tensor: Array, matrix: Array, mode: int) -> Array:
    """Compute X ×_n A for a mode from 0 on, unchecked."""
    handle = backend_of(tensor=tensor)
    product = handle.tensordot(tensor, matrix, axes=([mode], [1]))  # the new axis comes last
    last = tensor.ndim - 1
    # Not moveaxis: torch.func.vmap cannot batch it.
    return handle.transpose(product, [*range(mode), last, *range(mode, last)])


def times_matrices(tensor: Array, matrices: Sequence[Array], modes: Sequence[int] | None = None) -> Array:
    """Compute X ×_n A ×_m B ..., along the first modes in order unless others are given, unchecked."""
    for mode, matrix in enumerate(matrices):
        tensor = times_matrix(tensor, matrix, mode if modes is None else modes[mode])
    return tensor


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
    ShapeError, ConfigError
        If `matrix` is no matrix with ``matrix.shape[1] == tensor.shape[mode]``, or there is no such mode.
    ArrayError
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
    backend_of(tensor=tensor, matrix=matrix)
    check_numeric(where=where, tensor=tensor, matrix=matrix)
    mode = _check_mode_of("mode", mode, tensor, where=where)
    _check_matrix("matrix", matrix, tensor, mode, where=where)
    return times_matrix(tensor, matrix, mode)


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
    ShapeError, ArrayError
        As `mode_product`.
    ConfigError
        If there is no such mode, a mode is given twice, or `modes` and `matrices` differ in length.

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
    named = {f"matrices[{index}]": matrix for index, matrix in enumerate(matrices)}
    backend_of(tensor=tensor, **named)
    check_numeric(where=where, tensor=tensor, **named)
    given = list(range(len(named)) if modes is None else modes)
    if len(given) != len(named):
        raise ConfigError(expected("modes", f"one mode for each of {len(named)} matrices", given, where=where))
    counted = [_check_mode_of(f"modes[{index}]", mode, tensor, where=where) for index, mode in enumerate(given)]
    if len(set(counted)) != len(counted):
        raise ConfigError(expected("modes", "different modes", given, where=where))
    for (name, matrix), mode in zip(named.items(), counted, strict=True):
        _check_matrix(name, matrix, tensor, mode, where=where)
    return times_matrices(tensor, list(named.values()), counted)


def _check_mode_of(name: str, mode: int, tensor: Array, *, where: str) -> int:
    if tensor.ndim == 0:
        raise ShapeError(expected("tensor", "at least one mode", "shape ()", where=where))
    return check_mode(name, mode, tensor.ndim, where=where)


def _check_matrix(name: str, matrix: Array, tensor: Array, mode: int, *, where: str) -> None:
    check_axes(name, matrix, "J I", where=where)
    check_size(name, matrix, 1, tensor.shape[mode], matches=f"mode {mode} of tensor", where=where)
