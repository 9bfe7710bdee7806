"""The nearest Tucker tensor of a stack X (k, t, d, d) with one basis U on both matrix modes, in NumPy's float64.

For orthonormal C and U the best cores are Cᵀ Uᵀ X U, so the error is a function of C and U alone. Given U, the best C
is a singular value decomposition. U is improved step by step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from tucka.arrays import Values
from tucka.core.fitting.tensorly_tucker import tensorly_factors

__all__ = ["Nearest", "nearest"]

_MAX_SWEEPS = 100
_LEAST_GAIN = 1e-6  # of the error, in one sweep
_TENSORLY_SWEEPS = 4


@dataclass(frozen=True)
class Nearest:
    """What `nearest` found."""

    cores: Values  # (k, p, r, r), the best ones for the two factors
    factor: Values  # C (t, p), with columns that are orthonormal or zero
    basis: Values  # U (d, r), with orthonormal columns
    error: float  # Frobenius norm of the difference from the stack
    norm: float  # of the stack
    sweeps: int  # updates made, those for smaller ranks included


@dataclass(frozen=True)
class _Fit:
    """An approximation on the way: U, its best C, X U (which the next update needs again), error and updates made."""

    basis: Values
    factor: Values
    images: Values
    error: float
    sweeps: int


def nearest(
    stack: Values,
    rank: int,
    expert_rank: int,
    *,
    precision: float,
    progress: Callable[[int, int], object] | None = None,
) -> Nearest:
    """Approximate a stack whose largest entry is around 1; an error of `precision`, relative to its norm, is none."""
    experts, width = stack.shape[1:3]
    norm = float(np.linalg.norm(stack))
    if norm == 0.0:
        return _completed(stack, np.eye(experts, min(expert_rank, experts)), np.eye(width, rank), expert_rank, 0)
    axes, weights = _principal_axes(stack)
    kept = _numerical_rank(weights, precision)
    small = _inner(stack, axes[:, :kept])
    fit = _grow(small, weights[:kept], min(rank, kept), min(expert_rank, experts), precision * norm, progress)
    basis = np.concatenate([axes[:, :kept] @ fit.basis, axes[:, kept:rank]], axis=1)
    return _completed(stack, fit.factor, basis, expert_rank, fit.sweeps)


def _completed(stack: Values, factor: Values, basis: Values, expert_rank: int, sweeps: int) -> Nearest:
    """Add zero columns to the expert factor, compute the cores and measure the error."""
    factor = np.pad(factor, ((0, 0), (0, expert_rank - factor.shape[1])))
    cores = _mixed(_inner(stack, basis), factor)
    fitted = basis @ np.einsum("tp,kprs->ktrs", factor, cores) @ basis.T
    error, norm = float(np.linalg.norm(stack - fitted)), float(np.linalg.norm(stack))
    return Nearest(cores, factor, basis, error, norm, sweeps)


def _inner(stack: Values, basis: Values) -> Values:
    """Compute Uᵀ X U for each matrix."""
    return np.asarray(basis.T @ (stack @ basis))


def _mixed(stack: Values, factor: Values) -> Values:
    """Multiply the expert mode by Cᵀ: (k, t, ., .) to (k, p, ., .)."""
    return np.moveaxis(np.tensordot(factor, stack, axes=([0], [1])), 0, 1)


def _principal_axes(stack: Values) -> tuple[Values, Values]:
    """Return the orthonormal axes along which rows and columns together spread, and how far, in falling order."""
    width = stack.shape[-1]
    vectors = np.concatenate([stack.reshape(-1, width), stack.swapaxes(-1, -2).reshape(-1, width)])
    _, weights, rows = np.linalg.svd(np.linalg.qr(vectors, mode="r"))
    return rows.T, weights


def _numerical_rank(weights: Values, precision: float) -> int:
    """Count the leading weights, leaving out a tail that is below the precision as a whole."""
    tails = np.sqrt(np.cumsum(weights[::-1] ** 2))[::-1]
    return int((tails > precision / 4 * tails[0]).sum())


def _grow(
    stack: Values,
    weights: Values,
    rank: int,
    expert_rank: int,
    floor: float,
    progress: Callable[[int, int], object] | None,
) -> _Fit:
    """Fit all smaller ranks on the way to (`rank`, `expert_rank`), in the coordinates of the stack's principal axes."""
    # Alternating updates end in a local optimum, so two ranks fitted on their own could come out in the wrong order.
    # Here the fit of (r, p) starts from the best of the fits of (r - 1, p) and (r, p - 1) and of three starts of its
    # own, and no update makes it worse. Since the fit of (r, p) is the same whatever rank was asked for, errors are
    # ordered for any two calls.
    width, symmetric = len(weights), _symmetric_axes(stack)
    fits: list[_Fit] = []
    sweeps = 0
    for experts in range(1, expert_rank + 1):
        below, fits = fits, []
        for size in range(1, rank + 1):
            smaller = [fit.basis for fit in below[size - 1 : size]]
            smaller += [_extended(fit.basis, weights) for fit in fits[-1:]]
            starts = [_with_factor(stack, basis, experts) for basis in smaller]
            # An exact fit stays exact in all larger ranks, and all bases of the full rank are alike.
            if not starts or (size < width and min(map(_error, starts)) > floor):
                own = [np.eye(width, size)]
                own += [symmetric[:, :size], _tensorly_basis(stack, size, experts)] if size < width else []
                starts += [_with_factor(stack, basis, experts) for basis in own]
            best = min(starts, key=_error)
            fits.append(_refined(stack, best, experts, floor) if size < width else best)
            sweeps += fits[-1].sweeps
            if progress is not None:
                progress((experts - 1) * rank + size, expert_rank * rank)
    return replace(fits[-1], sweeps=sweeps)


