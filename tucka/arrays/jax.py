"""TensorLy's backend interface on JAX.

TensorLy ships one too, but importing it turns 64-bit mode on for the whole process. A library must not do that to its
caller, so this one registers the same functions and leaves the switch alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tensorly.backend.core import Backend, backend_array, backend_basic_math, backend_types

__all__ = ["JaxBackend"]


class JaxBackend(Backend, backend_name="tucka_jax"):  # type: ignore[misc, call-arg]
    """JAX behind TensorLy's interface, with JAX's own rules for dtypes.

    Examples
    --------
    >>> import jax
    >>> JaxBackend().eye(2).shape
    (2, 2)
    """

    @staticmethod
    def context(tensor: Any) -> dict[str, Any]:
        """Return what a new array needs to be like `tensor`.

        Parameters
        ----------
        tensor : jax.Array
            The array to imitate.

        Returns
        -------
        dict
            Its dtype.
        """
        return {"dtype": tensor.dtype}

    @staticmethod
    def tensor(data: Any, dtype: Any = None, **_context: Any) -> Any:
        """Make an array.

        Parameters
        ----------
        data : array_like
            The values.
        dtype : dtype, optional
            The dtype; that of `data` if None.
        **_context : object
            Other entries of a `context`; none is used.

        Returns
        -------
        jax.Array
            The array.
        """
        return jnp.asarray(data, dtype=dtype)

    @staticmethod
    def is_tensor(tensor: Any) -> bool:
        """Say whether `tensor` is a JAX array.

        Parameters
        ----------
        tensor : object
            Anything.

        Returns
        -------
        bool
            True for arrays and for tracers.
        """
        return isinstance(tensor, jax.Array)

    @staticmethod
    def to_numpy(tensor: Any) -> Any:
        """Copy an array to the host.

        Parameters
        ----------
        tensor : jax.Array
            The array.

        Returns
        -------
        numpy.ndarray
            Its values.
        """
        return np.array(tensor)

    @staticmethod
    def ndim(tensor: Any) -> int:
        """Count the axes.

        Parameters
        ----------
        tensor : jax.Array
            The array.

        Returns
        -------
        int
            The number of axes.
        """
        return int(tensor.ndim)

    @staticmethod
    def logsumexp(tensor: Any, axis: int = 0) -> Any:
        """Compute log Σ exp along one axis.

        Parameters
        ----------
        tensor : jax.Array
            The values.
        axis : int
            The axis to reduce.

        Returns
        -------
        jax.Array
            One axis fewer.
        """
        return jax.scipy.special.logsumexp(tensor, axis=axis)

    @staticmethod
    def index_update(tensor: Any, indices: Any, values: Any) -> Any:
        """Return a copy with some entries replaced.

        Parameters
        ----------
        tensor : jax.Array
            The array.
        indices : index
            Where.
        values : array_like
            What.

        Returns
        -------
        jax.Array
            The copy.
        """
        return tensor.at[indices].set(values)

    @staticmethod
    def clip(tensor: Any, a_min: Any = None, a_max: Any = None) -> Any:
        """Limit the entries to an interval.

        Parameters
        ----------
        tensor : jax.Array
            The array.
        a_min, a_max : float, optional
            The interval's ends.

        Returns
        -------
        jax.Array
            The limited array.
        """
        return jnp.clip(tensor, a_min, a_max)


# Its name in messages. TensorLy keeps the class under another one, so that its own is still found as "jax".
JaxBackend.backend_name = "jax"

_FROM_JAX_NUMPY = (
    *backend_types,
    *backend_basic_math,
    *backend_array,
    *("nan", "moveaxis", "copy", "transpose", "arange", "flip", "trace", "kron", "concatenate", "max", "mean", "sum"),
    *("argmin", "argmax", "stack", "sign", "conj", "diag", "log2", "tensordot", "argsort", "sort", "dot", "shape"),
)
for _name in _FROM_JAX_NUMPY:
    JaxBackend.register_method(_name, getattr(jnp, _name))
for _name in ("solve", "qr", "svd", "eigh"):
    JaxBackend.register_method(_name, getattr(jnp.linalg, _name))
# As NumPy does: no residuals where the system has more unknowns than equations.
JaxBackend.register_method("lstsq", partial(jnp.linalg.lstsq, numpy_resid=True))
