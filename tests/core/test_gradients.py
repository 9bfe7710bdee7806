"""Gradients flow through every function of arrays, and are those of finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import tucka
from support.functions_of_arrays import CASES

every_function = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_function
def test_torch_gradients_are_those_of_finite_differences(case):
    inputs = [torch.tensor(values, requires_grad=True) for values in case.values()]
    assert torch.autograd.gradcheck(case.function, inputs)


@every_function
def test_jax_gradients_are_those_of_finite_differences(case):
    inputs = case.values()
    rng = np.random.default_rng(0)
    weights, directions = rng.normal(size=case.function(*inputs).shape), [rng.normal(size=x.shape) for x in inputs]
    places = tuple(range(len(inputs)))
    slope = jax.jit(jax.grad(lambda *arrays: jnp.sum(case.function(*arrays) * weights), argnums=places))
    gradients = slope(*(jnp.asarray(values, jnp.float32) for values in inputs))
    # The differences are taken on NumPy's float64, so that only the gradient itself is rounded to float32.
    step = 1e-6
    ahead, behind = (
        case.function(*(x + sign * step * direction for x, direction in zip(inputs, directions, strict=True)))
        for sign in (1, -1)
    )
    products = [np.asarray(gradient) * direction for gradient, direction in zip(gradients, directions, strict=True)]
    scale = max(1.0, *(float(np.abs(product).sum()) for product in products))
    desired = np.sum((ahead - behind) * weights) / (2 * step)
    np.testing.assert_allclose(sum(product.sum() for product in products), desired, rtol=0, atol=1e-5 * scale)


def gradient_of_gates(logits):
    logits = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    gates = tucka.select_gates(logits)
    (gates * torch.arange(gates.numel()).reshape(gates.shape)).sum().backward()
    return logits.grad.numpy()


def test_one_expert_in_a_group_gives_its_logit_a_gradient_of_zero():
    np.testing.assert_array_equal(gradient_of_gates([[3.0], [1.0]]), [[0.0], [0.0]])


def test_infinity_in_another_group_or_an_excluded_expert_leaves_the_gradient_finite():
    gradient = gradient_of_gates([[1.0, 2.0, -np.inf], [-np.inf, -np.inf, -np.inf]])
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[0, :2]).min() > 0


def test_saturating_logits_leave_the_gradient_finite():
    assert np.isfinite(gradient_of_gates([[1e4, -1e4], [-1e4, 0.0]])).all()


@pytest.mark.parametrize("affinity", ["group_norm", "directional"])
def test_a_feature_of_zero_has_a_finite_gradient(affinity):
    feature = torch.zeros(3, requires_grad=True)
    tucka.affinity_logits(feature, torch.ones(2, 2, 3), affinity=affinity).sum().backward()
    assert torch.isfinite(feature.grad).all()


@pytest.mark.parametrize("affinity", ["group_norm", "directional"])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_the_gradient_of_a_very_small_or_large_feature_is_that_of_a_moderate_one(affinity, scale):
    gradients = []
    for factor in (1.0, scale):
        feature = (torch.tensor([0.5, -2.0, 1.0]) * factor).requires_grad_()
        centroids = torch.arange(12.0).reshape(2, 2, 3).requires_grad_()
        logits = tucka.affinity_logits(feature, centroids, affinity=affinity)
        (logits * torch.arange(4.0).reshape(2, 2)).sum().backward()
        gradients.append((feature.grad * factor, centroids.grad))
    for actual, desired in zip(*gradients[::-1], strict=True):
        torch.testing.assert_close(actual, desired, rtol=1e-4, atol=1e-5)


def test_the_norm_has_second_derivatives():
    case = next(case for case in CASES if case.name == "norm")
    inputs = [torch.tensor(values, requires_grad=True) for values in case.values()]
    assert torch.autograd.gradgradcheck(case.function, inputs)


def test_the_norm_has_a_gradient_where_columns_depend_on_each_other():
    basis = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], dtype=torch.float64, requires_grad=True)
    cores, factor = torch.tensor([[[[2.0, 1.0], [0.0, 3.0]]]], dtype=torch.float64), torch.ones(1, 1).double()
    assert torch.autograd.gradcheck(lambda basis: tucka.TuckerExperts(cores, factor, basis).norm(0), [basis])


def test_experts_of_zero_have_a_norm_with_a_finite_gradient():
    cores = torch.zeros(1, 1, 2, 2, requires_grad=True)
    tucka.TuckerExperts(cores, torch.ones(1, 1), torch.eye(3)[:, :2]).norm(0).backward()
    assert torch.isfinite(cores.grad).all()


def test_masked_nan_does_not_reach_the_gradient():
    hidden = torch.tensor([[[1.0], [torch.nan]]], requires_grad=True)
    tucka.routing_feature(hidden, mask=torch.tensor([[1, 0]])).sum().backward()
    np.testing.assert_array_equal(hidden.grad.numpy(), [[[1.0], [0.0]]])
