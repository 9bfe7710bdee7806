"""Half precision with and without autocast; strided, expanded and empty inputs; two, three and four axes."""

import pytest
import torch
from torch import nn

from tucka.backends.torch import Router, TuckerAdapter, tucker_adapt_gated
from tucka.spec import TuckerSpec

HALVES = [torch.float16, torch.bfloat16]
ROUTINGS = ["batch", "sample", "token"]


def leading(routing, lead):
    return {"batch": (), "sample": lead[:1], "token": lead}[routing]


def parts(width=8, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(*shape).to(dtype) for shape in ((width, 3), (2, 2, 3, 3), (2, 2))]


def adapt(x, gates, basis, cores, factor):
    return tucker_adapt_gated(x, basis, cores, factor, gates, alpha=0.5)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_start_is_the_base_bit_for_bit(routing, dtype, autocast):
    spec = TuckerSpec(rank=4, routing=routing)
    layer = nn.Linear(16, 8).to(dtype)
    adapter, router = TuckerAdapter(layer, spec), Router(spec, 16)
    x = torch.randn(3, 5, 16).to(dtype)
    if autocast is not None and dtype == torch.float64:
        pytest.skip("torch's linear has no float64 under autocast either")
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        assert torch.equal(adapter(x, router(x)), layer(x))


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


def layouts():
    x = torch.randn(3, 4, 8)
    return {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "last axis strided": torch.randn(3, 4, 16)[..., ::2],
        "expanded": torch.randn(1, 4, 8).expand(3, 4, 8),
        "expanded last axis": torch.randn(3, 4, 1).expand(3, 4, 8),
        "no samples": x[:0],
        "no tokens": x[:, :0],
    }


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("name", layouts())
def test_layouts(name, routing):
    x = layouts()[name]
    gates = torch.rand(*leading(routing, x.shape[:2]), 2, 2)
    results = []
    for given in (x.detach().requires_grad_(), x.detach().clone().contiguous().requires_grad_()):
        factors = [part.requires_grad_() for part in parts()]
        result = adapt(given, gates, *factors)
        result.square().sum().backward()
        results.append((result.detach(), given.grad, *(factor.grad for factor in factors)))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (0, 4, 8), (3, 0, 8)])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_nothing_is_routed_and_adapted_to_nothing(routing, shape, dtype):
    router = Router(TuckerSpec(rank=3, groups=3, routing=routing), 8)
    adapter = TuckerAdapter(nn.Linear(8, 5).to(dtype), router.spec, init_weights=False)
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    result = adapter(x, router(x))
    assert result.shape == (*shape[:-1], 5)
    result.float().sum().backward()
    # Zero tensors and not None, as from any other batch.
    assert all(p.grad is not None and not p.grad.any() for p in (x, *router.parameters(), *adapter.parts.parameters()))
