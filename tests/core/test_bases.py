"""A basis whose columns stay shorter than one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tucka
from support.close import assert_close
from support.strategies import arrays
from tucka import reference

bases = st.tuples(st.integers(1, 9), st.integers(1, 5)).flatmap(lambda shape: arrays(*shape))


@given(basis=bases)
def test_the_columns_equal_the_reference(library, basis):
    made = library.to_numpy(tucka.soft_unit_columns(library.from_numpy(basis)))
    assert_close(made, reference.soft_unit_columns(basis), eps=library.eps, terms=len(basis))


@given(basis=bases, factor=st.sampled_from([1.0, 1e3, 1e25, 1e-30]))
def test_no_column_reaches_length_one_and_none_turns(library, basis, factor):
    basis = basis.astype(np.float32) * np.float32(factor)
    made = np.asarray(library.to_numpy(tucka.soft_unit_columns(library.from_numpy(basis))), dtype=np.float64)
    lengths = np.linalg.norm(basis.astype(np.float64), axis=0)
    assert np.isfinite(made).all()
    np.testing.assert_allclose(made * np.hypot(lengths, 0.25), basis, rtol=1e-4, atol=1e-30)
    assert (np.linalg.norm(made, axis=0) <= 1 + 1e-5).all()


def test_a_short_column_becomes_four_times_as_long(library):
    made = library.to_numpy(tucka.soft_unit_columns(library.from_numpy(np.full((2, 1), 1e-4))))
    np.testing.assert_allclose(made, 4e-4, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1)])
def test_another_shape_is_refused(shape):
    with pytest.raises(tucka.ShapeError, match=r"basis: .*\(d, r\)"):
        tucka.soft_unit_columns(np.ones(shape))