def _error(fit: _Fit) -> float:
    return fit.error


def _extended(basis: Values, weights: Values) -> Values:
    """Add the principal axis that is heaviest outside the basis; in these coordinates the axes are unit vectors."""
    outside = 1.0 - np.sum(basis * basis, axis=1)
    # What rounding leaves of a heavy axis inside must not outweigh a light axis outside.
    outside[outside < 1e-12] = 0.0
    chosen = int((weights * np.sqrt(outside)).argmax())
    added = np.eye(len(weights), 1, -chosen) - basis @ basis[[chosen]].T
    return np.linalg.qr(np.concatenate([basis, added], axis=1))[0]


def _symmetric_axes(stack: Values) -> Values:
    """Return the eigenvectors of the symmetric part of the stack's dominant matrix, heaviest first."""
    # Principal axes cannot tell an eigenvalue from its negative; for one symmetric matrix these axes are the solution.
    width = stack.shape[-1]
    dominant = np.linalg.svd(stack.reshape(-1, width * width), full_matrices=False)[2][0].reshape(width, width)
    values, vectors = np.linalg.eigh(dominant + dominant.T)
    return np.asarray(vectors[:, np.argsort(-np.abs(values), kind="stable")])


def _tensorly_basis(stack: Values, size: int, expert_rank: int) -> Values:
    """Start from TensorLy's decomposition, which has two bases, by one update that makes them one."""
    # It sees the leading principal axes only: enough for a start, and cheap.
    leading = stack[:, :, : 4 * size, : 4 * size]
    basis = np.eye(leading.shape[-1], size)
    factor = _with_factor(leading, basis, expert_rank).factor
    factor, left, right = tensorly_factors(leading, [factor, basis, basis], sweeps=_TENSORLY_SWEEPS)
    rows, columns = stack[..., : len(right)], stack[:, :, : len(left)].swapaxes(-1, -2)
    return _leading(_pulls(factor, rows @ right, columns @ left), size)


def _with_factor(stack: Values, basis: Values, expert_rank: int, sweeps: int = 0) -> _Fit:
    """Give a basis its best expert factor, the leading left singular vectors of the projected expert unfolding."""
    images = stack @ basis
    inner = np.moveaxis(basis.T @ images, 1, 0)
    unfolded = inner.reshape(inner.shape[0], -1)
    factor = np.linalg.svd(unfolded, full_matrices=False)[0][:, :expert_rank]
    fitted = factor @ (factor.T @ unfolded)
    total, captured = float(np.linalg.norm(stack)), float(np.linalg.norm(fitted))
    error = math.sqrt(max(total**2 - captured**2, 0.0))
    if error < 0.01 * total:
        # The difference of squares has lost digits, all of them below the root of the precision.
        error = float(np.linalg.norm(stack - basis @ np.moveaxis(fitted.reshape(inner.shape), 0, 1) @ basis.T))
    return _Fit(basis, factor, images, error, sweeps)


def _refined(stack: Values, fit: _Fit, expert_rank: int, floor: float) -> _Fit:
    """Update basis and expert factor in turn until the error hardly falls; it never rises."""
    while fit.sweeps < _MAX_SWEEPS and fit.error > floor:
        better = _step(stack, fit, expert_rank)
        if better is None:
            break
        gain = fit.error - better.error
        fit = better
        if gain <= _LEAST_GAIN * fit.error:
            break
    return fit


def _step(stack: Values, fit: _Fit, expert_rank: int) -> _Fit | None:
    """Take the longest of some steps that lowers the error, or return None at a stationary point."""
    # With Y = Cᵀ X and P = U Uᵀ the error falls as f(P) = Σ tr(Y P Yᵀ P) rises. The leading eigenvectors of
    # S = Σ (Y P Yᵀ + Yᵀ P Y) + 2 τ P maximise the linearisation of f(P) + τ ‖P‖², whose second term is the same for all
    # projections. From τ = ‖Y‖² on this function is convex, so it rises by at least what its linearisation does: the
    # last step cannot raise the error. The first, without a shift, is the longest and mostly a good one.
    pulls = _pulls(fit.factor, fit.images, stack.swapaxes(-1, -2) @ fit.basis)
    bound = 2.0 * float(np.linalg.norm(stack)) ** 2
    for share in (0.0, 1 / 64, 1 / 16, 1 / 4, 1.0):
        columns = [pulls, math.sqrt(share * bound) * fit.basis] if share else [pulls]
        basis = _leading(np.concatenate(columns, axis=1), fit.basis.shape[1])
        candidate = _with_factor(stack, basis, expert_rank, fit.sweeps + 1)
        if candidate.error < fit.error:
            return candidate
    return None


def _pulls(factor: Values, *images: Values) -> Values:
    """Return the columns of all Y V and Yᵀ U side by side: a square root of the matrix S of `_step`."""
    columns = [np.moveaxis(_mixed(image, factor), 2, 0).reshape(image.shape[2], -1) for image in images]
    return np.concatenate(columns, axis=1)


def _leading(columns: Values, count: int) -> Values:
    # Singular vectors of the columns and not eigenvectors of S, which would lose half of the digits.
    return np.asarray(np.linalg.svd(columns, full_matrices=False)[0][:, :count])
