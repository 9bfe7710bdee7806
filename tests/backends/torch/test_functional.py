"""The functions compute the paper's equations: values, derivatives, precisions, layouts, and what they refuse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from support.close import assert_close, largest
from support.cost_meter import measure
from support.strategies import arrays, factors, tucker_parts
from tucka import reference
from tucka.backends.torch import mix_cores, thin, tucker_adapt, tucker_adapt_gated, update
from tucka.backends.torch.functional import add_gated_update
from tucka.backends.torch.mixing import spread_times, times_mixed
from tucka.errors import ArrayError, ShapeError

EPS = 2.0**-52
HALVES = [torch.float16, torch.bfloat16]
ROUTINGS = ["batch", "sample", "token"]
depths = pytest.mark.parametrize("depth", [0, 1, 2, 3])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["few", "many", "turned"])
def rows(request, monkeypatch):
    """Few rows, which torch differentiates itself; or many, with nodes of their own, on two kinds of processors."""
    if request.param != "few":
        monkeypatch.setattr(update, "_FEW", -1)
        monkeypatch.setattr(thin, "FEW", -1)
        monkeypatch.setattr(thin, "TURNS", request.param == "turned")


either = pytest.mark.usefixtures("rows")


# Values, compared with the loops of the reference.


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


@pytest.mark.parametrize("lead", [(), (5,), (5, 4)])
@pytest.mark.parametrize("threads", [1, 2])
def test_many_rows_are_adapted_as_few_are(lead, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = [torch.randn(shape) for shape in ((12, 3), (2, 2, 3, 3), (3, 2))]
        x, base, gates = torch.randn(5, 4, 12), torch.randn(5, 4, 12), torch.rand(*lead, 2, 3)
        desired = (
            base
            - x
            + torch.from_numpy(
                reference.adapt(*(each.numpy() for each in (x, gates, parts[1], parts[2], parts[0])), alpha=0.5)
            )
        )
        for is_on in (True, False):
            with torch.set_grad_enabled(is_on):
                actual = add_gated_update(base, x, *(part.requires_grad_() for part in parts), gates, alpha=0.5)
            torch.testing.assert_close(actual.detach(), desired.float(), rtol=1e-4, atol=1e-4)
            assert actual.requires_grad is is_on
    finally:
        torch.set_num_threads(before)


# First, second, forward-mode and batched derivatives.

LEADS = [(), (2,), (2, 3)]


def leaf(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def check_derivatives(function, *inputs):
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


@pytest.mark.each_value
@either
@pytest.mark.parametrize("lead", LEADS)
def test_derivatives_of_gated_adaptation(lead):
    inputs = leaf(2, 3, 4), leaf(4, 2), leaf(2, 3, 2, 2), leaf(2, 3), leaf(*lead, 2, 2)
    check_derivatives(lambda *given: tucker_adapt_gated(*given, alpha=0.7), *inputs)


@either
def test_derivatives_where_rows_are_spread_and_not_cores_mixed():
    inputs = leaf(2, 3, 4), leaf(4, 3), leaf(2, 1, 3, 3), leaf(2, 1), leaf(2, 3, 2, 2)
    check_derivatives(lambda *given: tucker_adapt_gated(*given, alpha=0.7), *inputs)


@given(st.integers(0, 5), st.integers(1, 5), st.integers(1, 6))
def test_both_orders_of_rows_with_gates_of_their_own_give_the_same(rows, rank, slices):
    inner, weights, cores = leaf(rows, rank), leaf(rows, slices), leaf(slices, rank, rank)
    expected = torch.einsum("nr,ns,srq->nq", inner, weights, cores)
    torch.testing.assert_close(times_mixed(inner, weights, cores), expected)
    torch.testing.assert_close(spread_times(inner, weights, cores), expected)


def test_many_groups_keep_a_core_for_each_token_and_not_the_spread():
    groups, rank, tokens = 64, 4, 50
    x, gates, basis = leaf(tokens, 8), leaf(tokens, groups, 2), leaf(8, rank)
    cores, factor = leaf(groups, 2, rank, rank), leaf(2, 2)
    kept = measure(lambda: tucker_adapt_gated(x, basis, cores, factor, gates), owned=[x, gates, basis, cores, factor])
    # In numbers: x U, (x U) Ḡ, and the core of r² = 16, not k·p·r = 512; and the cores of all experts once.
    assert kept.kept_bytes == 8 * (tokens * (2 * rank + rank * rank) + 2 * groups * rank * rank)


@pytest.mark.each_value
@either
@pytest.mark.parametrize("lead", LEADS)
def test_derivatives_of_adaptation_and_mixing(lead):
    check_derivatives(lambda *given: tucker_adapt(*given, alpha=0.7), leaf(2, 3, 4), leaf(4, 2), leaf(*lead, 2, 2))
    check_derivatives(mix_cores, leaf(2, 3, 2, 2), leaf(2, 3), leaf(*lead, 2, 2))


@pytest.mark.each_value
@either
@pytest.mark.parametrize("lead", LEADS)
def test_derivatives_of_a_scale_that_is_a_tensor(lead):
    given = leaf(2, 3, 4), leaf(4, 2), leaf(*lead, 2, 2)
    check_derivatives(lambda alpha, *given: tucker_adapt(*given, alpha=alpha), leaf(), *given)
    parts = leaf(4, 2), leaf(2, 3, 2, 2), leaf(2, 3), leaf(*lead, 2, 2)
    check_derivatives(lambda alpha, x: tucker_adapt_gated(x, *parts, alpha=alpha), leaf(), leaf(2, 3, 4))


@either
@pytest.mark.parametrize("frozen", range(4))
def test_one_frozen_input_leaves_the_others_gradients(frozen):
    inputs = [leaf(2, 3, 4), leaf(4, 2), leaf(2, 1, 2, 2), leaf(2, 1)]
    gates = torch.rand(2, 2, dtype=torch.float64)
    inputs[frozen].requires_grad_(False)
    assert gradcheck(lambda *given: tucker_adapt_gated(*given, gates), inputs)


@pytest.mark.each_value
@either
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_derivatives_of_a_sum_of_updates(lead):
    def function(base, x, basis, cores, expert_factor, gates):
        return add_gated_update(base, x, basis, cores, expert_factor, gates, alpha=0.5)

    inputs = (leaf(2, 3, 4), leaf(2, 3, 4), leaf(4, 2), leaf(2, 2, 2, 2), leaf(3, 2), leaf(*lead, 2, 3))
    check_derivatives(function, *inputs)


def test_functions_work_under_vmap_and_grad():
    basis, cores, factor = leaf(4, 2), leaf(2, 1, 2, 2), leaf(2, 1)
    x, gates = leaf(5, 3, 4), torch.rand(2, 2, dtype=torch.float64)

    def loss(basis, x):
        return tucker_adapt_gated(x, basis, cores, factor, gates).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(basis, x)
    one_by_one = torch.stack([torch.func.grad(loss)(basis, row) for row in x])
    torch.testing.assert_close(each, one_by_one)


# Precisions, layouts and axes.


def leading(routing, lead):
    return {"batch": (), "sample": lead[:1], "token": lead}[routing]


def parts(width=8, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(*shape).to(dtype) for shape in ((width, 3), (2, 2, 3, 3), (2, 2))]


def adapt(x, gates, basis, cores, factor):
    return tucker_adapt_gated(x, basis, cores, factor, gates, alpha=0.5)


@either
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
def test_half_precision_is_close_to_float32_and_keeps_its_dtype(routing, dtype, adapter_dtype):
    gates = torch.rand(*leading(routing, (4, 5)), 2, 2)
    x = torch.randn(4, 5, 8)
    given = [part.to(adapter_dtype or dtype).requires_grad_() for part in parts()]
    half = adapt(x.to(dtype), gates, *given)
    assert half.dtype == dtype
    exact = adapt(x, gates, *parts())
    torch.testing.assert_close(half.float(), exact, rtol=0.05, atol=0.02 * float(exact.detach().abs().max()))
    half.float().square().sum().backward()
    assert all(part.grad.dtype == part.dtype and part.grad.isfinite().all() for part in given)


@either
@pytest.mark.parametrize("routing", ROUTINGS)
def test_autocast_computes_in_its_dtype_and_returns_gradients_in_the_inputs(routing):
    gates = torch.rand(*leading(routing, (4, 5)), 2, 2, requires_grad=True)
    x = torch.randn(4, 5, 8, requires_grad=True)
    given = [part.requires_grad_() for part in parts()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = adapt(x, gates, *given)
    assert result.dtype == torch.bfloat16
    result.float().square().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in (x, gates, *given))
    exact = torch.func.grad(lambda x: adapt(x, gates, *given).square().sum())(x.detach())
    torch.testing.assert_close(x.grad, exact, rtol=0.1, atol=0.05 * float(exact.detach().abs().max()))


def test_cores_are_mixed_in_float32_under_autocast():
    given = [part.bfloat16() for part in parts()[1:]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mix_cores(*given, torch.ones(2, 2))
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, mix_cores(*(part.float() for part in given), torch.ones(2, 2)))


def layouts():
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    return {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "last axis strided": torch.randn(3, 4, 16, dtype=torch.float64)[..., ::2],
        "expanded": torch.randn(1, 4, 8, dtype=torch.float64).expand(3, 4, 8),
        "expanded last axis": torch.randn(3, 4, 1, dtype=torch.float64).expand(3, 4, 8),
        "no samples": x[:0],
        "no tokens": x[:, :0],
    }


@either
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", layouts())
def test_layouts(name, routing):
    x = layouts()[name]
    gates = torch.rand(*leading(routing, x.shape[:2]), 2, 2, dtype=torch.float64)
    results = []
    for each in (x.detach().requires_grad_(), x.detach().clone().contiguous().requires_grad_()):
        weights = [part.requires_grad_() for part in parts(dtype=torch.float64)]
        result = adapt(each, gates, *weights)
        result.square().sum().backward()
        results.append((result.detach(), each.grad, *(weight.grad for weight in weights)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 8), (3, 4, 2, 8)])
def test_axes(shape, routing):
    x = torch.randn(shape)
    lead = shape[:-1]
    gates = torch.rand(*leading(routing, lead), 2, 2)
    result = adapt(x, gates, *parts())
    assert result.shape == shape
    every = gates.reshape(*gates.shape[:-2], *(1,) * (len(lead) - gates.ndim + 2), 2, 2).expand(*lead, 2, 2)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in lead)).reshape(-1, len(lead)).tolist():
        torch.testing.assert_close(result[tuple(index)], adapt(x[tuple(index)], every[tuple(index)], *parts()))


def test_arguments_stay_as_they_are():
    x, gates, given = torch.randn(2, 3, 8), torch.rand(2, 2), parts()
    before = [tensor.clone() for tensor in (x, gates, *given)]
    adapt(x, gates, *given)
    assert all(torch.equal(*pair) for pair in zip(before, (x, gates, *given), strict=True))


# What is refused.

X, BASIS, CORES, FACTOR, GATES = (torch.ones(*shape) for shape in ((5, 4), (4, 2), (3, 1, 2, 2), (2, 1), (3, 2)))
GOOD = {
    tucker_adapt: {"x": X, "basis": BASIS, "mixed_core": torch.ones(2, 2)},
    tucker_adapt_gated: {"x": X, "basis": BASIS, "cores": CORES, "expert_factor": FACTOR, "gates": GATES},
    mix_cores: {"cores": CORES, "expert_factor": FACTOR, "gates": GATES},
}
CALLS = [(function, name) for function, arguments in GOOD.items() for name in arguments]
ids = [f"{function.__name__}, {name}" for function, name in CALLS]


def refusal(function, error, **wrong):
    """The message with which a function refuses an argument, whose name starts it; the function's name is in it."""
    with pytest.raises(error) as raised:
        function(**{**GOOD[function], **wrong})
    message = str(raised.value)
    assert function.__name__ in message
    return message


