"""The one list of array libraries that the property tests run over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch


@dataclass(frozen=True)
class Library:
    """An array library: how to bring NumPy values there and back, and its widest dtype at hand."""

    name: str
    from_numpy: Callable[[np.ndarray], Any]
    to_numpy: Callable[[Any], np.ndarray]
    eps: float


def _read_only(values: np.ndarray) -> np.ndarray:
    # Catches whoever writes into an argument.
    copy = np.array(values)
    copy.setflags(write=False)
    return copy


def _to_jax(values: np.ndarray) -> jax.Array:
    values = np.asarray(values)
    return jnp.asarray(values.astype(np.float32) if values.dtype == np.float64 else values)


def _from_torch(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.detach().double() if tensor.is_floating_point() else tensor)


LIBRARIES = [
    Library("numpy", np.array, np.asarray, 2.0**-52),
    Library("numpy-read-only", _read_only, np.asarray, 2.0**-52),
    Library("torch", lambda values: torch.tensor(np.asarray(values)), _from_torch, 2.0**-52),
    # JAX in its own default precision: tucka must not switch x64 on.
    Library("jax", _to_jax, lambda array: np.asarray(array, dtype=np.float64), 2.0**-23),
]
