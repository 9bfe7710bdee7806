"""Reflections: PEFT's own outputs and gradients, the start as the identity, and clear errors."""

import pytest
import torch
from torch import nn

from tucka.backends.torch import HouseholderAdapter, householder_adapt
from tucka.backends.torch.householder import unit_columns
from tucka.errors import ConfigError, ShapeError, TuckaError


def with_columns(x, layer, columns, orthonormal):
    # I − 2 Q Qᵀ is the same for every orthonormal basis Q of the columns, Gram-Schmidt's among them.
    unit = torch.linalg.qr(columns).Q if orthonormal else unit_columns(columns)
    return layer(householder_adapt(x, unit, reverse=True, orthonormal=orthonormal))


@pytest.mark.parametrize("apply_gs", [False, True])
@pytest.mark.parametrize("r", [1, 4, 7, 8])
def test_equal_to_pefts_hra(r, apply_gs):
    peft = pytest.importorskip("peft")
    torch.manual_seed(r)
    base = nn.Sequential(nn.Linear(64, 48))
    config = peft.HRAConfig(r=r, apply_GS=apply_gs, init_weights=False, target_modules=["0"])
    theirs = peft.get_peft_model(base, config)
    parameter = theirs.base_model.model[0].hra_u["default"]
    ours = parameter.detach().clone().requires_grad_()
    x = torch.randn(5, 64)
    x_theirs, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn(5, 48)
    expected = theirs(x_theirs)
    actual = with_columns(x_ours, theirs.base_model.model[0].base_layer, ours, apply_gs)
    (expected * weights).sum().backward()
    (actual * weights).sum().backward()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, atol=1e-5, rtol=1e-5)
    # The columns are short (norms well below 1), which makes their gradients large.
    torch.testing.assert_close(ours.grad, parameter.grad, atol=1e-5 * float(parameter.grad.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("r", [2, 8])
def test_starts_as_the_identity(r):
    layer = nn.Linear(16, 4)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(HouseholderAdapter(layer, r)(x), layer(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(HouseholderAdapter(layer, r, init_weights=False)(x), layer(x), atol=1e-2)


def test_an_odd_number_starts_as_one_reflection_and_says_so():
    with pytest.warns(UserWarning, match="r: expected an even r for a start as the identity, got 3"):
        adapter = HouseholderAdapter(nn.Identity(), 3, in_features=6)
    product = adapter(torch.eye(6))
    torch.testing.assert_close(torch.linalg.det(product), torch.tensor(-1.0))
    torch.testing.assert_close(product, householder_adapt(torch.eye(6), unit_columns(adapter.vectors[:, 2:])))


def test_keeps_lengths():
    x = torch.randn(3, 5, 16)
    adapted = HouseholderAdapter(nn.Identity(), 4, in_features=16, init_weights=False)(x)
    torch.testing.assert_close(adapted.norm(dim=-1), x.norm(dim=-1))


def test_columns_of_any_length_give_the_product_as_written():
    vectors = torch.randn(4, 3, dtype=torch.float64)
    product = torch.eye(4, dtype=torch.float64)
    for u in vectors.unbind(dim=1):
        product = product @ (torch.eye(4, dtype=torch.float64) - 2 * torch.outer(u, u))
    torch.testing.assert_close(householder_adapt(torch.eye(4, dtype=torch.float64), vectors), product)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype):
    layer = nn.Linear(16, 4).to(dtype)
    adapter = HouseholderAdapter(layer, 4)
    x = torch.randn(3, 16).to(dtype)
    assert adapter(x).dtype == dtype
    torch.testing.assert_close(adapter(x), layer(x), atol=0.05, rtol=0.05)


def test_convolutions_are_adapted_along_their_channels():
    layer = nn.Conv2d(6, 4, 3, padding=1)
    adapter = HouseholderAdapter(layer, 3, init_weights=False)
    x = torch.randn(2, 6, 5, 7)
    rows = householder_adapt(x.movedim(1, -1), unit_columns(adapter.vectors))
    torch.testing.assert_close(adapter(x), layer(rows.movedim(-1, 1)))


def test_zero_columns_are_refused():
    adapter = HouseholderAdapter(nn.Linear(4, 2), 2)
    adapter.vectors.data[:, 1] = 0
    with pytest.raises(TuckaError, match=r"vectors: expected columns that are not zero, got zero columns \[1\]"):
        adapter(torch.ones(1, 4))


def test_more_reflections_than_channels_are_refused():
    with pytest.raises(ConfigError, match="r: expected at most the layer's width 4, got 5"):
        HouseholderAdapter(nn.Linear(4, 2), 5)
    with pytest.raises(ShapeError, match=r"vectors: expected at most 2 columns, got shape \(2, 3\)"):
        householder_adapt(torch.ones(1, 2), torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"x: expected axes \(\.\.\., d\) with d = 2"):
        householder_adapt(torch.ones(1, 3), torch.ones(2, 1))
