"""TensorLy's backend interface on JAX, with JAX's own rules for dtypes."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tensorly.backend.core import Backend, backend_array, backend_basic_math, backend_types

__all__ = ["JaxBackend"]


# TensorLy ships such a class too. Importing its module turns 64-bit mode on for the whole process, which a library must
# not do to its caller. This one registers the same functions and leaves the switch alone.
class JaxBackend(Backend, backend_name="tucka_jax"):  # type: ignore[misc, call-arg]
    """JAX behind TensorLy's interface."""

    @staticmethod
    def context(tensor: Any) -> dict[str, Any]:
        """Return what a new array needs to be like `tensor`: its dtype."""
        return {"dtype": tensor.dtype}

    @staticmethod
    def tensor(data: Any, dtype: Any = None, **_context: Any) -> Any:
        """Make an array of the dtype of `data`, or of `dtype`."""
        return jnp.asarray(data, dtype=dtype)

    @staticmethod
    def is_tensor(tensor: Any) -> bool:
        """Say whether `tensor` is a JAX array or a tracer."""
        return isinstance(tensor, jax.Array)

    @staticmethod
    def to_numpy(tensor: Any) -> Any:
        """Copy an array to the host."""
        return np.array(tensor)

    @staticmethod
    def stop_gradient(tensor: Any) -> Any:
        """Return the array as a constant."""
        return jax.lax.stop_gradient(tensor)

    @staticmethod
    def ndim(tensor: Any) -> int:
        """Count the axes."""
        return int(tensor.ndim)

    @staticmethod
    def logsumexp(tensor: Any, axis: int = 0) -> Any:
        """Compute log Σ exp along one axis."""
        return jax.scipy.special.logsumexp(tensor, axis=axis)

    @staticmethod
    def index_update(tensor: Any, indices: Any, values: Any) -> Any:
        """Return a copy with some entries replaced."""
        return tensor.at[indices].set(values)

    @staticmethod
    def clip(tensor: Any, a_min: Any = None, a_max: Any = None) -> Any:
        """Limit the entries to an interval."""
        return jnp.clip(tensor, a_min, a_max)


# Messages say "jax". TensorLy keeps this class under another name, so that its own class is still found as "jax".
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
