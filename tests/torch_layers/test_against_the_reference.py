"""The torch functions compute the paper's equations: compared with the loops of the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.close import assert_close, largest
from support.strategies import arrays, factors, leads, tucker_parts, unit_columns
from tucka import reference
from tucka.backends.torch import householder_adapt, mix_cores, tucker_adapt, tucker_adapt_gated

EPS = 2.0**-52
depths = pytest.mark.parametrize("depth", [0, 1, 2, 3])


def tensors(*values):
    return [torch.tensor(value) for value in values]


@st.composite
def adaptations(draw, depth):
    """Parts, activations, and gates for the first `depth` axes of the activations."""
    parts = draw(tucker_parts())
    lead = (2, 1, 3)[:depth] if draw(st.booleans()) else (2, 1, 3)
    gates = draw(arrays(*lead[:depth], *parts.gate_shape))
    return parts, draw(arrays(*lead, parts.width)), gates, draw(factors)


def close(actual, desired, parts, x, gates, alpha):
    scale = largest(x, gates, alpha, *parts.all, parts.basis)
    assert_close(actual, desired, eps=EPS, terms=parts.terms, scale=scale)


@depths
@given(data=st.data())
def test_gated_adaptation_is_the_equation(depth, data):
    parts, x, gates, alpha = data.draw(adaptations(depth))
    desired = reference.adapt(x, gates, *parts.all, alpha=alpha)
    actual = tucker_adapt_gated(*tensors(x, parts.basis, parts.cores, parts.expert_factor, gates), alpha=alpha)
    close(actual, desired, parts, x, gates, alpha)


@depths
@given(data=st.data())
def test_mixing_first_is_the_same(depth, data):
    parts, x, gates, alpha = data.draw(adaptations(depth))
    mixed = mix_cores(*tensors(parts.cores, parts.expert_factor, gates))
    actual = tucker_adapt(*tensors(x, parts.basis), mixed, alpha=alpha)
    close(actual, reference.adapt(x, gates, *parts.all, alpha=alpha), parts, x, gates, alpha)


@given(unit_columns(), leads, st.data())
def test_householder_adaptation_is_the_product_of_reflections(vectors, lead, data):
    x = data.draw(arrays(*lead, vectors.shape[0]))
    product = reference.householder_product(vectors)
    actual = householder_adapt(*tensors(x, vectors))
    assert_close(actual, x @ product, eps=EPS, terms=vectors.size, scale=largest(x))
    reversed_order = householder_adapt(*tensors(x, vectors), reverse=True)
    assert_close(reversed_order, x @ product.T, eps=EPS, terms=vectors.size, scale=largest(x))


@given(unit_columns())
def test_householder_adaptation_of_orthonormal_columns(vectors):
    orthonormal = np.linalg.qr(vectors)[0]
    actual = householder_adapt(
        torch.eye(vectors.shape[0], dtype=torch.float64), torch.tensor(orthonormal), orthonormal=True
    )
    assert_close(actual, reference.householder_product(orthonormal), eps=EPS, terms=vectors.size)
