"""The router's own gates are the reference's, with its gradients, and ask for less."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from torch.autograd import gradcheck, gradgradcheck

import tucka
from tucka import reference
from tucka.backends.torch.routing.router import gates_of

LOGITS = arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 3)), elements=st.floats(-700, 700))


@given(logits=LOGITS, normalize=st.booleans())
def test_gates_are_those_of_the_reference(logits, normalize):
    desired = reference.select_gates(logits, normalize)
    np.testing.assert_allclose(gates_of(torch.from_numpy(logits), normalize=normalize), desired, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("normalize", [True, False])
def test_gates_and_gradients_are_those_of_the_core(lead, normalize):
    torch.manual_seed(0)
    logits = torch.randn(*lead, 4, 2, dtype=torch.float64).requires_grad_()
    weights = torch.randn(*lead, 4, 2, dtype=torch.float64)
    pairs = []
    for gates in (gates_of(logits, normalize=normalize), tucka.select_gates(logits, normalize=normalize)):
        pairs.append((gates.detach(), torch.autograd.grad((gates * weights).sum(), logits)[0]))
    torch.testing.assert_close(*pairs)


@pytest.mark.parametrize(
    "values", [[[1.0, -torch.inf], [0.0, 0.5]], [[torch.nan, 0.0], [3.0, 4.0]], [[torch.inf, 0.0]]]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_infinities_and_nan_are_treated_as_in_the_core(values, normalize):
    logits = torch.tensor(values, dtype=torch.float64)
    desired = tucka.select_gates(logits, normalize=normalize)
    torch.testing.assert_close(gates_of(logits, normalize=normalize), desired, equal_nan=True)


def test_an_infinity_in_another_group_does_not_reach_the_gradient():
    logits = torch.tensor([[1.0, 2.0], [-torch.inf, 0.5]], requires_grad=True)
    (gradient,) = torch.autograd.grad(gates_of(logits, normalize=True)[0, 0], logits)
    assert gradient[0].abs().min() > 0
    assert not gradient[1].any()


@pytest.mark.parametrize("normalize", [True, False])
def test_derivatives(normalize):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda given: gates_of(given, normalize=normalize), logits, check_forward_ad=True)
    assert gradgradcheck(lambda given: gates_of(given, normalize=normalize), logits)
