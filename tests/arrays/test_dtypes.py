"""Dtypes, derivatives, and the way to the host."""

import jax
import numpy as np
import pytest
import torch

import tucka
from tucka.arrays import array_like, cast, detach, finite_values, host_values, is_half, widen


def test_casting_keeps_gradients_and_does_nothing_twice():
    tensor = torch.ones(2, requires_grad=True)
    assert cast(tensor, torch.float32) is tensor
    cast(tensor, torch.float64).sum().backward()
    np.testing.assert_array_equal(tensor.grad, [1.0, 1.0])


def test_widening_changes_half_precision_alone(library):
    for name, dtype in library.dtypes.items():
        array = cast(library.from_numpy(np.ones(2)), dtype)
        half = name in {"float16", "bfloat16"}
        assert is_half(array) == half
        assert (widen(array) is array) != half
        assert str(widen(array).dtype).endswith("float32" if half else name)


def test_host_values_are_a_copy_in_double_precision(library):
    for dtype in library.dtypes.values():
        array = cast(library.from_numpy(np.ones(2)), dtype)
        values = host_values(array)
        assert (type(values), values.dtype) == (np.ndarray, np.float64)
        values[0] = 5.0
        np.testing.assert_array_equal(host_values(array), [1.0, 1.0])


def test_host_values_leave_the_gradient_behind():
    np.testing.assert_array_equal(host_values(torch.ones(2, dtype=torch.bfloat16, requires_grad=True)), [1.0, 1.0])


def test_a_detached_array_is_a_constant(library):
    array = library.from_numpy(np.array([3.0]))
    np.testing.assert_array_equal(library.to_numpy(detach(array)), [3.0])
    tensor = torch.tensor(3.0, requires_grad=True)
    (tensor * detach(tensor)).backward()
    assert float(tensor.grad) == 3.0
    assert float(jax.grad(lambda x: x * detach(x))(3.0)) == 3.0


def test_values_become_like_an_array_and_have_no_gradient(library):
    for dtype in library.dtypes.values():
        like = cast(library.from_numpy(np.zeros(1)), dtype)
        made = array_like(np.array([1.0, 2.0]), like)
        assert made.dtype == like.dtype
        np.testing.assert_array_equal(library.to_numpy(made), [1.0, 2.0])
    assert not array_like(np.ones(2), torch.ones(1, requires_grad=True)).requires_grad


@pytest.mark.parametrize("values", [[1.0, float("nan")], np.array([np.inf]), torch.tensor([-torch.inf])])
def test_numbers_that_must_be_finite_are_looked_at(values):
    with pytest.raises(tucka.ConfigError, match=r"^load: .*finite.*example"):
        finite_values("load", values, where="example")


@pytest.mark.parametrize("values", ["abc", None, [1.0, "x"], [[1.0], [1.0, 2.0]]])
def test_what_holds_no_numbers_is_refused(values):
    with pytest.raises(tucka.ArrayError, match=r"^load: "):
        finite_values("load", values, where="example")
