"""Products of reflections, their compact form, and the experts they are."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import tucka
from support.close import assert_close
from support.strategies import arrays, unit_columns
from tucka import reference


def growth(vectors):
    """How much rounding grows with the number of reflections: each step of Γ at most triples an entry."""
    return {"terms": vectors.size, "scale": 3.0 ** vectors.shape[1]}


@given(vectors=unit_columns())
def test_gamma_equals_the_recursion_of_the_reference(library, vectors):
    gamma = library.to_numpy(tucka.householder_gamma(library.from_numpy(vectors)))
    assert_close(gamma, reference.householder_gamma(vectors), eps=library.eps, **growth(vectors))


@given(vectors=unit_columns())
def test_the_compact_form_equals_the_product_of_the_reflections(library, vectors):
    gamma = library.to_numpy(tucka.householder_gamma(library.from_numpy(vectors)))
    compact = np.eye(len(vectors)) + vectors @ gamma @ vectors.T
    assert_close(compact, reference.householder_product(vectors), eps=library.eps, **growth(vectors))


@given(vectors=unit_columns())
def test_gamma_is_upper_triangular_with_minus_two_on_its_diagonal(library, vectors):
    gamma = library.to_numpy(tucka.householder_gamma(library.from_numpy(vectors)))
    np.testing.assert_array_equal(np.tril(gamma, -1), 0)
    np.testing.assert_allclose(np.diag(gamma), -2.0, rtol=4 * library.eps)


@given(vectors=unit_columns())
def test_the_product_equals_the_reference(library, vectors):
    product = library.to_numpy(tucka.householder_product(library.from_numpy(vectors)))
    assert_close(product, reference.householder_product(vectors), eps=library.eps, terms=vectors.size)


@given(vectors=unit_columns())
def test_the_product_is_orthogonal_and_each_reflection_flips_its_determinant(library, vectors):
    product = library.to_numpy(tucka.householder_product(library.from_numpy(vectors)))
    close = {"eps": library.eps, "terms": vectors.size}
    assert_close(product @ product.T, np.eye(len(vectors)), **close)
    assert_close(np.linalg.det(product), (-1.0) ** vectors.shape[1], **close)


@given(vectors=unit_columns())
def test_reversing_the_columns_inverts_the_product(library, vectors):
    there = library.to_numpy(tucka.householder_product(library.from_numpy(vectors)))
    back = library.to_numpy(tucka.householder_product(library.from_numpy(vectors[:, ::-1].copy())))
    assert_close(there @ back, np.eye(len(vectors)), eps=library.eps, terms=vectors.size)


@given(vectors=unit_columns())
def test_reversing_the_columns_transposes_the_product(library, vectors):
    there = library.to_numpy(tucka.householder_product(library.from_numpy(vectors)))
    back = library.to_numpy(tucka.householder_product(library.from_numpy(vectors[:, ::-1].copy())))
    assert_close(back, there.T, eps=library.eps, terms=vectors.size)


@given(vectors=unit_columns(), data=st.data())
def test_applying_the_experts_is_multiplying_by_the_product(library, vectors, data):
    x = data.draw(arrays(2, len(vectors)))
    experts = tucka.householder_experts(library.from_numpy(vectors))
    applied = experts.apply(library.from_numpy(x), library.from_numpy(np.ones((1, 1))))
    desired = x @ reference.householder_product(vectors)
    close = growth(vectors)
    assert_close(library.to_numpy(applied), desired, eps=library.eps, terms=close["terms"], scale=4 * close["scale"])


@given(vectors=unit_columns())
def test_the_experts_are_one_group_of_one(library, vectors):
    experts = tucka.householder_experts(library.from_numpy(vectors))
    assert (experts.groups, experts.experts_per_group) == (1, 1)
    assert experts.n_parameters == vectors.size + vectors.shape[1] ** 2 + 1


def test_pairs_of_equal_reflections_cancel(library):
    unit = np.array([[0.6], [0.0], [0.8]])
    vectors = library.from_numpy(np.hstack([unit, unit]))
    assert_close(library.to_numpy(tucka.householder_product(vectors)), np.eye(3), eps=library.eps)
    norm = library.to_numpy(tucka.householder_experts(vectors).norm(0))
    assert_close(norm, np.zeros(()), eps=library.eps)
