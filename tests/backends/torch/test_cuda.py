"""On a GPU: nothing waits for the device, and a step can be captured as a graph."""

import pytest
import torch
from torch import nn

from tucka.backends.torch import HouseholderAdapter, Router, TuckerAdapter
from tucka.spec import TuckerSpec

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])


class Routed(nn.Module):
    """A router, two adapted layers and one with reflections."""

    def __init__(self, routing):
        super().__init__()
        spec = TuckerSpec(rank=8, groups=3, routing=routing)
        self.router = Router(spec, 64)
        self.first = TuckerAdapter(nn.Linear(64, 64), spec, init_weights=False)
        self.second = TuckerAdapter(nn.Linear(64, 64), spec, init_weights=False)
        self.third = HouseholderAdapter(nn.Linear(64, 64), 8)

    def forward(self, x, mask=None):
        gates = self.router(x, mask)
        return self.third(self.second(self.first(x, gates), gates))


@pytest.fixture
def _no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@routings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_never_waits_for_the_device(routing, dtype, request):
    model = Routed(routing).to("cuda", dtype)
    x = torch.randn(4, 32, 64, device="cuda", dtype=dtype)
    mask = torch.ones(4, 32, device="cuda")
    model(x, mask).sum().backward()  # what is loaded on first use may wait
    request.getfixturevalue("_no_waiting")
    model(x, mask).sum().backward()


@routings
def test_a_forward_can_be_captured_as_a_graph(routing):
    model = Routed(routing).cuda().requires_grad_(False)
    given = torch.randn(4, 32, 64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = model(given)
    for _ in range(3):
        x = torch.randn_like(given)
        given.copy_(x)
        graph.replay()
        torch.testing.assert_close(result, model(x))


@routings
def test_the_device_computes_what_the_cpu_does(routing):
    model, x = Routed(routing).double(), torch.randn(4, 32, 64).double()
    torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), model.cpu()(x))


def test_one_graph_is_compiled():
    model, x = Routed("batch").cuda(), torch.randn(4, 32, 64, device="cuda")
    explained = torch._dynamo.explain(model)(x)
    assert explained.graph_break_count == 0
