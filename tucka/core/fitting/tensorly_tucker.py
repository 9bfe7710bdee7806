"""TensorLy's own Tucker decomposition, called without a trace in TensorLy's choice of backend."""

from __future__ import annotations

import importlib
import threading
from typing import Any, TypeAlias

import numpy as np

from tucka.arrays import backend_of

__all__ = ["tensorly_factors"]

Matrix: TypeAlias = np.ndarray[Any, Any]


def tensorly_factors(stack: Matrix, factors: list[Matrix], *, sweeps: int) -> list[Matrix]:
    """Improve factors of modes 1, 2 and 3 by TensorLy's higher-order orthogonal iteration.

    TensorLy's decompositions look their backend up in data of the current thread, and any other thread sees what was
    selected last. A thread of our own, that ends with the call, is the one place where selecting NumPy changes
    nothing for anybody.

    Parameters
    ----------
    stack : numpy.ndarray, shape (k, t, d, d)
        Not all zero.
    factors : list of numpy.ndarray, shapes (t, p), (d, r), (d, r)
        Where to start, with orthonormal columns; p is at most k·r².
    sweeps : int
        How often each factor is updated, at most.

    Returns
    -------
    list of numpy.ndarray
        Factors of the same shapes; those of the last two modes are no longer the same.

    Examples
    --------
    >>> stack = np.zeros((1, 2, 3, 3))
    >>> stack[0, :, 0, 1] = 1.0
    >>> start = [np.ones((2, 1)) / 2**0.5, np.ones((3, 1)) / 3**0.5, np.ones((3, 1)) / 3**0.5]
    >>> [abs(factor[:, 0]).round(2).tolist() for factor in tensorly_factors(stack, start, sweeps=2)]
    [[0.71, 0.71], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    """
    manager = importlib.import_module("tensorly.backend").BackendManager
    decomposition = importlib.import_module("tensorly.decomposition")
    numpy_handle = backend_of(stack=stack)
    core = np.einsum("ktab,tp,ar,bs->kprs", stack, *factors, optimize=True)
    improved: list[Matrix] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            manager.set_backend(numpy_handle, local_threadsafe=True)
            # TensorLy writes into the list that it is given.
            start = (core, list(factors))
            ranks = [factor.shape[1] for factor in factors]
            result, _ = decomposition.partial_tucker(stack, ranks, modes=[1, 2, 3], init=start, n_iter_max=sweeps)
            improved.extend(result[1])
        except BaseException as error:
            failure.append(error)

    # A daemon, so that an interrupted program need not wait for it.
    thread = threading.Thread(target=work, name="tucka-tensorly", daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return improved
