"""Tucker experts: groups of d×d experts held as small cores, one expert factor and one basis."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tucka.backends import Array, backend_of, cast
from tucka.core.checks import check_mode
from tucka.core.contractions import apply_mixture, mix_cores, tucker_inner, tucker_norm
from tucka.core.modes import multi_mode_product
from tucka.core.parts import TuckerParts
from tucka.errors import ShapeError, expected
from tucka.spec import check_finite

if TYPE_CHECKING:
    from tensorly.tucker_tensor import TuckerTensor
else:
    TuckerTensor = Any

__all__ = ["TuckerExperts"]


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
