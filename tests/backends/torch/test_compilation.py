"""One graph, in training and inference, and no new one when only the chosen group changes."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tucka.backends.torch import HouseholderAdapter, Router, TuckerAdapter
from tucka.spec import TuckerSpec


class Routed(nn.Module):
    """A router and two adapted layers."""

    def __init__(self, routing):
        super().__init__()
        spec = TuckerSpec(rank=3, groups=3, routing=routing)
        self.router = Router(spec, 8)
        self.first = TuckerAdapter(nn.Linear(8, 8), spec, init_weights=False)
        self.second = TuckerAdapter(nn.Linear(8, 4), spec, init_weights=False)

    def forward(self, x):
        gates = self.router(x)
        return self.second(self.first(x, gates).relu(), gates), gates


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def towards_each_group(router):
    """One input for each group, which the router sends there."""
    with torch.no_grad():
        return [router.centroids[group].sum(dim=0).expand(2, 5, 8).clone() for group in range(3)]


@pytest.mark.parametrize(
    ("routing", "training"),
    [
        ("batch", True),
        pytest.param("token", False, marks=pytest.mark.heavy),
        pytest.param("batch", False, marks=pytest.mark.slow),
        pytest.param("sample", True, marks=pytest.mark.slow),
        pytest.param("sample", False, marks=pytest.mark.slow),
        pytest.param("token", True, marks=pytest.mark.slow),
    ],
)
def test_one_graph_serves_all_groups(routing, training):
    torch.manual_seed(0)
    model = Routed(routing).train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    chosen = set()
    for x in towards_each_group(model.router):
        with torch.set_grad_enabled(training):
            result, gates = compiled(x)
        chosen.add(int(gates.reshape(-1, 3, 2).sum(dim=(0, 2)).argmax()))
        if training:
            model.zero_grad()
            result.square().sum().backward()
            actual = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            model.zero_grad()
            model(x)[0].square().sum().backward()
            torch.testing.assert_close(actual, {name: p.grad for name, p in model.named_parameters()})
        torch.testing.assert_close(result, model(x)[0])
    assert len(chosen) == 3
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16])
def test_autocast_compiles(dtype):
    model = Routed("token")
    x = torch.randn(2, 5, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result, _ = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(result, model(x)[0], rtol=0.05, atol=0.05)


def test_autocast_compiles_where_the_compiler_cannot_trace_what_tells_of_it(monkeypatch):
    """As in torch before 2.12."""
    told = torch.amp.is_autocast_available

    def untraceable(device):
        torch._dynamo.graph_break()
        return told(device)

    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    model = Routed("sample").eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = torch.rand(2, 5, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x)[0], model(x)[0])


def test_reflections_compile():
    adapter, x = HouseholderAdapter(nn.Linear(8, 4), 4, init_weights=False), torch.randn(3, 8)
    compiled = torch.compile(adapter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), adapter(x))
    compiled(x).sum().backward()
    assert adapter.vectors.grad.isfinite().all()


@pytest.mark.slow
def test_inductor_compiles_training():
    model, x = Routed("sample"), torch.randn(2, 5, 8)
    result, _ = torch.compile(model, fullgraph=True)(x)
    result.sum().backward()
    torch.testing.assert_close(result, model(x)[0])
