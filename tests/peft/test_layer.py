"""The adapted layer in a model: the contract of every adapter, errors with the layer's path, vmap."""

import peft
import pytest
import torch
from torch import nn

from support.adapter_contract import RANK, WIDTH, AdapterContract, as_arrays
from tucka import reference
from tucka.errors import RouteError, TuckaError
from tucka.peft import TuckAConfig, expert_load, last_route

GATES = [[0.1, 0.9], [0.0, 0.0], [0.3, 0.2]]
SIZES = {"r": RANK, "k": 3, "t": 2, "p": 2}


class TestTuckALayer(AdapterContract):
    """A model of one layer, whose route is pinned."""

    where = "(0)"

    def create(self, layer, *, init_weights=False):
        options = {"alpha": 0.5, "pinned_gates": GATES, "init_weights": init_weights}
        return peft.get_peft_model(nn.Sequential(layer), TuckAConfig(**SIZES, **options, target_modules=["0"]))

    def evaluate(self, adapter, x):
        parts = as_arrays(*adapter.base_model.model[0].tucka_experts["default"].factors())
        gates = torch.tensor(GATES, dtype=torch.float64).numpy()
        return reference.adapt(x, gates, *parts, alpha=0.5)


class TestTuckALayerWithTwoAdapters(TestTuckALayer):
    """Both adapters read the layer's input, and their updates add up."""

    def create(self, layer, *, init_weights=False):
        model = super().create(layer, init_weights=init_weights)
        options = {"pinned_gates": [[1.0, 2.0]], "init_weights": init_weights}
        model.add_adapter("other", TuckAConfig(**{**SIZES, "k": 1}, **options, target_modules=["0"]))
        model.base_model.set_adapter(["default", "other"])
        return model

    def evaluate(self, adapter, x):
        parts = as_arrays(*adapter.base_model.model[0].tucka_experts["other"].factors())
        other = reference.adapt(x, torch.tensor([[1.0, 2.0]]).double().numpy(), *parts)
        return super().evaluate(adapter, x) + other - x


def two_layers():
    base = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, WIDTH)), nn.Linear(WIDTH, 4))
    return peft.get_peft_model(base, TuckAConfig(**SIZES, target_modules=["0.0", "1"]))


@pytest.mark.parametrize(
    "x",
    [torch.ones(2, WIDTH + 1), torch.ones(2, WIDTH).long(), torch.ones(2, WIDTH).double()],
    ids=["width", "integers", "double"],
)
def test_an_input_is_refused_with_the_layers_path_before_anything_is_routed(x):
    model = two_layers()
    with pytest.raises(TuckaError, match=r"x: expected .*\(0\.0\)"):
        model(x)
    assert int(expert_load(model).sum()) == 0
    assert model(torch.ones(2, WIDTH)).shape == (2, 4)


def test_an_input_without_a_batch_axis_has_no_route():
    with pytest.raises(RouteError, match=r"route: expected .* axes .*\(0\.0\).*batch axis"):
        two_layers()(torch.ones(WIDTH))


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_a_vmapped_model_leaves_nothing_of_the_transformation_behind(routing):
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    model = peft.get_peft_model(base, TuckAConfig(r=2, routing=routing, target_modules=["0", "2"], init_weights=False))
    model.eval()  # in training the router would start itself between the calls
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    model(x[0])
    route, load = last_route(model), expert_load(model)
    torch.testing.assert_close(torch.vmap(model)(x), torch.stack([model(each) for each in x]))
    model(x[0])
    assert torch.equal(last_route(model), route)
    assert int(expert_load(model).sum()) == 7 * int(load.sum())
