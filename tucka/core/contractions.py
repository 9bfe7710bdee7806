r"""Contractions of Tucker parts in which no d×d matrix is formed; `tucka.TuckerExperts` checks the arrays before.

The parts of :math:`\mathcal{G} \times_0 C \times_1 U \times_2 U` are named as in the paper: G, C, U.
"""

from __future__ import annotations

from tucka.backends import Array, backend_of, cast, widen
from tucka.core.modes import multi_mode_product

__all__ = ["apply_mixture", "mix_cores", "tucker_inner", "tucker_norm"]


def mix_cores(gates: Array, cores: Array, expert_factor: Array) -> Array:
    """Compute Σ_ijq γ_ij C_jq G_i[q], in at least float32 until the end.

    Parameters
    ----------
    gates : array, shape (..., k, t)
        γ.
    cores : array, shape (k, p, r, r)
        G.
    expert_factor : array, shape (t, p)
        C.

    Returns
    -------
    array, shape (..., r, r)
        One core for each set of gates.
    """
    weights = _core_weights(gates, expert_factor)
    return cast(backend_of(gates=gates).tensordot(weights, widen(cores), axes=([-2, -1], [0, 1])), gates.dtype)


def _core_weights(gates: Array, expert_factor: Array) -> Array:
    """Weigh the k·p slices of the cores: Σ_j γ_ij C_jq, (..., k, t) -> (..., k, p), in at least float32."""
    return backend_of(gates=gates).matmul(widen(gates), widen(expert_factor))


def apply_mixture(x: Array, gates: Array, parts: tuple[Array, Array, Array], alpha: float) -> Array:
    """Compute x + α ((x U) Ḡ) Uᵀ.

    Parameters
    ----------
    x : array, shape (..., d)
        Activations.
    gates : array, shape (k, t), (B, k, t), ...
        γ, with leading axes that are the first of x's.
    parts : (array, array, array)
        G, C, U of shapes (k, p, r, r), (t, p), (d, r).
    alpha : float
        The scale.

    Returns
    -------
    array, shape (..., d)
        The adapted activations.
    """
    cores, expert_factor, basis = parts
    handle = backend_of(x=x)
    inner = handle.matmul(x, basis)
    between = x.ndim - gates.ndim + 1  # axes of x's rows that share their gates
    if between:
        mixed = mix_cores(gates, cores, expert_factor)
        inner = handle.matmul(
            inner, handle.reshape(mixed, (*mixed.shape[:-2], *(1,) * (between - 1), *mixed.shape[-2:]))
        )
    else:
        # Each row has gates of its own: k·p·r numbers for a row, instead of an r×r core.
        weights = cast(_core_weights(gates, expert_factor), x.dtype)
        inner = handle.tensordot(weights[..., None] * inner[..., None, None, :], cores, axes=([-3, -2, -1], [0, 1, 2]))
    return cast(x + handle.matmul(alpha * inner, handle.transpose(basis)), x.dtype)


def tucker_norm(core: Array, expert_factor: Array, basis: Array) -> Array:
    """Compute the Frobenius norm of G ×_0 C ×_1 U ×_2 U through the triangular factors of C and U.

    An orthogonal factor does not change the norm, so only the triangles are multiplied with the core. The root of
    an inner product would lose half of the digits where columns of U cancel.

    Parameters
    ----------
    core, expert_factor, basis : array, shapes (p, r, r), (t, p), (d, r)
        G, C, U.

    Returns
    -------
    array, shape ()
        The norm, in the dtype of `core`.
    """
    handle = backend_of(core=core)
    outer, inner = handle.qr(widen(expert_factor))[1], handle.qr(widen(basis))[1]
    reduced = handle.reshape(multi_mode_product(widen(core), [outer, inner, inner]), (-1,))
    # Divided by the largest entry, no square overflows or vanishes. An all-zero tensor keeps a gradient without NaN.
    largest = handle.max(handle.abs(reduced))
    unit = reduced / handle.where(largest == 0, largest + 1, largest)
    squares = handle.sum(unit * unit)
    return cast(largest * handle.sqrt(handle.where(squares == 0, squares + 1, squares)), core.dtype)


def tucker_inner(parts: tuple[Array, Array, Array], others: tuple[Array, Array, Array]) -> Array:
    """Compute the sum of the products of all entries of two Tucker tensors of the same size (t, d, d).

    Parameters
    ----------
    parts : (array, array, array)
        G, C, U of shapes (p, r, r), (t, p), (d, r).
    others : (array, array, array)
        Those of the other tensor; the ranks p and r may be its own.

    Returns
    -------
    array, shape ()
        The inner product, in the dtype of the first core.
    """
    handle = backend_of(core=parts[0])
    core, expert_factor, basis = (widen(part) for part in parts)
    other_core, other_factor, other_basis = (widen(part) for part in others)
    outer = handle.matmul(handle.transpose(other_factor), expert_factor)
    inner = handle.matmul(handle.transpose(other_basis), basis)
    return cast(handle.sum(multi_mode_product(core, [outer, inner, inner]) * other_core), parts[0].dtype)
