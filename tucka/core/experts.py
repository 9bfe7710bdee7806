"""Tucker experts: groups of d×d experts held as small cores, one expert factor and one basis."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tucka.arrays import Array, backend_of, cast, widen
from tucka.arrays.pytrees import register_pytree
from tucka.checks import check_finite, check_floating, check_mode, check_shapes
from tucka.core.modes import multi_mode_product
from tucka.errors import ShapeError, expected

if TYPE_CHECKING:
    from tensorly.tucker_tensor import TuckerTensor
else:
    TuckerTensor = Any

__all__ = ["TuckerExperts", "TuckerParts", "apply_mixture", "mix_cores", "tucker_inner", "tucker_norm"]

_FIELDS = ("cores", "expert_factor", "basis")


@dataclass(frozen=True, eq=False, repr=False)
class TuckerParts:
    """A frozen record of arrays that fit each other, for copying, pickling and JAX's transformations.

    Parameters
    ----------
    cores : array, shape (k, p, r, r)
        The core tensors of the groups.
    expert_factor : array, shape (t, p)
        The factor of the expert mode (C).
    basis : array, shape (d, r)
        The factor of both weight modes (U).

    Raises
    ------
    ShapeError
        If the shapes do not fit each other.
    TypeError
        If the arrays are not real floating-point arrays of one backend and dtype.

    Examples
    --------
    >>> import numpy as np
    >>> TuckerParts(np.ones((3, 2, 4, 4)), np.ones((5, 2)), np.ones((6, 4)))
    TuckerParts(cores=(3, 2, 4, 4), expert_factor=(5, 2), basis=(6, 4))
    """

    cores: Array
    expert_factor: Array
    basis: Array

    def __post_init__(self) -> None:
        self.check_parts(where=type(self).__name__)
        register_pytree(type(self), _FIELDS)

    def __setstate__(self, state: dict[str, Array]) -> None:
        # A copy, or an object from a file: its arrays were checked when they were put together.
        self.__dict__.update(state)
        register_pytree(type(self), _FIELDS)

    def __repr__(self) -> str:
        # JAX puts placeholders without a shape in the place of arrays.
        shapes = (f"{name}={tuple(getattr(getattr(self, name), 'shape', ()))}" for name in _FIELDS)
        return f"{type(self).__name__}({', '.join(shapes)})"

    @property
    def groups(self) -> int:
        """Number of groups (k).

        Returns
        -------
        int
            The size of axis 0 of the cores.
        """
        return int(self.cores.shape[0])

    @property
    def experts_per_group(self) -> int:
        """Number of experts in one group (t).

        Returns
        -------
        int
            The size of axis 0 of the expert factor.
        """
        return int(self.expert_factor.shape[0])

    @property
    def n_parameters(self) -> int:
        """Numbers held: t·p + k·p·r² + d·r.

        Returns
        -------
        int
            The sum of the three arrays' sizes.
        """
        return sum(math.prod(array.shape) for array in (self.cores, self.expert_factor, self.basis))

    def check_parts(self, *, where: str, **operands: tuple[Array, str]) -> None:
        """Check backend, dtype and shapes of the parts, and of operands against them.

        Parameters
        ----------
        where : str
            The caller, for the message.
        **operands : (array, str)
            Other arrays and their axes, as in `tucka.checks.check_shapes`; the parts have the axes k p r r, t p
            and d r.

        Raises
        ------
        ShapeError
            If the shapes do not fit each other.
        TypeError
            If the arrays are not real floating-point arrays of one backend and dtype.

        Examples
        --------
        >>> import numpy as np
        >>> parts = TuckerParts(np.ones((3, 2, 4, 4)), np.ones((5, 2)), np.ones((6, 4)))
        >>> parts.check_parts(x=(np.ones((9, 6)), "... d"), where="example")
        """
        described = {"cores": (self.cores, "k p r r"), "expert_factor": (self.expert_factor, "t p")}
        described |= {"basis": (self.basis, "d r"), **operands}
        arrays = {name: array for name, (array, _) in described.items()}
        backend_of(**arrays)
        check_floating(where=where, **arrays)
        check_shapes(where=where, **described)


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


@dataclass(frozen=True, eq=False, repr=False)
class TuckerExperts(TuckerParts):
    r"""k groups of t experts, :math:`\mathcal{T}_i = \mathcal{G}_i \times_0 C \times_1 U \times_2 U`.

    Expert j of group i is the matrix :math:`\mathcal{T}_i[j] = U \left(\sum_q C_{jq}\, \mathcal{G}_i[q]\right) U^\top`.
    Only :meth:`to_tensor` and :meth:`expert` ever form a d×d matrix.

    Parameters
    ----------
    cores : array, shape (k, p, r, r)
        The core tensors of the groups.
    expert_factor : array, shape (t, p)
        The factor of the expert mode (C).
    basis : array, shape (d, r)
        The factor of both weight modes (U).

    Raises
    ------
    ShapeError
        If the shapes do not fit each other.
    TypeError
        If the arrays are not real floating-point arrays of one backend and dtype.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (3) and (5), where modes count from 1.

    Examples
    --------
    >>> import numpy as np
    >>> experts = TuckerExperts(np.ones((3, 2, 4, 4)), np.ones((5, 2)), np.ones((6, 4)))
    >>> experts.to_tensor(0).shape, experts.n_parameters
    ((5, 6, 6), 130)
    """

    def to_tensor(self, group: int) -> Array:
        """Form all experts of one group.

        Parameters
        ----------
        group : int
            Counted from 0; negative values count from the end.

        Returns
        -------
        array, shape (t, d, d)
            Slice j is expert j.

        Raises
        ------
        ConfigError
            If there is no such group.

        Examples
        --------
        >>> import numpy as np
        >>> TuckerExperts(np.full((1, 1, 1, 1), 3.0), np.ones((1, 1)), np.ones((2, 1))).to_tensor(0)
        array([[[3., 3.],
                [3., 3.]]])
        """
        group = check_mode("group", group, self.groups, where="TuckerExperts.to_tensor")
        return multi_mode_product(self.cores[group], [self.expert_factor, self.basis, self.basis])

    def expert(self, group: int, index: int) -> Array:
        """Form one expert.

        Parameters
        ----------
        group, index : int
            Counted from 0; negative values count from the end.

        Returns
        -------
        array, shape (d, d)
            The matrix that the paper calls T_group[index].

        Raises
        ------
        ConfigError
            If there is no such group or expert.

        Examples
        --------
        >>> import numpy as np
        >>> TuckerExperts(np.full((1, 1, 1, 1), 3.0), np.array([[1.0], [2.0]]), np.ones((2, 1))).expert(0, 1)
        array([[6., 6.],
               [6., 6.]])
        """
        where = "TuckerExperts.expert"
        group = check_mode("group", group, self.groups, where=where)
        index = check_mode("index", index, self.experts_per_group, where=where)
        handle = backend_of(cores=self.cores)
        core = handle.tensordot(self.expert_factor[index], self.cores[group], axes=([0], [0]))
        expert = handle.matmul(handle.matmul(self.basis, core), handle.transpose(self.basis))
        return cast(expert, self.basis.dtype)  # a matmul of NumPy's own returns bfloat16 as float32

    def mix(self, gates: Array) -> Array:
        r"""Mix the cores of all experts: :math:`\bar G = \sum_{ijq} \gamma_{ij} C_{jq} \mathcal{G}_i[q]`.

        Parameters
        ----------
        gates : array, shape (..., k, t)
            Zero outside the chosen group, when they come from `tucka.select_gates`; any numbers are allowed.

        Returns
        -------
        array, shape (..., r, r)
            One small core for each set of gates.

        Raises
        ------
        ShapeError
            If the last two axes are not (k, t).
        TypeError
            If backend or dtype differ from the experts'.

        Examples
        --------
        >>> import numpy as np
        >>> experts = TuckerExperts(np.full((2, 1, 1, 1), 3.0), np.ones((2, 1)), np.ones((2, 1)))
        >>> experts.mix(np.array([[0.0, 0.0], [0.25, 0.5]]))
        array([[2.25]])
        """
        self.check_parts(gates=(gates, "... k t"), where="TuckerExperts.mix")
        return mix_cores(gates, self.cores, self.expert_factor)

    def apply(self, x: Array, gates: Array, *, alpha: float = 1.0) -> Array:
        r"""Adapt activations: :math:`x' = x + \alpha\, ((x U) \bar G)\, U^\top`, without any d×d matrix.

        Parameters
        ----------
        x : array, shape (..., d)
            Activations, one in each row.
        gates : array, shape (k, t), (B, k, t), (B, S, k, t), ...
            Their leading axes align with those of `x` from the left: (k, t) serves all of `x`, (B, k, t) has one set
            for each entry of the first axis of `x`, and so on.
        alpha : float
            The scale of the update.

        Returns
        -------
        array, shape (..., d)
            What the frozen layer W is then applied to.

        Raises
        ------
        ShapeError
            If `x` is not d wide or the leading axes of `gates` are not those of `x`.
        TypeError
            If backend or dtype differ from the experts'.

        References
        ----------
        .. [1] arXiv:2511.06859, Eq. (9), without its W.

        Examples
        --------
        >>> import numpy as np
        >>> experts = TuckerExperts(np.full((1, 1, 1, 1), 3.0), np.ones((1, 1)), np.ones((2, 1)))
        >>> experts.apply(np.array([[1.0, 0.0]]), np.ones((1, 1)), alpha=2.0)
        array([[7., 6.]])
        """
        where = "TuckerExperts.apply"
        self.check_parts(gates=(gates, "... k t"), x=(x, "... d"), where=where)
        alpha = check_finite("alpha", alpha, where=where)
        rows = tuple(x.shape[:-1])
        lead = tuple(gates.shape[:-2])
        if lead != rows[: len(lead)]:
            rule = f"leading axes that are the first of x's {rows}"
            raise ShapeError(expected("gates", rule, f"shape {tuple(gates.shape)}", where=where))
        return apply_mixture(x, gates, (self.cores, self.expert_factor, self.basis), alpha)

    def norm(self, group: int) -> Array:
        r"""Measure one group: the Frobenius norm :math:`\lVert \mathcal{T}_i \rVert`, without forming it.

        Parameters
        ----------
        group : int
            Counted from 0; negative values count from the end.

        Returns
        -------
        array, shape ()
            Exact to rounding also where experts nearly vanish. Differentiable where the expert factor and the basis
            have full column rank.

        Raises
        ------
        ConfigError
            If there is no such group.

        Examples
        --------
        >>> import numpy as np
        >>> float(TuckerExperts(np.ones((1, 1, 1, 1)), np.ones((2, 1)), np.ones((3, 1))).norm(0).round(9))
        4.242640687
        """
        group = check_mode("group", group, self.groups, where="TuckerExperts.norm")
        return tucker_norm(self.cores[group], self.expert_factor, self.basis)

    def inner(self, other: TuckerExperts, group: int, other_group: int) -> Array:
        r"""Compare two groups: the inner product :math:`\langle \mathcal{T}_i, \mathcal{T}'_{i'} \rangle`.

        Parameters
        ----------
        other : TuckerExperts
            With the same t and d; its ranks and its basis may be its own. It may be these experts.
        group, other_group : int
            A group of these experts and one of the others'.

        Returns
        -------
        array, shape ()
            The sum over the products of all entries. Neither tensor is formed.

        Raises
        ------
        ShapeError
            If t or d differ.
        ConfigError
            If there is no such group.
        TypeError
            If `other` is no `TuckerExperts`, or of another backend or dtype.

        Examples
        --------
        >>> import numpy as np
        >>> experts = TuckerExperts(np.ones((2, 1, 1, 1)), np.ones((2, 1)), np.ones((3, 1)))
        >>> float(experts.inner(experts, 0, 1))
        18.0
        """
        where = "TuckerExperts.inner"
        if not isinstance(other, TuckerExperts):
            raise TypeError(expected("other", "TuckerExperts", type(other).__qualname__, where=where))
        group = check_mode("group", group, self.groups, where=where)
        other_group = check_mode("other_group", other_group, other.groups, where=where)
        theirs = {"other.expert_factor": (other.expert_factor, "t q"), "other.basis": (other.basis, "d s")}
        self.check_parts(**theirs, where=where)
        parts = (self.cores[group], self.expert_factor, self.basis)
        return tucker_inner(parts, (other.cores[other_group], other.expert_factor, other.basis))

    def group(self, index: int) -> TuckerTensor:
        """Hand one group to TensorLy.

        Parameters
        ----------
        index : int
            Counted from 0; negative values count from the end.

        Returns
        -------
        tensorly.tucker_tensor.TuckerTensor
            Core (p, r, r) and factors [C, U, U]; the arrays are these experts' own. What TensorLy computes with it
            (``to_tensor`` and so on) goes by TensorLy's own choice of backend.

        Raises
        ------
        ConfigError
            If there is no such group.

        Examples
        --------
        >>> import numpy as np
        >>> TuckerExperts(np.ones((3, 2, 4, 4)), np.ones((5, 2)), np.ones((6, 4))).group(0)
        Decomposed rank-(2, 4, 4) TuckerTensor of shape (5, 6, 6)
        """
        index = check_mode("index", index, self.groups, where="TuckerExperts.group")
        kind = importlib.import_module("tensorly.tucker_tensor").TuckerTensor
        # Its constructor asks TensorLy's global backend for shapes, which may not know these arrays.
        tensor = kind.__new__(kind)
        tensor.core, tensor.factors = self.cores[index], [self.expert_factor, self.basis, self.basis]
        tensor.rank = tuple(tensor.core.shape)
        tensor.shape = tuple(factor.shape[0] for factor in tensor.factors)
        return tensor
