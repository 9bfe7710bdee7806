"""A backend as a user would plug it in: an array type of its own, and a TensorLy backend that computes with it."""

import numpy as np
from tensorly.backend import BackendManager
from tensorly.backend.numpy_backend import NumpyBackend

import tucka


class PluggedArray(np.ndarray):
    """An ndarray that only its backend may compute with, besides operators, indexing and methods."""

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"{function} was called past the backend of the array")


def _plain(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value.view(np.ndarray) if isinstance(value, PluggedArray) else value


def _plugged(value):
    if isinstance(value, tuple):
        return tuple(map(_plugged, value))
    return np.asarray(value).view(PluggedArray)


def _through_plain_arrays(function):
    def wrapped(*args, **kwargs):
        return _plugged(function(*_plain(args), **_plain(kwargs)))

    return wrapped


class PluggedBackend(NumpyBackend, backend_name="plugged"):
    """NumPy's functions, each of which takes and returns the plugged arrays."""


_NO_ARRAYS = {"backend_name", "check_random_state", "context", "eps", "finfo", "is_tensor", "ndim", "shape", "to_numpy"}
_plain_backend = NumpyBackend()
for _name in set(BackendManager._functions) - _NO_ARRAYS:
    if hasattr(_plain_backend, _name):
        PluggedBackend.register_method(_name, _through_plain_arrays(getattr(_plain_backend, _name)))
PluggedBackend.register_method("to_numpy", _plain)

tucka.backends.register(PluggedArray, PluggedBackend)
