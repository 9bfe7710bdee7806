"""Accelerate's offloading: an adapter's tensors come to the device when its modules are called."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import get_peft_model
from torch import nn

from tucka.errors import RouteError
from tucka.peft import TuckAConfig, initialize_router, pin_route

PINNED = {"pinned_gates": [[0.5, 0.5], [0.0, 0.0]]}
CPU = torch.device("cpu")


def adapted(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    given = {"r": 2, "routing": "sample", "init_weights": False, "target_modules": ["0", "2"], **options}
    return get_peft_model(net, TuckAConfig(**given)).eval()


def offload(model, way, folder):
    if way == "disk":
        disk_offload(model, str(folder), execution_device=CPU)
    else:
        cpu_offload(model, execution_device=CPU)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("options", [{}, {"routing": "token"}, {"routing": "batch"}, PINNED], ids=str)
@pytest.mark.parametrize("way", ["cpu", "disk"])
@torch.no_grad()
def test_an_offloaded_model_computes_the_same(tmp_path, way, options):
    model, x = adapted(**options), torch.randn(3, 4, 8)
    expected = copy.deepcopy(model)(x)
    offload(model, way, tmp_path)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_a_route_is_measured_on_an_offloaded_model_and_a_start_is_refused(tmp_path, way):
    model, batches = adapted(), list(torch.randn(4, 3, 4, 8))
    expected = pin_route(copy.deepcopy(model), batches=batches)
    offload(model, way, tmp_path)
    with pytest.raises(RouteError, match="before the model is offloaded"):
        initialize_router(model, batches, progress=False)
    torch.testing.assert_close(pin_route(model, batches=batches), expected)


@torch.no_grad()
def test_an_input_on_another_device_is_still_refused():
    with pytest.raises(TypeError, match="x: expected a tensor on device cpu as its adapter"):
        adapted()(torch.empty(3, 8, device="meta"))


@pytest.mark.parametrize("options", [{}, PINNED], ids=str)
def test_layers_on_two_devices(options):
    model = adapted(**options)
    for layer in (model.base_model.model[2], model.base_model.model[4]):
        layer.to("meta")
    model.base_model.model[2].register_forward_pre_hook(lambda _, arguments: (arguments[0].to("meta"),))
    assert model(torch.randn(3, 8)).device.type == "meta"


def test_gates_that_were_first_used_in_inference_mode_can_be_trained_with():
    model = adapted(**PINNED).to("meta")
    x = torch.empty(3, 8, device="meta")
    with torch.inference_mode():
        model(x)
    model.train()(x).sum().backward()
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)
