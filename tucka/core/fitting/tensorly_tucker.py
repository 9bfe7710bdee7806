"""TensorLy's own Tucker decomposition, called without a trace in TensorLy's choice of backend."""

from __future__ import annotations

import importlib
import threading

import numpy as np

from tucka.arrays import Values, backend_of

__all__ = ["tensorly_factors"]


def tensorly_factors(stack: Values, factors: list[Values], *, sweeps: int) -> list[Values]:
    """Improve orthonormal factors (t, p), (d, r), (d, r) of a stack by TensorLy's higher-order orthogonal iteration."""
    # TensorLy's decompositions look their backend up in data of the current thread, and any other thread sees what was
    # selected last. So NumPy is selected in a thread that ends with the call, where no other code runs.
    manager = importlib.import_module("tensorly.backend").BackendManager
    decomposition = importlib.import_module("tensorly.decomposition")
    numpy_handle = backend_of(stack=stack)
    core = np.einsum("ktab,tp,ar,bs->kprs", stack, *factors, optimize=True)
    improved: list[Values] = []
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
