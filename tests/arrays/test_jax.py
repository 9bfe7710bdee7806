"""TensorLy's interface on JAX."""

import jax
import numpy as np
import pytest
from tensorly.backend.core import Backend
from tensorly.backend.numpy_backend import NumpyBackend

from tucka.arrays.jax import JaxBackend


def test_the_jax_backend_has_what_tensorlys_numpy_backend_has():
    # TensorLy's own JAX backend lacks digamma too.
    assert vars(NumpyBackend).keys() - vars(JaxBackend).keys() == {"digamma"}
    assert JaxBackend().backend_name == "jax"


def test_the_jax_backend_is_not_found_in_place_of_tensorlys():
    assert Backend._available_backends.get("jax") is not JaxBackend


@pytest.mark.parametrize(
    ("call", "desired"),
    [
        (lambda jb, x: jb.tensor([1.0, 2.0], **jb.context(x)), [1.0, 2.0]),
        (lambda jb, x: jb.logsumexp(x * 0, axis=0), np.log([2.0, 2.0])),
        (lambda jb, x: jb.index_update(x, jb.index[0], 9.0), [[9.0, 9.0], [2.0, 3.0]]),
        (lambda jb, x: jb.clip(x, 1.0, 2.0), [[1.0, 1.0], [2.0, 2.0]]),
        (lambda jb, x: jb.lstsq(x, jb.matmul(x, x))[0], [[0.0, 1.0], [2.0, 3.0]]),
        (lambda jb, x: jb.to_numpy(x), [[0.0, 1.0], [2.0, 3.0]]),
        (lambda jb, x: jb.ndim(x), 2),
        (lambda jb, x: jb.is_tensor(x) and not jb.is_tensor(1.0), True),
    ],
    ids=["tensor", "logsumexp", "index_update", "clip", "lstsq", "to_numpy", "ndim", "is_tensor"],
)
def test_a_function_of_the_jax_backend_does_what_its_name_says(call, desired):
    np.testing.assert_allclose(call(JaxBackend(), jax.numpy.arange(4.0).reshape(2, 2)), desired, atol=1e-5)
