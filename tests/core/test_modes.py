"""Mode-n products."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import tucka
from support.close import assert_close, largest
from support.strategies import arrays, factors, few_sizes, shapes, tensor_and_matrix
from tucka import reference


@given(case=tensor_and_matrix())
def test_a_mode_product_equals_the_reference(library, case):
    tensor, matrix, mode = case
    result = tucka.mode_product(library.from_numpy(tensor), library.from_numpy(matrix), mode=mode)
    desired = reference.mode_product(tensor, matrix, mode)
    assert_close(library.to_numpy(result), desired, eps=library.eps, terms=4, scale=16)


@given(case=tensor_and_matrix())
def test_a_negative_mode_counts_from_the_end(library, case):
    tensor, matrix, mode = case
    tensor, matrix = library.from_numpy(tensor), library.from_numpy(matrix)
    from_start = tucka.mode_product(tensor, matrix, mode=mode)
    from_end = tucka.mode_product(tensor, matrix, mode=mode - tensor.ndim)
    np.testing.assert_array_equal(library.to_numpy(from_start), library.to_numpy(from_end))


@given(case=tensor_and_matrix(), data=st.data(), a=factors, b=factors)
def test_a_mode_product_is_linear_in_each_argument(library, case, data, a, b):
    tensor, matrix, mode = case
    other_tensor, other_matrix = data.draw(arrays(*tensor.shape)), data.draw(arrays(*matrix.shape))

    def product(tensor, matrix):
        result = tucka.mode_product(library.from_numpy(tensor), library.from_numpy(matrix), mode=mode)
        return library.to_numpy(result)

    in_tensor = a * product(tensor, matrix) + b * product(other_tensor, matrix)
    in_matrix = a * product(tensor, matrix) + b * product(tensor, other_matrix)
    close = {"eps": library.eps, "terms": 4, "scale": 100}
    assert_close(product(a * tensor + b * other_tensor, matrix), in_tensor, **close)
    assert_close(product(tensor, a * matrix + b * other_matrix), in_matrix, **close)


@given(data=st.data())
def test_mode_products_on_different_modes_commute(library, data):
    shape = data.draw(shapes.filter(lambda shape: len(shape) >= 2))
    tensor = data.draw(arrays(*shape))
    modes = data.draw(st.permutations(range(len(shape))))
    matrices = [data.draw(arrays(3, shape[mode])) for mode in modes]
    to = library.from_numpy
    there = tucka.multi_mode_product(to(tensor), [to(matrix) for matrix in matrices], modes=modes)
    back = tucka.multi_mode_product(to(tensor), [to(matrix) for matrix in matrices[::-1]], modes=modes[::-1])
    close = {"eps": library.eps, "terms": tensor.size, "scale": largest(tensor, *matrices)}
    assert_close(library.to_numpy(there), library.to_numpy(back), **close)


@given(data=st.data())
def test_products_along_one_mode_compose(library, data):
    tensor, first, mode = data.draw(tensor_and_matrix())
    second = data.draw(arrays(data.draw(few_sizes), first.shape[0]))
    to = library.from_numpy
    twice = tucka.mode_product(tucka.mode_product(to(tensor), to(first), mode=mode), to(second), mode=mode)
    once = tucka.mode_product(to(tensor), to(second @ first), mode=mode)
    close = {"eps": library.eps, "terms": 16, "scale": largest(tensor, first, second)}
    assert_close(library.to_numpy(twice), library.to_numpy(once), **close)


@given(data=st.data())
def test_a_multi_mode_product_takes_the_first_modes_by_default(library, data):
    shape = data.draw(shapes)
    tensor = data.draw(arrays(*shape))
    matrices = [data.draw(arrays(2, size)) for size in shape[: data.draw(st.integers(0, len(shape)))]]
    to = library.from_numpy
    result = tucka.multi_mode_product(to(tensor), [to(matrix) for matrix in matrices])
    desired = tensor
    for mode, matrix in enumerate(matrices):
        desired = reference.mode_product(desired, matrix, mode)
    close = {"eps": library.eps, "terms": tensor.size, "scale": largest(tensor, *matrices)}
    assert_close(library.to_numpy(result), desired, **close)


def test_whole_numbers_are_multiplied_exactly(library):
    tensor, matrix = np.arange(6).reshape(2, 3), np.array([[1, 2, 3]])
    result = tucka.mode_product(library.from_numpy(tensor), library.from_numpy(matrix), mode=1)
    assert "int" in str(result.dtype)
    np.testing.assert_array_equal(np.asarray(result), [[8], [26]])
