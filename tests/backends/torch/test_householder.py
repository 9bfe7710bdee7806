"""Reflections: the adapter's contract, PEFT's own outputs and gradients, columns of any scale, and clear errors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import tucka
from support.adapter_contract import RANK, AdapterContract, as_arrays
from support.close import assert_close, largest
from support.strategies import arrays, leads, unit_columns
from tucka import reference
from tucka.backends.torch import HouseholderAdapter, householder_adapt
from tucka.backends.torch.householder import householder_gamma
from tucka.errors import ArrayError, ConfigError, ShapeError, TuckaError

EPS = 2.0**-52


class TestHouseholderAdapter(AdapterContract):
    starts_exactly = False
    where = "HouseholderAdapter around Linear(in_features=6, out_features=4, bias=True)"

    def create(self, layer, *, init_weights=False):
        return HouseholderAdapter(layer, RANK, init_weights=init_weights)

    def evaluate(self, adapter, x):
        (vectors,) = as_arrays(adapter.vectors)
        return x @ reference.householder_product(vectors / np.linalg.norm(vectors, axis=0))


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


# The function.


@given(unit_columns(), leads, st.data())
def test_it_is_the_product_of_reflections_and_reversed_columns_transpose_it(vectors, lead, data):
    x = data.draw(arrays(*lead, vectors.shape[0]))
    product = reference.householder_product(vectors)
    given_x, columns = torch.tensor(x), torch.tensor(vectors)
    for actual, desired in (
        (householder_adapt(given_x, columns), x @ product),
        (householder_adapt(given_x, columns.flip(1)), x @ product.T),
    ):
        assert_close(actual, desired, eps=EPS, terms=vectors.size, scale=largest(x))


@given(unit_columns())
def test_orthonormal_columns_give_one_reflection_of_their_space(vectors):
    orthonormal = np.linalg.qr(vectors)[0]
    actual = householder_adapt(torch.eye(vectors.shape[0], dtype=torch.float64), torch.tensor(orthonormal))
    assert_close(actual, np.eye(len(orthonormal)) - 2 * orthonormal @ orthonormal.T, eps=EPS, terms=vectors.size)


@given(unit_columns())
def test_gamma_is_that_of_the_core(vectors):
    assert_close(householder_gamma(torch.tensor(vectors)), tucka.householder_gamma(vectors), eps=EPS, terms=64)


def test_columns_of_any_length_give_the_product_as_written():
    vectors = torch.randn(4, 3, dtype=torch.float64)
    product = torch.eye(4, dtype=torch.float64)
    for u in vectors.unbind(dim=1):
        product = product @ (torch.eye(4, dtype=torch.float64) - 2 * torch.outer(u, u))
    torch.testing.assert_close(householder_adapt(torch.eye(4, dtype=torch.float64), vectors), product)


def test_first_second_forward_mode_and_batched_derivatives():
    torch.manual_seed(0)
    inputs = leaf(2, 3), leaf(3, 2)
    assert gradcheck(householder_adapt, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(householder_adapt, inputs)


@pytest.mark.parametrize(
    ("x", "vectors", "error", "words"),
    [
        (torch.ones(1, 2), torch.ones(2, 3), ShapeError, ["vectors", "at most 2 columns"]),
        (torch.ones(1, 2), torch.ones(2), ShapeError, ["vectors", "(d, r)"]),
        (torch.ones(1, 3), torch.ones(2, 1), ShapeError, ["x", "d = 2", "vectors"]),
        (torch.ones(1, 2).long(), torch.ones(2, 1), ArrayError, ["x", "floating-point", "Convert"]),
        (torch.ones(1, 2), np.ones((2, 1)), ArrayError, ["vectors", "torch tensor", "numpy.ndarray"]),
        (torch.ones(1, 2), torch.ones(2, 1, device="meta"), ArrayError, ["vectors", "cpu", "Move"]),
    ],
)
def test_arguments_that_do_not_fit(x, vectors, error, words):
    with pytest.raises(error, match=f"^{words[0]}: expected") as raised:
        householder_adapt(x, vectors)
    assert all(word in str(raised.value) for word in [*words, "householder_adapt"])


# The adapter.


@pytest.mark.parametrize("apply_gs", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 7, 8])
def test_equal_to_pefts_hra(rank, apply_gs):
    peft = pytest.importorskip("peft")
    torch.manual_seed(rank)
    base = nn.Sequential(nn.Linear(64, 48))
    config = peft.HRAConfig(r=rank, apply_GS=apply_gs, init_weights=False, target_modules=["0"])
    theirs = peft.get_peft_model(base, config)
    parameter, layer = theirs.base_model.model[0].hra_u["default"], theirs.base_model.model[0].base_layer
    ours = parameter.detach().clone().requires_grad_()
    x, weights = torch.randn(5, 64), torch.randn(5, 48)
    x_theirs, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = theirs(x_theirs)
    # I − 2 Q Qᵀ is the same for every orthonormal basis Q of the columns, Gram-Schmidt's among them.
    unit = torch.linalg.qr(ours).Q if apply_gs else ours / ours.norm(dim=0)
    actual = layer(householder_adapt(x_ours, unit.flip(1)))
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, atol=1e-5, rtol=1e-5)
    # The columns are short (norms well below 1), which makes their gradients large.
    torch.testing.assert_close(ours.grad, parameter.grad, atol=1e-5 * float(parameter.grad.abs().max()), rtol=1e-5)


def test_an_odd_rank_starts_as_one_reflection_and_warns():
    with pytest.warns(UserWarning, match="rank: expected an even rank .*, got 3 .*init_weights=False") as warned:
        adapter = HouseholderAdapter(nn.Identity(), 3, in_features=6)
    assert warned[0].filename == __file__
    product = adapter(torch.eye(6))
    torch.testing.assert_close(torch.linalg.det(product), torch.tensor(-1.0))
    torch.testing.assert_close(product, householder_adapt(torch.eye(6), adapter.unit_vectors()[:, 2:]))


def test_keeps_lengths():
    x = torch.randn(3, 5, 16)
    adapted = HouseholderAdapter(nn.Identity(), 4, in_features=16, init_weights=False)(x)
    torch.testing.assert_close(adapted.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("scales", [[1e25, 1e25], [1e-25, 1e-25], [1e30, 1e-30]], ids=str)
def test_columns_of_any_scale_give_the_same_outputs_and_gradients_in_proportion(scales):
    torch.manual_seed(0)
    adapter = HouseholderAdapter(nn.Identity(), 2, in_features=5, init_weights=False)
    x, weights, scales = torch.randn(3, 5), torch.randn(3, 5), torch.tensor(scales)

    def run():
        adapter.zero_grad()
        result = adapter(x)
        (result * weights).sum().backward()
        return result.detach(), adapter.vectors.grad

    desired, gradient = run()
    adapter.vectors.data *= scales
    scaled, of_scaled = run()
    torch.testing.assert_close(scaled, desired)
    torch.testing.assert_close(of_scaled * scales, gradient)


def test_derivatives_of_the_columns_in_float64():
    torch.manual_seed(0)
    adapter = HouseholderAdapter(nn.Identity(), 2, in_features=4, init_weights=False).double()

    def run(vectors):
        return torch.func.functional_call(adapter, {"vectors": vectors}, (torch.eye(4, dtype=torch.float64),))

    vectors = adapter.vectors.detach().clone().requires_grad_()
    assert gradcheck(run, vectors, check_forward_ad=True)
    assert gradgradcheck(run, vectors)


def test_zero_columns_are_refused():
    adapter = HouseholderAdapter(nn.Linear(4, 2), 2)
    adapter.vectors.data[:, 1] = 0
    with pytest.raises(TuckaError, match=r"vectors: expected columns .* columns \[1\] .*around Linear.*random"):
        adapter(torch.ones(1, 4))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rank": 5}, ["rank: expected", "width 4", "smaller"]),
        ({"rank": 0}, ["rank: expected", "at least 1"]),
        ({"rank": 2.0}, ["rank: expected", "whole number"]),
        ({"rank": 2, "in_features": 0}, ["in_features: expected", "at least 1"]),
        ({"r": 2}, ["r: expected", "rank"]),
    ],
)
def test_wrong_sizes_and_words(arguments, words):
    with pytest.raises(ConfigError) as raised:
        HouseholderAdapter(nn.Linear(4, 2), **arguments)
    assert all(word in str(raised.value) for word in words)
