"""The router: its gates are the reference's, with the core's gradients; it decides in float32 and names wrong input."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from torch.autograd import gradcheck, gradgradcheck

import tucka
from support.cost_meter import measure
from tucka import reference
from tucka.backends.torch import Router
from tucka.backends.torch.routing.choosing import feature_of, gates_of, logits_of
from tucka.errors import RouteError, ShapeError, TuckaError
from tucka.spec import TuckerSpec

HALVES = [torch.float16, torch.bfloat16]
ROUTINGS = ["batch", "sample", "token"]
LOGITS = arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 3)), elements=st.floats(-700, 700))


@given(logits=LOGITS, normalize=st.booleans())
def test_gates_are_those_of_the_reference(logits, normalize):
    desired = reference.select_gates(logits, normalize)
    np.testing.assert_allclose(gates_of(torch.from_numpy(logits), gate_norm=normalize), desired, atol=1e-12)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("normalize", [True, False])
def test_gates_and_gradients_are_those_of_the_core(lead, normalize):
    torch.manual_seed(0)
    logits = torch.randn(*lead, 4, 2, dtype=torch.float64).requires_grad_()
    weights = torch.randn(*lead, 4, 2, dtype=torch.float64)
    pairs = []
    for gates in (gates_of(logits, gate_norm=normalize), tucka.select_gates(logits, gate_norm=normalize)):
        pairs.append((gates.detach(), torch.autograd.grad((gates * weights).sum(), logits)[0]))
    torch.testing.assert_close(*pairs)


@pytest.mark.parametrize(
    "values", [[[1.0, -torch.inf], [0.0, 0.5]], [[torch.nan, 0.0], [3.0, 4.0]], [[torch.inf, 0.0]]]
)
@pytest.mark.parametrize("normalize", [True, False])
def test_infinities_and_nan_are_treated_as_in_the_core(values, normalize):
    logits = torch.tensor(values, dtype=torch.float64)
    desired = tucka.select_gates(logits, gate_norm=normalize)
    torch.testing.assert_close(gates_of(logits, gate_norm=normalize), desired, equal_nan=True)


def test_an_infinity_in_another_group_does_not_reach_the_gradient():
    logits = torch.tensor([[1.0, 2.0], [-torch.inf, 0.5]], requires_grad=True)
    (gradient,) = torch.autograd.grad(gates_of(logits, gate_norm=True)[0, 0], logits)
    assert gradient[0].abs().min() > 0
    assert not gradient[1].any()


@pytest.mark.parametrize("normalize", [True, False])
def test_derivatives(normalize):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda given: gates_of(given, gate_norm=normalize), logits, check_forward_ad=True)
    assert gradgradcheck(lambda given: gates_of(given, gate_norm=normalize), logits)


@pytest.mark.each_value
@pytest.mark.parametrize("affinity", ["dot", "group_norm", "centered", "directional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    data=st.data(),
    exponent=st.integers(-30, 30),
    lead=st.sampled_from([(), (3,), (2, 3)]),
    tau=st.sampled_from([1, 0.1]),
)
def test_logits_are_those_of_the_reference(affinity, dtype, data, exponent, lead, tau):
    feature, centroids, center = (
        torch.from_numpy(data.draw(arrays(np.float64, shape, elements=st.floats(-4, 4)))).to(dtype)
        for shape in ((*lead, 4), (3, 2, 4), (4,))
    )
    feature, center = feature * 10.0**exponent, center * 10.0**exponent
    options = {"affinity": affinity, "temperature": float(tau)}
    options["center"] = center if affinity in ("centered", "directional") else None
    desired = tucka.affinity_logits(feature, centroids, **options)
    scale = float(desired.abs().max()) or 1.0
    tolerance = 64 * torch.finfo(dtype).eps * scale / tau
    torch.testing.assert_close(logits_of(feature, centroids, **options), desired, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("affinity", ["group_norm", "directional"])
def test_logits_of_nothing_have_a_gradient_of_nothing(affinity):
    feature, centroids = torch.zeros(2, 4, requires_grad=True), torch.randn(3, 2, 4, requires_grad=True)
    logits = logits_of(feature, centroids, affinity=affinity, center=None, temperature=1.0)
    logits.sum().backward()
    assert not logits.any()
    assert torch.isfinite(feature.grad).all()
    assert torch.isfinite(centroids.grad).all()


@pytest.mark.parametrize("routing", ["batch", "sample"])
@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4), (2, 3, 2, 4)])
@pytest.mark.parametrize("is_masked", [True, False])
def test_features_are_those_of_the_reference(routing, shape, is_masked):
    hidden = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = None
    if is_masked:
        mask = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(1)) > 0.4
        mask[0] = False
        hidden[0] = torch.nan
    desired = tucka.routing_feature(hidden, mask=mask, routing=routing)
    torch.testing.assert_close(feature_of(hidden, mask, routing), desired, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_features_of_nothing_but_padding_are_zeros(routing):
    hidden, mask = torch.ones(2, 3, 4), torch.zeros(2, 3)
    desired = tucka.routing_feature(hidden, mask=mask, routing=routing)
    assert torch.equal(feature_of(hidden, mask, routing), desired)
    assert not desired.any()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_router_decides_in_float32(routing, dtype, masked):
    router = Router(TuckerSpec(groups=3, routing=routing), 8)
    x = torch.randn(4, 5, 8).to(dtype)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [0, 0, 0, 0, 1], [0] * 5]) if masked else None
    gates = router(x, mask)
    assert gates.dtype == torch.float32
    torch.testing.assert_close(gates, router(x.float(), mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x, mask), gates)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradients_through_the_router_in_half_precision(routing):
    router = Router(TuckerSpec(groups=3, routing=routing), 8)
    x = torch.randn(4, 5, 8).bfloat16()
    weights = torch.rand_like(router(x))
    grads = []
    for hidden in (x.clone().requires_grad_(), x.float().requires_grad_()):
        router.zero_grad()
        (router(hidden) * weights).sum().backward()
        grads.append((hidden.grad.float(), router.centroids.grad.clone()))
    torch.testing.assert_close(grads[0], grads[1], rtol=0.02, atol=1e-3)


def test_gradients_reach_the_feature():
    router = Router(TuckerSpec(groups=2), 4).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    router(x).square().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_router_keeps_no_wide_copy(routing, dtype):
    router = Router(TuckerSpec(routing=routing), 128)
    x = torch.randn(4, 64, 128).to(dtype).requires_grad_()
    kept_bytes = measure(lambda: router(x, torch.ones(4, 64)).square(), owned=[x, *router.parameters()]).kept_bytes
    assert kept_bytes < 2 * x.numel()


def test_hidden_states_on_another_device_are_refused():
    with pytest.raises(TuckaError, match=r"hidden: expected .*cpu.*meta.*Router.*Move"):
        Router(TuckerSpec(), 8)(torch.ones(2, 8, device="meta"))


@pytest.mark.parametrize("shape", [(2, 7), (8,)])
def test_hidden_states_of_another_width_are_refused(shape):
    with pytest.raises(RouteError, match=r"hidden: expected axes .*d = 8.*Router.*Make the router"):
        Router(TuckerSpec(), 8)(torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_another_shape_is_refused(dtype):
    with pytest.raises(ShapeError, match=r"mask: expected shape \(2, 3\).*got shape \(2, 4\)"):
        Router(TuckerSpec(), 8)(torch.ones(2, 3, 8, dtype=dtype), torch.ones(2, 4))
