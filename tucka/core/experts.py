"""Tucker experts: groups of d×d experts held as small cores, one expert factor and one basis."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, overload

import numpy as np

from tucka.arrays import Array, array_like, backend_of, cast, detach, floating_backend, widen
from tucka.arrays.pytrees import register_pytree
from tucka.checks import check_count, check_finite, check_mode, check_shapes
from tucka.core.modes import times_matrices
from tucka.core.norms import largest_entry
from tucka.errors import ArrayError, ConfigError, ShapeError, expected
from tucka.spec import TuckerSpec, mixes_each_row

if TYPE_CHECKING:
    from tensorly.tucker_tensor import TuckerTensor
    from typing_extensions import TypeVar

    # A default, so that an annotation may leave the arrays' type out.
    ArrayT = TypeVar("ArrayT", bound=Any, default=Any)
    LikeT = TypeVar("LikeT", bound=Any)
    NumbersT = TypeVar("NumbersT", bound=np.dtype[Any])
else:
    from typing import TypeVar

    TuckerTensor = Any
    ArrayT, LikeT, NumbersT = TypeVar("ArrayT"), TypeVar("LikeT"), TypeVar("NumbersT")

__all__ = ["ArrayT", "NumbersT", "TuckerExperts", "adapt", "form_group", "mix_cores"]

# Cores, expert factor, basis: of a whole set (k, p, r, r), (t, p), (d, r), or of one group with a core (p, r, r).
Parts: TypeAlias = tuple[Array, Array, Array]

_FIELDS = ("cores", "expert_factor", "basis")


def form_group(core: Array, expert_factor: Array, basis: Array) -> Array:
    """Eq. (5): form T_i = G_i ×_0 C ×_1 U ×_2 U, (p, r, r), (t, p), (d, r) -> (t, d, d)."""
    return times_matrices(core, [expert_factor, basis, basis])


def adapt(x: Array, parts: Parts, gates: Array, *, alpha: float | Array) -> Array:
    """Eq. (9) without its W: x + α ((x U) Ḡ) Uᵀ, for x (..., d) and gates that align with x from the left."""
    cores, expert_factor, basis = parts
    handle = backend_of(x=x)
    inner = handle.matmul(x, basis)
    shared = x.ndim - gates.ndim + 1  # axes of x, before its last, along which rows share their gates
    groups, slices, rank, _ = cores.shape
    if shared:
        mixed = mix_cores(cores, expert_factor, gates)
        inner = handle.matmul(
            inner, handle.reshape(mixed, (*mixed.shape[:-2], *(1,) * (shared - 1), *mixed.shape[-2:]))
        )
    elif mixes_each_row(rank, groups * slices):
        inner = handle.matmul(inner[..., None, :], mix_cores(cores, expert_factor, gates))[..., 0, :]
    else:
        weights = cast(_core_weights(expert_factor, gates), x.dtype)
        inner = handle.tensordot(weights[..., None] * inner[..., None, None, :], cores, axes=([-3, -2, -1], [0, 1, 2]))
    return cast(x + handle.matmul(alpha * inner, handle.transpose(basis)), x.dtype)


def mix_cores(cores: Array, expert_factor: Array, gates: Array) -> Array:
    """The sum in Eq. (9): Ḡ = Σ_ijq γ_ij C_jq G_i[q], (..., k, t) -> (..., r, r), in at least float32 until the end."""
    handle, weights = backend_of(gates=gates), _core_weights(expert_factor, gates)
    return cast(handle.tensordot(weights, widen(cores), axes=([-2, -1], [0, 1])), gates.dtype)


def _core_weights(expert_factor: Array, gates: Array) -> Array:
    """Weigh the k·p slices of the cores: Σ_j γ_ij C_jq, (..., k, t) -> (..., k, p), in at least float32."""
    return backend_of(gates=gates).matmul(widen(gates), widen(expert_factor))


def _inner(parts: Parts, others: Parts) -> Array:
    """Sum the products of all entries of two groups of one size (t, d, d), through the Gram matrices of their parts."""
    core, expert_factor, basis = parts
    other_core, other_factor, other_basis = others
    handle = backend_of(core=core)
    outer = handle.matmul(handle.transpose(other_factor), expert_factor)
    between = handle.matmul(handle.transpose(other_basis), basis)
    return handle.sum(times_matrices(core, [outer, between, between]) * other_core)


def _norm(core: Array, expert_factor: Array, basis: Array) -> Array:
    """Compute the Frobenius norm of a group."""
    handle = backend_of(core=core)
    sizes = [largest_entry(part) for part in (core, expert_factor, basis)]
    unit = (core / sizes[0], expert_factor / sizes[1], basis / sizes[2])
    # The value: an orthogonal factor changes no norm, so triangles are enough. The root of an inner product would lose
    # half of the digits where columns of U cancel.
    outer, inner = (handle.qr(detach(factor))[1] for factor in unit[1:])
    reduced = times_matrices(detach(unit[0]), [outer, inner, inner])
    largest = largest_entry(reduced)
    length = largest * handle.sqrt(handle.sum((reduced / largest) ** 2))
    # The derivatives: those of the inner product. Not all libraries can differentiate the triangles.
    square = _inner(unit, unit)
    divisor = handle.where(length == 0, length + 1, length)
    length = length * handle.sqrt(1 + (square - detach(square)) / divisor / divisor)
    return length * sizes[0] * sizes[2] * sizes[1] * sizes[2]


@dataclass(frozen=True, eq=False, repr=False)
class TuckerExperts(Generic[ArrayT]):
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
    ShapeError, ArrayError
        If the shapes do not fit each other, or the arrays are not real floating-point arrays of one backend and dtype.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (3) and (5), where modes count from 1.

    Examples
    --------
    >>> import numpy as np
    >>> experts = TuckerExperts(np.ones((3, 2, 4, 4)), np.ones((5, 2)), np.ones((6, 4)))
    >>> experts
    TuckerExperts(cores=(3, 2, 4, 4), expert_factor=(5, 2), basis=(6, 4))
    >>> experts.to_tensor(0).shape, experts.n_parameters
    ((5, 6, 6), 130)
    """

    cores: ArrayT
    expert_factor: ArrayT
    basis: ArrayT

    if TYPE_CHECKING:
        # Arrays of NumPy may have types that count their axes, which the parts do not share.
        @overload
        def __init__(
            self: TuckerExperts[np.ndarray[Any, NumbersT]],
            cores: np.ndarray[Any, NumbersT],
            expert_factor: np.ndarray[Any, NumbersT],
            basis: np.ndarray[Any, NumbersT],
        ) -> None: ...

        @overload
        def __init__(self, cores: ArrayT, expert_factor: ArrayT, basis: ArrayT) -> None: ...

        def __init__(self, cores: Any, expert_factor: Any, basis: Any) -> None: ...

    def __post_init__(self) -> None:
        self._check(where=type(self).__name__)
        register_pytree(type(self), _FIELDS)

    def __setstate__(self, state: dict[str, Array]) -> None:
        # A copy, or an object from a file: its arrays were checked when they were put together.
        self.__dict__.update(state)
        register_pytree(type(self), _FIELDS)

    def __repr__(self) -> str:
        # JAX puts placeholders without a shape in the place of arrays.
        shapes = (f"{name}={tuple(getattr(getattr(self, name), 'shape', ()))}" for name in _FIELDS)
        return f"{type(self).__name__}({', '.join(shapes)})"

    def _check(self, *, where: str, **operands: tuple[Array, str]) -> None:
        """Check the parts (axes k p r r, t p, d r), and operands with their axes against them."""
        described = {"cores": (self.cores, "k p r r"), "expert_factor": (self.expert_factor, "t p")}
        described |= {"basis": (self.basis, "d r"), **operands}
        floating_backend(where=where, **{name: array for name, (array, _) in described.items()})
        check_shapes(where=where, **described)

    @overload
    @classmethod
    def from_spec(
        cls, spec: TuckerSpec, in_features: int, *, seed: int, like: None = None
    ) -> TuckerExperts[np.ndarray[Any, np.dtype[np.float64]]]: ...

    @overload
    @classmethod
    def from_spec(
        cls, spec: TuckerSpec, in_features: int, *, seed: int, like: np.ndarray[Any, NumbersT]
    ) -> TuckerExperts[np.ndarray[Any, NumbersT]]: ...

    @overload
    @classmethod
    def from_spec(cls, spec: TuckerSpec, in_features: int, *, seed: int, like: LikeT) -> TuckerExperts[LikeT]: ...

    @classmethod
    def from_spec(
        cls, spec: TuckerSpec, in_features: int, *, seed: int, like: Array | None = None
    ) -> TuckerExperts[Any]:
        """Draw random experts of the sizes of a specification.

        The basis has orthonormal columns. The entries of expert factor and cores are normal with the variances 1/p and
        1/r, so that an expert changes what it reads about as much as an orthogonal matrix would.

        Parameters
        ----------
        spec : TuckerSpec
            Of which only the four sizes k, t, p and r count.
        in_features : int
            The width d, at least r.
        seed : int
            The same seed gives the same numbers on every backend.
        like : array, optional
            Its backend, dtype and device are used; NumPy float64 if None.

        Returns
        -------
        TuckerExperts
            Not connected to `like` for gradients.

        Raises
        ------
        ConfigError, ArrayError
            If `in_features` is smaller than the rank, the seed is negative, or `like` is no real floating-point array.

        References
        ----------
        .. [1] arXiv:2511.06859, Eq. (5) for the sizes. The paper does not say how the parts start.

        Examples
        --------
        >>> TuckerExperts.from_spec(TuckerSpec(rank=4, groups=3), 16, seed=0)
        TuckerExperts(cores=(3, 2, 4, 4), expert_factor=(2, 2), basis=(16, 4))
        """
        where = "TuckerExperts.from_spec"
        k, t, p, r = spec.groups, spec.experts_per_group, spec.expert_rank, spec.rank
        width = check_count("in_features", in_features, where=where)
        if width < r:
            raise ConfigError(expected("in_features", f"at least the rank, {r}", width, where=where))
        rng = np.random.default_rng(check_count("seed", seed, least=0, where=where))
        if like is not None:
            floating_backend(where=where, like=like)
        basis = np.linalg.qr(rng.standard_normal((width, r)))[0]
        expert_factor = rng.standard_normal((t, p)) / math.sqrt(p)
        cores = rng.standard_normal((k, p, r, r)) / math.sqrt(r)
        return cls(*(array_like(part, like) for part in (cores, expert_factor, basis)))

    @property
    def groups(self) -> int:
        """Number of groups (k)."""
        return int(self.cores.shape[0])

    @property
    def experts_per_group(self) -> int:
        """Number of experts in one group (t)."""
        return int(self.expert_factor.shape[0])

    @property
    def n_parameters(self) -> int:
        """Numbers held: t·p + k·p·r² + d·r."""
        return sum(math.prod(array.shape) for array in (self.cores, self.expert_factor, self.basis))

    def to_tensor(self, group: int) -> ArrayT:
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

        References
        ----------
        .. [1] arXiv:2511.06859, Eq. (5).

        Examples
        --------
        >>> import numpy as np
        >>> TuckerExperts(np.full((1, 1, 1, 1), 3.0), np.ones((1, 1)), np.ones((2, 1))).to_tensor(0)
        array([[[3., 3.],
                [3., 3.]]])
        """
        group = check_mode("group", group, self.groups, where="TuckerExperts.to_tensor")
        return form_group(self.cores[group], self.expert_factor, self.basis)

    def expert(self, group: int, index: int) -> ArrayT:
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

    def mix(self, gates: Array) -> ArrayT:
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
        ShapeError, ArrayError
            If the last two axes are not (k, t), or backend or dtype differ from the experts'.

        References
        ----------
        .. [1] arXiv:2511.06859, the sum in Eq. (9), inside the basis.

        Examples
        --------
        >>> import numpy as np
        >>> experts = TuckerExperts(np.full((2, 1, 1, 1), 3.0), np.ones((2, 1)), np.ones((2, 1)))
        >>> experts.mix(np.array([[0.0, 0.0], [0.25, 0.5]]))
        array([[2.25]])
        """
        self._check(gates=(gates, "... k t"), where="TuckerExperts.mix")
        return mix_cores(self.cores, self.expert_factor, gates)

    def apply(self, x: Array, gates: Array, *, alpha: float | Array = 1.0) -> ArrayT:
        r"""Adapt activations: :math:`x' = x + \alpha\, ((x U) \bar G)\, U^\top`, without any d×d matrix.

        Parameters
        ----------
        x : array, shape (..., d)
            Activations, one in each row.
        gates : array, shape (k, t), (B, k, t), (B, S, k, t), ...
            Their leading axes align with those of `x` from the left: (k, t) serves all of `x`, (B, k, t) has one set
            for each entry of the first axis of `x`, and so on.
        alpha : float, or array of shape ()
            The scale of the update. An array of the backend of `x` may have a gradient, or be traced; its value is not
            looked at.

        Returns
        -------
        array, shape (..., d)
            What the frozen layer W is then applied to.

        Raises
        ------
        ShapeError, ArrayError
            If `x` is not d wide, the leading axes of `gates` are not those of `x`, or backend or dtype differ.
        ConfigError
            If `alpha` is not finite.

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
        self._check(gates=(gates, "... k t"), x=(x, "... d"), where=where)
        if not backend_of(x=x).is_tensor(alpha) or tuple(alpha.shape):  # type: ignore[union-attr]
            alpha = check_finite("alpha", alpha, where=where)
        rows, lead = tuple(x.shape[:-1]), tuple(gates.shape[:-2])
        if lead != rows[: len(lead)]:
            rule = f"leading axes that are the first of x's {rows}"
            raise ShapeError(expected("gates", rule, f"shape {tuple(gates.shape)}", where=where))
        return adapt(x, (self.cores, self.expert_factor, self.basis), gates, alpha=alpha)

    def norm(self, group: int) -> ArrayT:
        r"""Measure one group: the Frobenius norm :math:`\lVert \mathcal{T}_i \rVert`, without forming it.

        Parameters
        ----------
        group : int
            Counted from 0; negative values count from the end.

        Returns
        -------
        array, shape ()
            Exact to rounding also where experts nearly vanish. Differentiable; where the norm is zero, its gradient
            is zero.

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
        parts = (widen(part) for part in (self.cores[group], self.expert_factor, self.basis))
        return cast(_norm(*parts), self.cores.dtype)

    def inner(self, other: TuckerExperts, group: int, other_group: int) -> ArrayT:
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
        ShapeError, ArrayError
            If t or d differ, or `other` is no `TuckerExperts`, or of another backend or dtype.
        ConfigError
            If there is no such group.

        Examples
        --------
        >>> import numpy as np
        >>> experts = TuckerExperts(np.ones((2, 1, 1, 1)), np.ones((2, 1)), np.ones((3, 1)))
        >>> float(experts.inner(experts, 0, 1))
        18.0
        """
        where = "TuckerExperts.inner"
        if not isinstance(other, TuckerExperts):
            raise ArrayError(expected("other", "TuckerExperts", type(other).__qualname__, where=where))
        group = check_mode("group", group, self.groups, where=where)
        other_group = check_mode("other_group", other_group, other.groups, where=where)
        self._check(
            **{"other.expert_factor": (other.expert_factor, "t q"), "other.basis": (other.basis, "d s")}, where=where
        )
        first = (self.cores[group], self.expert_factor, self.basis)
        second = (other.cores[other_group], other.expert_factor, other.basis)
        product = _inner(*(tuple(map(widen, parts)) for parts in (first, second)))
        return cast(product, self.cores.dtype)

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
