"""The three arrays that Tucker experts are made of, checked once and held together."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tucka.backends import Array, backend_of
from tucka.backends.pytrees import register_pytree
from tucka.core.checks import check_floating, check_shapes

__all__ = ["TuckerParts"]

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
            Other arrays and their axes, as in `tucka.core.checks.check_shapes`; the parts have the axes k p r r, t p
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
