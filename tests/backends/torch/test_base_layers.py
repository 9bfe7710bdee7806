"""What an adapter asks of a layer: its width, and its weight where it can be read."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from tucka.backends.torch import HouseholderAdapter, TuckerAdapter
from tucka.backends.torch.base_layers import (
    from_rows,
    input_axis,
    is_readable,
    open_weight,
    step_gain,
    weight_rows,
    width_of,
)
from tucka.errors import ConfigError
from tucka.spec import TuckerSpec

WIDTH = 6
sizes = st.floats(0.1, 10.0)  # within the bounds of a gain


# Which width.


@pytest.mark.parametrize(
    "layer", [nn.Linear(WIDTH, 9), Conv1D(9, WIDTH), nn.Conv2d(WIDTH, 9, 3), nn.ConvTranspose1d(WIDTH, 9, 2)], ids=str
)
def test_layers_that_tell_their_width(layer):
    assert width_of(layer, "example") == WIDTH


def test_a_given_width_goes_before_what_a_layer_tells():
    packed = nn.Linear(WIDTH, 9)
    packed.in_features = 3  # as some quantised layers, which count packed numbers
    assert width_of(packed, "example", WIDTH) == WIDTH


@pytest.mark.parametrize("adapt", [lambda *a, **k: TuckerAdapter(a[0], TuckerSpec(rank=2), **k), HouseholderAdapter])
@pytest.mark.parametrize(
    ("layer", "options", "words"),
    [
        (nn.Conv2d(8, 4, 3, groups=2), {}, ["base_layer:", "groups=1", "groups=2"]),
        (nn.MultiheadAttention(8, 2), {}, ["base_layer:", "MultiheadAttention", "Use an attention"]),
        (nn.MultiheadAttention(8, 2), {"in_features": 8}, ["base_layer:", "MultiheadAttention"]),
        (nn.ReLU(), {}, ["base_layer:", "in_features", "ReLU", "Pass in_features"]),
        (nn.ReLU(), {"in_features": 2.5}, ["in_features:", "whole number", "2.5"]),
        (nn.LazyLinear(4), {}, ["in_features:", "at least 1", "0"]),
    ],
)
def test_layers_that_cannot_be_adapted(adapt, layer, options, words):
    with pytest.raises(ConfigError) as raised:
        adapt(layer, 2, **options)
    assert all(word in str(raised.value) for word in [*words, "Adapter"])


# Which weight.


def layer_of(kind):
    torch.manual_seed(0)
    layer = {
        "linear": lambda: nn.Linear(WIDTH, 9),
        "Conv1D": lambda: Conv1D(9, WIDTH),
        "convolution": lambda: nn.Conv2d(WIDTH, 9, 3),
        "transposed": lambda: nn.ConvTranspose1d(WIDTH, 9, 2),
    }[kind]()
    nn.init.normal_(layer.weight)
    return layer


kinds = pytest.mark.parametrize("kind", ["linear", "Conv1D", "convolution", "transposed"])


def test_what_is_readable():
    linear = nn.Linear(WIDTH, 9)
    assert is_readable(torch.ones(9, WIDTH), linear, WIDTH)
    assert not is_readable(torch.ones(WIDTH, 9), linear, WIDTH)
    assert not is_readable(torch.ones(9 * WIDTH), linear, WIDTH)
    assert not is_readable(torch.ones(9, WIDTH, dtype=torch.int8), linear, WIDTH)
    linear.weight = None
    assert open_weight(linear, WIDTH) is None


@kinds
@torch.no_grad()
def test_rows_are_outputs(kind):
    layer = layer_of(kind)
    rows, x = weight_rows(layer.weight, input_axis(layer)), torch.randn(WIDTH)
    if kind == "convolution":  # an input at the middle of the kernel alone
        rows, image = rows.reshape(9, 3, 3, WIDTH)[:, 1, 1], torch.zeros(WIDTH, 3, 3)
        image[:, 1, 1] = x
        found = layer(image)[:, 0, 0]
    elif kind == "transposed":
        rows, found = rows.reshape(9, 2, WIDTH)[:, 1], layer(x[:, None])[:, 1]
    else:
        found = layer(x)
    torch.testing.assert_close(found, rows @ x + layer.bias)


# The gain.


def gain_of(layer):
    return step_gain(layer, open_weight(layer, WIDTH))


@given(diagonal=st.lists(sizes, min_size=1, max_size=9))
def test_a_diagonal_weight_moves_each_output_by_its_own_number(diagonal):
    weight = torch.tensor(diagonal, dtype=torch.float64).diag()
    wanted = math.sqrt(sum(number**2 for number in diagonal) / len(diagonal))
    assert step_gain(nn.Linear(1, 1), weight) == pytest.approx(wanted, rel=1e-5)


@kinds
@given(factor=sizes)
def test_the_gain_grows_with_the_weight(kind, factor):
    layer = layer_of(kind)
    before = gain_of(layer)
    with torch.no_grad():
        layer.weight *= factor
    assert gain_of(layer) == pytest.approx(factor * before, rel=1e-5)


@kinds
def test_the_gain_is_the_same_at_every_call_and_draws_nothing(kind):
    state = torch.get_rng_state()
    layer = layer_of(kind)
    torch.set_rng_state(state)
    first = gain_of(layer)
    assert torch.equal(torch.get_rng_state(), state)
    assert gain_of(layer) == first


def test_no_unit_step_moves_outputs_further_than_the_gain_by_much():
    """The gain is of steps as an optimiser takes them, which is more than of steps at random."""
    torch.manual_seed(1)
    weight = torch.randn(64, 64) @ torch.diag(torch.linspace(0.01, 1, 64))
    at_random = (weight @ torch.randn(64, 256).sign()).square().mean().sqrt()
    assert 1.2 * at_random < step_gain(nn.Linear(1, 1), weight) < torch.linalg.matrix_norm(weight, ord=2) * 1.01


def test_positions_of_a_kernel_add_up_as_if_independent():
    diagonal = torch.tensor([0.5, 1.0, 2.0])
    wanted = float(diagonal.square().mean().sqrt())
    for layer, factor in (
        (nn.Conv2d(3, 3, 1), 1.0),
        (nn.Conv2d(3, 3, (2, 4)), 8**0.5),
        (nn.ConvTranspose1d(3, 3, 4, stride=4), 1.0),  # one position reaches each output
        (nn.ConvTranspose1d(3, 3, 4), 2.0),
    ):
        weight = torch.zeros_like(layer.weight)
        weight[range(3), range(3)] = diagonal.view(3, *[1] * (weight.ndim - 2)).expand(3, *weight.shape[2:])
        assert step_gain(layer, weight) == pytest.approx(factor * wanted, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 1023, 1024, 1025, 3000])
def test_large_weights_are_read_block_by_block(rows):
    torch.manual_seed(0)
    weight = torch.randn(rows, 5)
    found = [step_gain(nn.Linear(1, 1), weight.to(dtype)) for dtype in (torch.float32, torch.float64)]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    at_random, longest = weight.square().sum(1).mean().sqrt(), torch.linalg.matrix_norm(weight, ord=2)
    assert 0.95 * at_random < found[0] < 1.001 * longest * (5 / rows) ** 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_gain_in_other_precisions(dtype):
    layer = layer_of("linear")
    assert gain_of(layer.to(dtype)) == pytest.approx(gain_of(layer.float()), rel=0.02)


@pytest.mark.each_value
@kinds
@pytest.mark.parametrize("norm", ["rotation", "columns", None])
@given(rank=st.integers(2, WIDTH), factor=sizes)
def test_the_first_step_moves_outputs_alike_however_large_the_weight(kind, norm, rank, factor):
    """What the start is for: one learning rate suits layers and models of very different weights."""
    moved = []
    for scale in (1.0, factor):
        layer = layer_of(kind).double().requires_grad_(False)
        layer.weight *= scale
        torch.manual_seed(1)
        model = TuckerAdapter(layer, TuckerSpec(rank=rank, factor_norm=norm)).double()
        torch.manual_seed(2)
        spatial = {"convolution": (2, WIDTH, 4, 4), "transposed": (2, WIDTH, 4)}.get(kind, (7, WIDTH))
        x, gates = torch.randn(spatial, dtype=torch.float64), torch.full((2, 2), 0.5, dtype=torch.float64)
        before = model(x, gates)
        torch.manual_seed(3)
        (before * torch.randn_like(before)).sum().backward()
        zero = slice(rank - rank // 2, None)
        with torch.no_grad():  # Adam's first step, whatever the size of the gradient
            model.parts.basis[:, zero] -= 1e-6 * model.parts.basis.grad[:, zero].sign()
        moved.append((model(x, gates) - before).detach())
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-3, atol=1e-3 * float(moved[0].abs().max()))


@pytest.mark.parametrize(("factor", "gain"), [(1e-4, 0.01), (1e4, 100.0)])
def test_a_gain_has_bounds_that_half_precision_can_hold(factor, gain):
    layer = layer_of("linear").requires_grad_(False)
    layer.weight *= factor
    assert gain_of(layer) == gain
    for norm in ("rotation", "columns"):
        parts = TuckerAdapter(layer, TuckerSpec(rank=2, groups=1, factor_norm=norm)).parts.half()
        assert all(parameter.isfinite().all() for parameter in parts.parameters())


@pytest.mark.parametrize("weight", ["zeros", "nan", "inf", "meta", "integers", "eight bits", "sparse", "hidden"])
def test_weights_that_say_nothing_count_as_typical(weight):
    layer = nn.Linear(WIDTH, 4).requires_grad_(False)
    if weight == "meta":
        layer = layer.to("meta")
    elif weight == "integers":
        layer.weight = nn.Parameter(torch.ones(4, WIDTH, dtype=torch.int8), requires_grad=False)
    elif weight == "eight bits":
        layer.weight = nn.Parameter(torch.ones(4, WIDTH).to(torch.float8_e4m3fn), requires_grad=False)
    elif weight == "sparse":
        layer.weight = nn.Parameter(torch.eye(4, WIDTH).to_sparse(), requires_grad=False)
    elif weight == "hidden":
        del layer.weight
    else:
        layer.weight.fill_({"zeros": 0.0, "nan": math.nan, "inf": math.inf}[weight])
    parts = TuckerAdapter(layer, TuckerSpec(rank=4, groups=1)).parts
    torch.testing.assert_close(parts.basis.norm(dim=0), torch.tensor([2.0, 2.0, 0.0, 0.0]))
    assert float(parts.strength) == pytest.approx((8 / 4) ** 0.5)
    parts = TuckerAdapter(layer, TuckerSpec(rank=4, groups=1, factor_norm="columns")).parts
    assert parts.cores.abs().amax().item() * parts.expert_factor.abs().amax().item() > 0
    inner = torch.einsum("jq,kqab->kjab", parts.expert_factor, parts.cores)
    torch.testing.assert_close(inner.amax(), torch.tensor(3.2 / 2.0 / 4**0.5))


# Which layout in memory.


@given(st.tuples(*[st.integers(1, 3)] * 4), st.booleans())
def test_adapted_inputs_of_a_convolution_lie_in_memory_as_the_inputs(shape, channels_last):
    x = torch.randn(shape)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    y = from_rows(nn.Conv2d(shape[1], 2, 1), x.movedim(1, -1) * 1.0, x)
    assert torch.equal(y, x)
    assert y.is_contiguous() == x.is_contiguous()
    assert channels_last or y.stride() == x.stride()
