"""The one list of array libraries that the property tests run over."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from support.plugged_backend import PluggedArray
from tucka.arrays import host_values

PRECISION = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-23, "float64": 2.0**-52}


@dataclass(frozen=True)
class Library:
    """An array library: how to bring NumPy values there, what its results must be, and its dtypes.

    ``default`` is the dtype that NumPy's float64 values arrive in. ``compiled`` makes one call of a function cheap.
    """

    name: str
    from_numpy: Callable[[np.ndarray], Any]
    array_types: tuple[type, ...]
    dtypes: dict[str, Any]
    default: str = "float64"
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function

    @property
    def eps(self) -> float:
        return PRECISION[self.default]

    def to_numpy(self, array: Any) -> np.ndarray:
        """Bring a result back, after a look at what it is."""
        assert type(array) in self.array_types, f"{type(array)} is not of {self.name}"
        return host_values(array)


def dtype_name(array: Any) -> str:
    return str(array.dtype).rpartition(".")[2]


def _read_only(values: np.ndarray) -> np.ndarray:
    # Catches whoever writes into an argument.
    copy = np.array(values)
    copy.setflags(write=False)
    return copy


_NUMPY_DTYPES: dict[str, Any] = {"float16": np.float16, "float32": np.float32, "float64": np.float64}
if importlib.util.find_spec("ml_dtypes"):
    import ml_dtypes

    _NUMPY_DTYPES = {"bfloat16": ml_dtypes.bfloat16, **_NUMPY_DTYPES}

LIBRARIES = [
    Library("numpy", _read_only, (np.ndarray, *_NUMPY_DTYPES.values()), _NUMPY_DTYPES),
    Library("plugged", lambda values: np.array(values).view(PluggedArray), (PluggedArray,), _NUMPY_DTYPES),
]

# The core needs neither of these, and its tests run without them.
if importlib.util.find_spec("torch"):
    import torch

    _TORCH_DTYPES = {name: getattr(torch, name) for name in PRECISION}
    LIBRARIES.append(Library("torch", lambda values: torch.tensor(np.asarray(values)), (torch.Tensor,), _TORCH_DTYPES))

if importlib.util.find_spec("jax"):
    import jax
    import jax.numpy as jnp

    def _to_jax(values: np.ndarray) -> jax.Array:
        values = np.asarray(values)
        return jnp.asarray(values.astype(np.float32) if values.dtype == np.float64 else values)

    # JAX in its own default precision: tucka must not switch x64 on.
    _JAX_DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
    LIBRARIES.append(Library("jax", _to_jax, (type(jnp.zeros(1)),), _JAX_DTYPES, default="float32", compiled=jax.jit))
