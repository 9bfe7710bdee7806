"""First, second, forward-mode and batched derivatives, and where they reach."""

import peft
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from tucka.backends.torch import Router, TuckerAdapter, householder_adapt, mix_cores, tucker_adapt, tucker_adapt_gated
from tucka.backends.torch.householder import unit_columns
from tucka.peft import TuckAConfig, expert_load, last_route
from tucka.spec import TuckerSpec

LEADS = [(), (2,), (2, 3)]


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def check(function, *inputs):
    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("lead", LEADS)
def test_gated_adaptation(lead):
    inputs = leaf(2, 3, 4), leaf(4, 2), leaf(2, 3, 2, 2), leaf(2, 3), leaf(*lead, 2, 2)
    check(lambda *given: tucker_adapt_gated(*given, alpha=0.7), *inputs)


@pytest.mark.parametrize("lead", LEADS)
def test_adaptation_and_mixing(lead):
    check(lambda *given: tucker_adapt(*given, alpha=0.7), leaf(2, 3, 4), leaf(4, 2), leaf(*lead, 2, 2))
    check(mix_cores, leaf(2, 3, 2, 2), leaf(2, 3), leaf(*lead, 2, 2))


@pytest.mark.parametrize("reverse", [False, True])
def test_reflections(reverse):
    # Inputs already unit: unit_columns looks at values, which batched derivatives do not allow.
    check(lambda x, u: householder_adapt(x, u, reverse=reverse), leaf(2, 3), leaf(3, 2))


def test_reflections_by_any_columns():
    assert gradcheck(lambda x, u: householder_adapt(x, unit_columns(u)), (leaf(2, 3), leaf(3, 2)))
    inputs = leaf(2, 3), leaf(3, 2)
    assert gradcheck(lambda x, u: householder_adapt(x, torch.linalg.qr(u).Q, orthonormal=True), inputs)


@pytest.mark.parametrize("frozen", range(4))
def test_one_frozen_input_leaves_the_others_gradients(frozen):
    inputs = [leaf(2, 3, 4), leaf(4, 2), leaf(2, 1, 2, 2), leaf(2, 1)]
    gates = torch.rand(2, 2, dtype=torch.float64)
    inputs[frozen].requires_grad_(False)
    assert gradcheck(lambda *given: tucker_adapt_gated(*given, gates), inputs)


class TwoLayers(nn.Module):
    """Two adapted layers behind one router, in float64."""

    def __init__(self, routing):
        super().__init__()
        spec = TuckerSpec(rank=2, groups=3, routing=routing, alpha=0.5)
        self.router = Router(spec, 4)
        self.first = TuckerAdapter(nn.Linear(4, 5), spec, init_weights=False)
        self.second = TuckerAdapter(nn.Linear(5, 3), spec, init_weights=False)
        for layer in (self.first, self.second):
            layer.base_layer.requires_grad_(False)
        self.double()

    def forward(self, x):
        gates = self.router(x)
        return self.second(self.first(x, gates).tanh(), gates)


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_a_routed_model(routing):
    model, x = TwoLayers(routing), leaf(2, 3, 4)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    def run(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    inputs = [x, *(model.get_parameter(name).detach().requires_grad_() for name in names)]
    assert gradcheck(run, inputs)


def test_gradients_reach_all_parts_and_the_chosen_groups_centroids():
    model = TwoLayers("batch")
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    chosen = int(model.router(x).sum(dim=1).argmax())
    model(x).square().sum().backward()
    for layer in (model.first, model.second):
        assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parts.parameters())
    centroids, cores = model.router.centroids.grad, model.first.parts.cores.grad
    others = [group for group in range(3) if group != chosen]
    assert centroids[chosen].abs().sum() > 0
    assert cores[chosen].abs().sum() > 0
    # Zero tensors and not None: data-parallel training waits for every parameter's gradient.
    assert not centroids[others].any()
    assert not cores[others].any()


def test_gradients_reach_the_feature():
    router = Router(TuckerSpec(groups=2), 4).double()
    x = leaf(2, 3, 4)
    router(x).square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_functions_work_under_vmap_and_grad():
    basis, cores, factor = leaf(4, 2), leaf(2, 1, 2, 2), leaf(2, 1)
    x, gates = leaf(5, 3, 4), torch.rand(2, 2, dtype=torch.float64)

    def loss(basis, x):
        return tucker_adapt_gated(x, basis, cores, factor, gates).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(basis, x)
    one_by_one = torch.stack([torch.func.grad(loss)(basis, row) for row in x])
    torch.testing.assert_close(each, one_by_one)


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_a_vmapped_model_leaves_nothing_of_the_transformation_behind(routing):
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model = peft.get_peft_model(base, TuckAConfig(r=2, routing=routing, target_modules=["0", "2"], init_weights=False))
    x = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    model(x[0])
    route, load = last_route(model), expert_load(model)
    torch.testing.assert_close(torch.vmap(model)(x), torch.stack([model(each) for each in x]))
    model(x[0])
    assert torch.equal(last_route(model), route)
    assert int(expert_load(model).sum()) == 7 * int(load.sum())
