"""Bad input raises one error that names what is wrong, where, and the cure."""

import peft
import pytest
import torch
from torch import nn

from tucka.backends.torch import HouseholderAdapter, Router, TuckerAdapter, mix_cores, tucker_adapt, tucker_adapt_gated
from tucka.errors import RouteError, ShapeError, TuckaError
from tucka.peft import TuckAConfig
from tucka.spec import TuckerSpec


def adapter(routing="batch"):
    return TuckerAdapter(nn.Linear(8, 4), TuckerSpec(rank=3, routing=routing))


WHERE = r"\(TuckerAdapter around Linear\(in_features=8, out_features=4, bias=True\)\)"


def test_another_width():
    message = rf"x: expected axes \(\.\.\., d\) with d = 8 to match basis \(8, 3\), got shape \(2, 7\) {WHERE}"
    with pytest.raises(ShapeError, match=message):
        adapter()(torch.ones(2, 7), torch.ones(2, 2))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_another_dtype(dtype):
    with pytest.raises(TuckaError, match=rf"x: expected a real floating-point dtype, got {dtype} {WHERE}\. Convert it"):
        adapter()(torch.ones(2, 8).to(dtype), torch.ones(2, 2))


def test_another_device():
    message = rf"x: expected a tensor on cpu, where the basis is, got one on meta {WHERE}\. Move one of them"
    with pytest.raises(TuckaError, match=message):
        adapter()(torch.ones(2, 8, device="meta"), torch.ones(2, 2))
    with pytest.raises(
        RouteError, match=r"hidden: expected a tensor on cpu, as the router, got one on meta \(Router\)"
    ):
        Router(TuckerSpec(), 8)(torch.ones(2, 8, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_than_the_layers(dtype):
    message = rf"x: expected dtype torch.float32, as the layer's weight, got {dtype} {WHERE}\. Convert it with x\.to"
    with pytest.raises(TuckaError, match=message):
        adapter()(torch.ones(2, 8).to(dtype), torch.ones(2, 2))


def test_a_layer_that_converts_its_input_may_get_any_dtype():
    layer = nn.Linear(8, 4)
    layer.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    adapted = TuckerAdapter(layer, TuckerSpec(rank=3))
    assert adapted(torch.ones(2, 8).bfloat16(), torch.ones(2, 2)).dtype == torch.float32


def bad_inputs():
    return {
        "width": (torch.ones(2, 7), r"x: expected axes .*shape \(2, 7\) \(NAME\)\. Give the layer"),
        "kind": (torch.ones(2, 8).long(), r"x: expected a real floating-point dtype.*\(NAME\)\. Convert it"),
        "dtype": (torch.ones(2, 8).double(), r"x: expected dtype torch.float32.*\(NAME\)\. Convert it"),
        "device": (torch.ones(2, 8, device="meta"), r"x: expected a tensor on cpu.*\(NAME\)\. Move one"),
    }


@pytest.mark.parametrize("what", bad_inputs())
def test_a_model_that_peft_has_adapted_names_the_layers_path(what):
    base = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 4))
    model = peft.get_peft_model(base, TuckAConfig(r=3, target_modules=["0.0", "1"]))
    x, message = bad_inputs()[what]
    with pytest.raises(TuckaError, match=message.replace("NAME", r"0\.0")):
        model(x)
    assert model(torch.ones(2, 8)).shape == (2, 4)


def test_a_model_that_peft_has_adapted_needs_a_batch_axis():
    base = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 4))
    model = peft.get_peft_model(base, TuckAConfig(r=3, target_modules=["0.0", "1"]))
    with pytest.raises(RouteError, match=r"route: expected an input with axes .* \(8,\) \(0\.0\)\. Add a batch axis"):
        model(torch.ones(8))


@pytest.mark.parametrize("what", bad_inputs())
def test_reflections_describe_their_layer(what):
    adapted = HouseholderAdapter(nn.Linear(8, 4), 2)
    x, message = bad_inputs()[what]
    with pytest.raises(TuckaError, match=message.replace("NAME", r"HouseholderAdapter around Linear\(.*\)")):
        adapted(x)


def test_gates_that_do_not_fit():
    with pytest.raises(ShapeError, match=rf"gates: expected axes \(\.\.\., k, t\) with \(k, t\) = \(2, 2\).*{WHERE}"):
        adapter()(torch.ones(2, 8), torch.ones(3, 2))
    with pytest.raises(ShapeError, match=rf"gates: expected leading axes that are the first of x's \(2,\).*{WHERE}"):
        adapter()(torch.ones(2, 8), torch.ones(3, 2, 2))


def test_parts_that_do_not_fit():
    x, basis, cores, factor, gates = (torch.ones(*shape) for shape in ((5, 4), (4, 2), (3, 1, 2, 2), (2, 1), (3, 2)))
    with pytest.raises(
        ShapeError, match=r"cores: expected axes \(\.\.\., r, r\) with r = 2 .*, got shape \(3, 1, 3, 3\)"
    ):
        tucker_adapt_gated(x, basis, torch.ones(3, 1, 3, 3), factor, gates.expand(5, 3, 2))
    with pytest.raises(ShapeError, match=r"cores: expected axes \(k, p, r, r\), got shape \(3, 2, 2\)"):
        mix_cores(torch.ones(3, 2, 2), factor, gates)
    with pytest.raises(ShapeError, match=r"expert_factor: expected axes \(t, p\) with p = 1"):
        mix_cores(cores, torch.ones(2, 3), gates)
    with pytest.raises(ShapeError, match=r"gates: expected axes \(\.\.\., k, t\) with \(k, t\) = \(3, 2\)"):
        mix_cores(cores, factor, torch.ones(6, 1))
    with pytest.raises(ShapeError, match=r"mixed_core: expected axes \(\.\.\., r, r\) with r = 2"):
        tucker_adapt(x, basis, torch.ones(3, 3))
    with pytest.raises(ShapeError, match=r"mixed_core: expected leading axes that are the first of x's \(5,\)"):
        tucker_adapt(x, basis, torch.ones(4, 2, 2))


def test_a_router_of_another_width():
    with pytest.raises(
        RouteError, match=r"hidden: expected axes \(B, \.\.\., d\) with d = 8.*\(Router\)\. Make the router"
    ):
        Router(TuckerSpec(), 8)(torch.ones(2, 7))
    with pytest.raises(RouteError, match="hidden: expected axes"):
        Router(TuckerSpec(), 8)(torch.ones(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_another_shape(dtype):
    with pytest.raises(ShapeError, match=r"mask: expected shape \(2, 3\) to match hidden, got shape \(2, 4\)"):
        Router(TuckerSpec(), 8)(torch.ones(2, 3, 8, dtype=dtype), torch.ones(2, 4))
