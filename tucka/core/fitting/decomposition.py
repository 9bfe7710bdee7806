"""Tucker experts from given matrices, and smaller Tucker experts from larger ones.

Both minimise Σ_i ‖X_i − G_i ×_0 C ×_1 U ×_2 U‖², with one U on both sides, on the host in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from tucka.arrays import Array, Values, array_like, finite_values, floating_backend, host_values
from tucka.checks import check_axes, check_count, check_size
from tucka.core.experts import ArrayT, NumbersT, TuckerExperts
from tucka.core.fitting.symmetric_tucker import Nearest, nearest
from tucka.errors import ArrayError, ConfigError, ShapeError, expected

__all__ = ["FittedExperts", "compress", "fit_experts"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class FittedExperts(TuckerExperts[ArrayT]):
    """Tucker experts that approximate something, and how well.

    Parameters
    ----------
    cores : array, shape (k, p, r, r)
    expert_factor : array, shape (t, p)
    basis : array, shape (d, r)
        As in `TuckerExperts`. The columns of C are orthonormal or zero, those of U are orthonormal.
    residual : float
        Frobenius norm of the error over all groups, before the arrays are rounded to their dtype. NaN where unknown,
        as in copies that JAX's transformations make.
    relative_residual : float
        The same divided by the norm of what was approximated; 0 if that is zero.
    iterations : int
        Updates made, those for the smaller ranks on the way included.

    Raises
    ------
    ShapeError, ArrayError
        As `TuckerExperts`.

    Examples
    --------
    >>> fit_experts(np.eye(3)[None], rank=2, expert_rank=1).relative_residual
    0.577...
    """

    residual: float = math.nan
    relative_residual: float = math.nan
    iterations: int = 0

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, relative_residual={self.relative_residual:.3g})"


# Arrays of NumPy may have types that count their axes, which the parts do not share.
@overload
def fit_experts(
    stack: np.ndarray[Any, NumbersT],
    *,
    rank: int,
    expert_rank: int,
    progress: Callable[[int, int], object] | None = None,
) -> FittedExperts[np.ndarray[Any, NumbersT]]: ...


@overload
def fit_experts(
    stack: ArrayT, *, rank: int, expert_rank: int, progress: Callable[[int, int], object] | None = None
) -> FittedExperts[ArrayT]: ...


def fit_experts(
    stack: Array, *, rank: int, expert_rank: int, progress: Callable[[int, int], object] | None = None
) -> FittedExperts[Any]:
    r"""Find the Tucker experts nearest to given matrices, in the Frobenius norm.

    Parameters
    ----------
    stack : array, shape (t, d, d) or (k, t, d, d)
        The experts of one group, or of k groups.
    rank : int
        The multilinear rank r of the two matrix modes, at most d.
    expert_rank : int
        The multilinear rank p of the expert mode. Columns beyond the t that can be of use are zero.
    progress : callable, optional
        Called after each fit of smaller ranks, with how many are done and how many there are in all.

    Returns
    -------
    FittedExperts
        Experts of backend, dtype and device of `stack`, not connected to it for gradients, with their `residual`. They
        equal the stack, to rounding, if the ranks suffice. The residual never increases with either rank, up to
        rounding.

    Raises
    ------
    ShapeError
        If `stack` does not have such axes.
    ConfigError
        If a rank is outside its rule, an entry is not finite, a core is too large for the dtype, or `progress` is no
        function.
    ArrayError
        If `stack` is no real floating-point array.

    Notes
    -----
    The problem has local optima and no closed solution. All smaller ranks are fitted on the way, each from the best of
    its two smaller neighbours, the truncated higher-order singular value decomposition, TensorLy's ``partial_tucker``
    and the dominant matrix's eigenvectors, by updates that never increase the error. So time grows like r·p times that
    of one fit. The result depends on nothing but the arguments.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (5), for given tensors.

    Examples
    --------
    >>> import numpy as np
    >>> rotation = np.array([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    >>> fit = fit_experts(rotation, rank=2, expert_rank=1)
    >>> fit
    FittedExperts(cores=(1, 1, 2, 2), expert_factor=(1, 1), basis=(3, 2), relative_residual=...)
    >>> bool(fit.residual < 1e-12)
    True
    """
    where = "fit_experts"
    floating_backend(where=where, stack=stack)
    if stack.ndim not in (3, 4):
        rule = "axes (t, d, d) or (k, t, d, d)"
        raise ShapeError(expected("stack", rule, f"shape {tuple(stack.shape)}", where=where))
    check_axes("stack", stack, "k t d d" if stack.ndim == 4 else "t d d", where=where)
    check_size("stack", stack, -1, stack.shape[-2], matches="the axis before it", where=where)
    rank = _rank("rank", rank, stack.shape[-1], "the width of the matrices", where)
    expert_rank = check_count("expert_rank", expert_rank, where=where)
    if progress is not None and not callable(progress):
        raise ConfigError(expected("progress", "a function of two counts, or None", repr(progress), where=where))
    unit, scale = _unit("stack", stack, where)
    unit = unit.reshape(-1, *unit.shape[-3:])
    found = nearest(unit, rank, expert_rank, precision=_precision(stack), progress=progress)
    return _fitted(found, None, scale, stack, where)


def compress(experts: TuckerExperts[ArrayT], *, rank: int, expert_rank: int) -> FittedExperts[ArrayT]:
    r"""Find the nearest Tucker experts of smaller ranks, without forming a d×d matrix.

    With :math:`U = Q R` and :math:`C = Q' R'`, orthonormal Q and Q' change no distance. So what is fitted is the small
    tensor :math:`\mathcal{G}_i \times_0 R' \times_1 R \times_2 R`, and Q and Q' are multiplied back.

    Parameters
    ----------
    experts : TuckerExperts
        Any, of any width.
    rank : int
        The new multilinear rank of the two matrix modes, at most the old one and at most d.
    expert_rank : int
        The new multilinear rank of the expert mode, at most the old one.

    Returns
    -------
    FittedExperts
        What `fit_experts` would find for the full tensors, with `residual` the distance from `experts`.

    Raises
    ------
    ConfigError
        If a rank is outside its rule, an entry is not finite, or a core is too large for the dtype.
    ArrayError
        If `experts` is no `TuckerExperts`.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (5), for given tensors.

    Examples
    --------
    >>> import numpy as np
    >>> large = TuckerExperts(np.ones((2, 2, 4, 4)), np.ones((3, 2)), np.eye(1000, 4))
    >>> compress(large, rank=1, expert_rank=1).relative_residual < 1e-12
    True
    """
    where = "compress"
    if not isinstance(experts, TuckerExperts):
        raise ArrayError(expected("experts", "TuckerExperts", type(experts).__qualname__, where=where))
    width, old_rank = experts.basis.shape
    rank = _rank("rank", rank, min(old_rank, width), "what the experts have", where)
    expert_rank = _rank("expert_rank", expert_rank, experts.expert_factor.shape[1], "what the experts have", where)
    cores, core_scale = _unit("cores", experts.cores, where)
    factor, factor_scale = _unit("expert_factor", experts.expert_factor, where)
    basis, basis_scale = _unit("basis", experts.basis, where)
    outer, outer_triangle = np.linalg.qr(factor)
    inner, inner_triangle = np.linalg.qr(basis)
    small = inner_triangle @ np.einsum("tp,kprs->ktrs", outer_triangle, cores) @ inner_triangle.T
    largest = float(np.abs(small).max()) or 1.0
    found = nearest(small / largest, rank, expert_rank, precision=_precision(experts.cores))
    scale = largest * core_scale * factor_scale * basis_scale**2
    return _fitted(found, (outer, inner), scale, experts.cores, where)


def _rank(name: str, value: int, most: int, owner: str, where: str) -> int:
    """Check a rank against the largest that makes sense."""
    rank = check_count(name, value, where=where)
    if rank > most:
        raise ConfigError(expected(name, f"a whole number from 1 to {most}, {owner}", rank, where=where))
    return rank


def _unit(name: str, array: Array, where: str) -> tuple[Values, float]:
    """Copy an array to the host and divide it by its largest entry, so that no square overflows or vanishes."""
    values = finite_values(name, array, where=where)
    largest = float(np.abs(values).max()) or 1.0
    return values / largest, largest


def _precision(array: Array) -> float:
    """Return the relative error that counts as none: some roundings of float64, or one of the input's own dtype."""
    double = str(array.dtype).rpartition(".")[2] == "float64"
    return 2.0**-46 if double else 2.0**-22


def _fitted(
    found: Nearest,
    frames: tuple[Values, Values] | None,
    scale: float,
    like: Array,
    where: str,
) -> FittedExperts[Any]:
    """Carry what was found back to the coordinates, the size and the backend of the input."""
    factor, basis = (
        (found.factor, found.basis) if frames is None else (frames[0] @ found.factor, frames[1] @ found.basis)
    )
    with np.errstate(over="ignore"):
        cores, expert_factor, basis = (array_like(part, like) for part in (found.cores * scale, factor, basis))
    if not np.isfinite(host_values(cores)).all():
        cure = "Convert the input to a wider dtype, or scale it down"
        raise ConfigError(expected("cores", f"numbers that {like.dtype} holds", "an overflow", where=where, cure=cure))
    return FittedExperts(
        cores,
        expert_factor,
        basis,
        residual=found.error * scale,
        relative_residual=found.error / (found.norm or 1.0),
        iterations=found.sweeps,
    )
