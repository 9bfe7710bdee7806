"""Mode-n products."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tucka
from support.close import assert_close
from support.strategies import arrays, shapes, sizes, tensor_and_matrix
from tucka.backends import reference


@given(case=tensor_and_matrix())
def test_a_mode_product_equals_the_reference(library, case):
    tensor, matrix, mode = case
    result = tucka.mode_product(library.from_numpy(tensor), library.from_numpy(matrix), mode=mode)
    assert_close(library.to_numpy(result), reference.mode_product(tensor, matrix, mode), eps=library.eps, terms=4)


@given(data=st.data())
def test_mode_products_on_different_modes_commute(library, data):
    shape = data.draw(shapes.filter(lambda shape: len(shape) >= 2))
    tensor = data.draw(arrays(*shape))
    modes = data.draw(st.permutations(range(len(shape))))
    matrices = [data.draw(arrays(data.draw(sizes), shape[mode])) for mode in modes]
    to = library.from_numpy
    there = tucka.multi_mode_product(to(tensor), [to(matrix) for matrix in matrices], modes=modes)
    back = tucka.multi_mode_product(to(tensor), [to(matrix) for matrix in matrices[::-1]], modes=modes[::-1])
    scale = float(np.prod([np.abs(part).sum() + 1 for part in [tensor, *matrices]]))
    assert_close(library.to_numpy(there), library.to_numpy(back), eps=library.eps, scale=scale)


def test_a_wrong_size_names_argument_rule_and_value():
    with pytest.raises(tucka.ShapeError, match=r"matrix: expected size 3 along axis 1 to match mode 1 of tensor"):
        tucka.mode_product(np.ones((2, 3)), np.ones((5, 4)), mode=1)
