"""The rotation that all experts have in common."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tucka
from support.close import assert_close
from support.strategies import arrays
from tucka import reference

bases = st.tuples(st.integers(1, 9), st.integers(1, 6)).flatmap(lambda shape: arrays(*shape))


@given(basis=bases, strength=st.none() | st.floats(-3.0, 3.0))
def test_the_core_is_that_of_the_reference(library, basis, strength):
    core = library.to_numpy(tucka.rotation_core(library.from_numpy(basis), strength=strength))
    given = np.asarray(basis, dtype=np.float64)
    rotation = reference.rotation(given, strength)
    # Rounding counts with the size of the products UᵀU, which the equations are made of, and of U twice more.
    size = (1.0 + 6.0 * float(np.square(given).sum())) ** 2
    assert_close(np.eye(len(given)) + given @ core @ given.T, rotation, eps=library.eps * size, terms=len(given))


@given(basis=bases, factor=st.sampled_from([1e-3, 1.0, 30.0]))
def test_lengths_and_angles_stay(basis, factor):
    basis = np.asarray(basis, dtype=np.float64) * factor
    rotation = np.eye(len(basis)) + basis @ tucka.rotation_core(basis) @ basis.T
    tolerance = 1e-12 * (1.0 + 6.0 * np.square(basis).sum()) ** 2
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(len(basis)), atol=tolerance)
    assert np.linalg.det(rotation) == pytest.approx(1.0, abs=10 * tolerance)


@given(seed=st.integers(0, 99), rank=st.integers(2, 6), length=st.floats(0.01, 10.0))
def test_a_plane_turns_by_an_angle_that_the_lengths_of_its_columns_give(seed, rank, length):
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((9, rank)))[0]
    pair = basis[:, [0, rank - rank // 2]] * [1.0, length]
    basis[:, [0, rank - rank // 2]] = pair
    turned = pair[:, 0] + pair[:, 0] @ basis @ tucka.rotation_core(basis) @ basis.T
    angle = 2 * np.arctan(np.sqrt(8 / rank) / 2 * length)
    np.testing.assert_allclose(turned, np.cos(angle) * pair[:, 0] + np.sin(angle) * pair[:, 1] / length, atol=1e-9)


@given(basis=bases)
def test_nothing_turns_to_the_last_bit_while_the_second_half_is_zero(library, basis):
    read = basis.shape[1] - basis.shape[1] // 2
    basis = np.concatenate([basis[:, :read], np.zeros_like(basis[:, read:])], axis=1)
    core = library.to_numpy(tucka.rotation_core(library.from_numpy(basis)))
    assert not (basis @ core @ basis.T).any()


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), "1"])
def test_a_strength_that_is_no_number_is_refused(strength):
    with pytest.raises(tucka.ConfigError, match="strength: "):
        tucka.rotation_core(np.ones((3, 2)), strength=strength)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1)])
def test_another_shape_is_refused(shape):
    with pytest.raises(tucka.ShapeError, match=r"basis: .*\(d, r\)"):
        tucka.rotation_core(np.ones(shape))
