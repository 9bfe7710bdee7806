"""The array backend, a TensorLy handle, is found from the arrays' type; nothing global is read or changed."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from tucka.errors import ArrayError, expected
from tucka.extras import needs

if TYPE_CHECKING:
    from tensorly.backend.core import Backend
else:
    Backend = Any  # TensorLy is imported when the first array is seen

__all__ = ["Array", "Backend", "backend_of", "register"]

#: An array of NumPy, PyTorch, JAX, CuPy or a registered backend. These types have no common base class.
Array: TypeAlias = Any


class _Entry:
    """One kind of array and the handle that computes with it, made at first use."""

    def __init__(self, is_array_type: Callable[[type], bool], loader: Callable[[], Backend]) -> None:
        self.is_array_type = is_array_type
        self.loader = loader
        self.handles: list[Backend] = []


def _made_by(library: str, *type_names: str) -> Callable[[type], bool]:
    def is_array_type(kind: type) -> bool:
        for type_name in type_names:
            # A library that is not imported has made no array, so none is imported for looking.
            known: Any = sys.modules.get(library)
            for part in type_name.split("."):
                # Another thread may be importing the library: a type that is not there yet has made no array.
                known = getattr(known, part, None)
            if isinstance(known, type) and issubclass(kind, known):
                return True
        return False

    return is_array_type


def _tensorly(name: str) -> Callable[[], Backend]:
    def load() -> Backend:
        # TensorLy's manager makes a handle without selecting it. It lists a backend before the backend is complete, so
        # the import comes first: it waits for any other thread that imports the same one.
        importlib.import_module(f"tensorly.backend.{name}_backend")
        return importlib.import_module("tensorly.backend").BackendManager.load_backend(name)

    return load


def _jax() -> Backend:
    # TensorLy's own JAX module switches x64 on for the whole process when it is imported; ours does not.
    with needs("jax", "JAX arrays"):
        return importlib.import_module("tucka.arrays.jax").JaxBackend()


# Only ever appended to, so an index stays good; the last entry that fits an array wins.
_entries: list[_Entry] = [
    _Entry(_made_by("cupy", "ndarray"), _tensorly("cupy")),
    _Entry(_made_by("jax", "Array", "core.Tracer"), _jax),
    _Entry(_made_by("torch", "Tensor"), _tensorly("pytorch")),
    _Entry(_made_by("numpy", "ndarray", "generic"), _tensorly("numpy")),
]
_index_of_type: dict[type, int] = {}
_loading = threading.RLock()  # a loader may itself look at arrays


def _entry_index(name: str, kind: type) -> int:
    """Find the entry for a type of array, which the caller knows as `name`, and load its handle."""
    known = _index_of_type  # `register` makes a new one: a racing write into the old one is dropped, never stale
    if kind in known:
        return known[kind]
    for index in reversed(range(len(_entries))):
        entry = _entries[index]
        if entry.is_array_type(kind):
            # One at a time: two threads that import two of TensorLy's backends first would wait for each other.
            with _loading:
                if not entry.handles:
                    entry.handles.append(entry.loader())
            known[kind] = index
            return index
    given = f"{kind.__module__}.{kind.__qualname__}"
    rule = "an array of NumPy, PyTorch, JAX, CuPy or a registered backend"
    raise ArrayError(expected(name, rule, given, cure="Convert it first, or see tucka.backends.register"))


# torch.compiler.assume_constant_result sets this attribute; here it is set without importing torch. A compiler then
# runs the first call as Python and does not trace its imports.
_entry_index._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _handle(name: str, array: Array) -> Backend:
    return _entries[_entry_index(name, type(array))].handles[0]


def register(array_type: type, loader: Callable[[], Backend]) -> None:
    """Add a backend: arrays of `array_type` (and of its subclasses) will be computed by what `loader` returns.

    A later registration goes before an earlier one and before the built-in backends, so a subclass of a known array
    type can have a backend of its own.

    Parameters
    ----------
    array_type : type
        The class of the arrays.
    loader : callable
        Takes nothing and returns a ``tensorly.backend.core.Backend``; called once, when the first such array is seen.

    Raises
    ------
    TypeError
        If `array_type` is not a class or `loader` cannot be called.

    Examples
    --------
    >>> import numpy as np
    >>> from tensorly.backend import BackendManager
    >>> class Logged(np.ndarray):
    ...     pass
    >>> register(Logged, lambda: BackendManager.load_backend("numpy"))
    """
    if not isinstance(array_type, type):
        raise TypeError(expected("array_type", "a class", repr(array_type), where="tucka.backends.register"))
    if not callable(loader):
        raise TypeError(expected("loader", "a callable", repr(loader), where="tucka.backends.register"))
    global _index_of_type
    _entries.append(_Entry(lambda kind: issubclass(kind, array_type), loader))
    _index_of_type = {}


def backend_of(**arrays: Array) -> Backend:
    """Return the TensorLy backend that made the given arrays.

    Parameters
    ----------
    **arrays : array
        At least one array, by the name under which the caller knows it.

    Returns
    -------
    tensorly.backend.core.Backend
        The handle: ``handle.einsum``, ``handle.tensordot`` and so on.

    Raises
    ------
    ArrayError
        If an array is of no known backend, or if two are of different ones.

    Examples
    --------
    >>> import numpy as np
    >>> backend_of(x=np.zeros(3)).backend_name
    'numpy'
    """
    (first_name, first_array), *others = arrays.items()
    first = _handle(first_name, first_array)
    for name, array in others:
        handle = _handle(name, array)
        if handle is not first:
            rule = f"an array of the same backend as {first_name} ({first.backend_name})"
            raise ArrayError(expected(name, rule, f"one of {handle.backend_name}"))
    return first