@pytest.mark.parametrize(("function", "name"), CALLS, ids=ids)
def test_arrays_of_another_library_are_refused(function, name):
    for wrong, kind in ((np.ones((2, 2)), "numpy.ndarray"), ([1.0], "list")):
        message = refusal(function, ArrayError, **{name: wrong})
        assert message.startswith(f"{name}: expected a torch tensor")
        assert kind in message
        assert "Convert" in message


@pytest.mark.parametrize(("function", "name"), CALLS, ids=ids)
def test_tensors_on_two_devices_are_refused(function, name):
    message = refusal(function, ArrayError, **{name: GOOD[function][name].to("meta")})
    assert "meta" in message
    assert "Move" in message


@pytest.mark.parametrize("function", [tucker_adapt, tucker_adapt_gated])
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_activations_of_another_dtype_are_refused(function, dtype):
    message = refusal(function, ArrayError, x=X.to(dtype))
    assert message.startswith("x: expected a real floating-point dtype")
    assert str(dtype) in message
    assert "Convert" in message


@pytest.mark.parametrize(
    ("function", "wrong", "words"),
    [
        (tucker_adapt, {"x": torch.ones(5, 3)}, ["x:", "d = 4", "basis", "(5, 3)"]),
        (tucker_adapt, {"x": torch.ones(())}, ["x:", "d = 4"]),
        (tucker_adapt, {"basis": torch.ones(4)}, ["basis:", "(d, r)"]),
        (tucker_adapt, {"mixed_core": torch.ones(3, 3)}, ["mixed_core:", "r = 2", "(3, 3)"]),
        (tucker_adapt, {"mixed_core": torch.ones(4, 2, 2)}, ["mixed_core:", "leading axes", "(5,)", "(4,)"]),
        (tucker_adapt_gated, {"cores": torch.ones(3, 1, 3, 3)}, ["cores:", "r = 2", "(3, 1, 3, 3)"]),
        (tucker_adapt_gated, {"gates": torch.ones(4, 3, 2)}, ["gates:", "leading axes", "(5,)", "(4,)"]),
        (mix_cores, {"cores": torch.ones(3, 2, 2)}, ["cores:", "(k, p, r, r)", "(3, 2, 2)"]),
        (mix_cores, {"cores": torch.ones(3, 1, 2, 3)}, ["cores:", "(k, p, r, r)"]),
        (mix_cores, {"expert_factor": torch.ones(2, 3)}, ["expert_factor:", "p = 1", "(2, 3)"]),
        (mix_cores, {"gates": torch.ones(6, 1)}, ["gates:", "(3, 2)", "(6, 1)"]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(function, wrong, words):
    message = refusal(function, ShapeError, **wrong)
    assert all(word in message for word in words)
