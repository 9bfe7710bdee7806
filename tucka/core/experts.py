"""Tucker experts: groups of d×d experts held as small cores, one expert factor and one basis."""

from __future__ import annotations

from dataclasses import dataclass

from tucka.backends import Array, backend_of
from tucka.core.checks import check_axes, check_floating, check_mode, check_size
from tucka.core.modes import multi_mode_product
from tucka.errors import ShapeError, expected
from tucka.spec import check_finite

__all__ = ["TuckerExperts"]


@dataclass(frozen=True, eq=False)
class TuckerExperts:
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

    cores: Array
    expert_factor: Array
    basis: Array

    def __post_init__(self) -> None:
        where = "TuckerExperts"
        arrays = {"cores": self.cores, "expert_factor": self.expert_factor, "basis": self.basis}
        backend_of(**arrays)
        check_floating(where=where, **arrays)
        check_axes("cores", self.cores, "k p r r", where=where)
        check_size("cores", self.cores, 3, self.cores.shape[2], matches="axis 2 of cores", where=where)
        check_axes("expert_factor", self.expert_factor, "t p", where=where)
        check_size("expert_factor", self.expert_factor, 1, self.cores.shape[1], matches="axis 1 of cores", where=where)
        check_axes("basis", self.basis, "d r", where=where)
        check_size("basis", self.basis, 1, self.cores.shape[2], matches="axis 2 of cores", where=where)

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
        groups, expert_rank, rank, _ = self.cores.shape
        experts, width = self.expert_factor.shape[0], self.basis.shape[0]
        return int(experts * expert_rank + groups * expert_rank * rank * rank + width * rank)

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
        """
        where = "TuckerExperts.expert"
        group = check_mode("group", group, self.groups, where=where)
        index = check_mode("index", index, self.experts_per_group, where=where)
        handle = backend_of(cores=self.cores)
        core = handle.tensordot(self.expert_factor[index], self.cores[group], axes=([0], [0]))
        return handle.matmul(handle.matmul(self.basis, core), handle.transpose(self.basis))

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
        """
        self._check_operand("gates", gates, "... k t", where="TuckerExperts.mix")
        handle = backend_of(gates=gates)
        # The small sizes first: gates and factor give k·p numbers, whatever r is.
        weights = handle.einsum("...kt,tp->...kp", gates, self.expert_factor)
        return handle.einsum("...kp,kprs->...rs", weights, self.cores)

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
        """
        where = "TuckerExperts.apply"
        self._check_operand("gates", gates, "... k t", where=where)
        self._check_operand("x", x, "... d", where=where)
        alpha = check_finite("alpha", alpha, where=where)
        rows = tuple(x.shape[:-1])
        lead = gates.ndim - 2
        if tuple(gates.shape[:lead]) != rows[:lead]:
            rule = f"leading axes that are the first of x's {rows}"
            raise ShapeError(expected("gates", rule, f"shape {tuple(gates.shape)}", where=where))
        handle = backend_of(x=x)
        mixed = self.mix(gates)
        between = len(rows) - lead
        mixed = handle.reshape(mixed, (*mixed.shape[:-2], *(1,) * max(between - 1, 0), *mixed.shape[-2:]))
        inner = handle.matmul(x, self.basis)
        # With an axis of x left over, it is the rows of a matrix product; without one, each row has its own core.
        inner = handle.matmul(inner, mixed) if between else handle.matmul(inner[..., None, :], mixed)[..., 0, :]
        return x + alpha * handle.matmul(inner, handle.transpose(self.basis))

    def _check_operand(self, name: str, array: Array, axes: str, *, where: str) -> None:
        """Check an operand's backend, dtype and last axes against the experts'."""
        backend_of(basis=self.basis, **{name: array})
        check_floating(where=where, basis=self.basis, **{name: array})
        check_axes(name, array, axes, where=where)
        sizes = {"k": self.groups, "t": self.experts_per_group, "d": int(self.basis.shape[0])}
        letters = axes.split()[1:]
        for offset, letter in enumerate(letters):
            axis = array.ndim - len(letters) + offset
            check_size(name, array, axis, sizes[letter], matches=f"the experts' {letter}", where=where)
