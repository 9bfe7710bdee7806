"""Functions keep the dtype and the device of their arrays."""

import numpy as np
import pytest

import tucka
from support.array_backends import LIBRARIES, PRECISION, dtype_name
from support.functions_of_arrays import CASES
from support.subprocesses import output_of
from tucka.arrays import cast, host_values

every_function = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize(
    ("library", "dtype"),
    [pytest.param(library, dtype, id=f"{library.name}-{dtype}") for library in LIBRARIES for dtype in library.dtypes],
)


@pytest.mark.each_value
@every_dtype
@every_function
def test_a_function_keeps_the_dtype_and_its_precision(library, dtype, case):
    inputs = [cast(library.from_numpy(values), library.dtypes[dtype]) for values in case.values()]
    result = library.compiled(case.function)(*inputs)
    assert type(result) in library.array_types
    assert dtype_name(result) == dtype
    desired = host_values(case.function(*map(host_values, inputs)))
    # Half precision is widened inside where sizes are small; elsewhere a few roundings of it are expected.
    scale = max(1.0, float(np.abs(desired).max()))
    np.testing.assert_allclose(host_values(result), desired, rtol=0, atol=64 * PRECISION[dtype] * scale)


@every_dtype
def test_centroids_take_the_dtype_of_the_features(library, dtype):
    features = cast(library.from_numpy(np.arange(12.0).reshape(6, 2) ** 2 / 64), library.dtypes[dtype])
    options = {"groups": 2, "experts_per_group": 1, "seed": 0}
    results = [
        tucka.kaiming_centroids((2, 1, 2), seed=0, like=features),
        tucka.data_aware_centroids(features, scale=1.0, **options),
        *tucka.balanced_centroids(features, **options),
    ]
    assert {dtype_name(result) for result in results} == {dtype}
    assert all(type(result) in library.array_types for result in results)
    assert all(np.isfinite(host_values(result)).all() for result in results)


@every_dtype
def test_any_precision_may_be_a_load(library, dtype):
    load = cast(library.from_numpy(np.array([2.0, 2.0])), library.dtypes[dtype])
    assert tucka.load_entropy(load) == 1.0


@every_function
def test_results_stay_on_their_device_and_nothing_is_read_back(case):
    torch = pytest.importorskip("torch")
    # A meta tensor has no values: reading one, or mixing it with a tensor made elsewhere, is an error.
    inputs = [torch.empty(shape, device="meta") for shape in case.shapes]
    assert case.function(*inputs).device.type == "meta"


def test_long_texts_in_half_precision_do_not_overflow(library):
    hidden = np.full((1, 4096, 1), 100.0)
    for dtype in {"float16", "bfloat16"} & library.dtypes.keys():
        half = cast(library.from_numpy(hidden), library.dtypes[dtype])
        mask = library.from_numpy(np.ones((1, 4096)))
        np.testing.assert_array_equal(host_values(tucka.routing_feature(half)), [100.0])
        np.testing.assert_array_equal(host_values(tucka.routing_feature(half, mask=mask)), [100.0])


def test_numbers_in_another_byte_order_are_floating_too():
    swapped = np.arange(6.0).reshape(2, 3).astype(">f8")
    np.testing.assert_array_equal(tucka.routing_feature(swapped), [1.5, 2.5, 3.5])


IN_DOUBLE = """
import jax, numpy as np, jax.numpy as jnp
from support.functions_of_arrays import CASES
from support.subprocesses import output_of

for case in CASES:
    result = jax.jit(case.function)(*map(jnp.asarray, case.values()))
    assert result.dtype == jnp.float64, case.name
    np.testing.assert_allclose(result, case.function(*case.values()), atol=1e-12, err_msg=case.name)
assert jax.config.jax_enable_x64
print("same in float64")
"""


@pytest.mark.heavy
def test_jax_keeps_float64_where_the_caller_enabled_it():
    pytest.importorskip("jax")
    assert output_of(IN_DOUBLE, JAX_ENABLE_X64="1") == "same in float64\n"
