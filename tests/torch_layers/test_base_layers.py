"""What can be adapted: anything that is called with one input and tells, or is told, its width."""

import copy

import pytest
import torch
from torch import nn

from tucka.backends.torch import Router, TuckerAdapter, tucker_adapt_gated
from tucka.errors import ConfigError, RouteError
from tucka.spec import TuckerSpec

SPEC = TuckerSpec(rank=3)


class Hidden(nn.Module):
    """Stands in for a quantised layer: int8 numbers under names of its own, no weight."""

    def __init__(self, layer):
        super().__init__()
        self.in_features = layer.in_features
        scale = layer.weight.abs().amax() / 127
        self.register_buffer("packed", (layer.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.detach())

    def forward(self, x):
        return x @ (self.packed * self.scale).t().to(x.dtype)


def adapted_by_hand(adapter, x, gates):
    basis, cores, factor = adapter.parts.basis, adapter.parts.cores, adapter.parts.expert_factor
    return tucker_adapt_gated(x, basis, cores, factor, gates, alpha=adapter.spec.alpha)


def test_a_layer_that_hides_its_weight():
    layer = Hidden(nn.Linear(8, 4))
    adapter, gates, x = TuckerAdapter(layer, SPEC, init_weights=False), torch.rand(2, 2), torch.randn(5, 8)
    torch.testing.assert_close(adapter(x, gates), layer(adapted_by_hand(adapter, x, gates)))


def eight_bits(layer):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    packed.load_state_dict(layer.state_dict())
    return packed.to("cpu")  # which is when it quantises


def four_bits(layer):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32)
    packed.load_state_dict(layer.state_dict())
    return packed.to("cpu")


def eight_bits_of_torchao(layer):
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(layer.requires_grad_(False))
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    return holder[0]


@pytest.mark.parametrize("quantize", [eight_bits, four_bits, eight_bits_of_torchao])
@pytest.mark.parametrize("lead", [(), (5,)], ids=["batch", "sample"])
def test_a_quantised_linear(quantize, lead):
    torch.manual_seed(0)
    exact = nn.Linear(64, 32)
    layer = quantize(copy.deepcopy(exact))
    x = torch.randn(5, 64, requires_grad=True)
    error = (layer(x) - exact(x)).norm() / exact(x).norm()
    assert 0 < error < 0.2  # quantised it is
    adapter, gates = TuckerAdapter(layer, SPEC), torch.rand(*lead, 2, 2, requires_grad=True)
    assert torch.equal(adapter(x, gates), layer(x))
    nn.init.normal_(adapter.parts.cores)
    result = adapter(x, gates)
    torch.testing.assert_close(result, layer(adapted_by_hand(adapter, x, gates)))
    result.square().sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in (x, gates, *adapter.parts.parameters()))


def test_conv1d_of_transformers():
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(4, 8)  # weight (in, out)
    adapter, gates, x = TuckerAdapter(layer, SPEC, init_weights=False), torch.rand(2, 2), torch.randn(2, 5, 8)
    torch.testing.assert_close(adapter(x, gates), layer(adapted_by_hand(adapter, x, gates)))


@pytest.mark.parametrize("lead", [(), (2,)], ids=["batch", "sample"])
@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(8, 4, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, (3, 2), padding=1, stride=2), nn.Conv3d(8, 4, 2)],
    ids=lambda layer: f"{type(layer).__name__}{layer.kernel_size}",
)
def test_convolutions_along_their_channels(layer, lead):
    adapter, gates = TuckerAdapter(layer, SPEC, init_weights=False), torch.rand(*lead, 2, 2)
    x = torch.randn(2, 8, *[5] * len(layer.kernel_size))
    by_hand = adapted_by_hand(adapter, x.movedim(1, -1), gates).movedim(-1, 1)
    torch.testing.assert_close(adapter(x, gates), layer(by_hand))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_starts_as_the_base_bit_for_bit(memory_format):
    layer = nn.Conv2d(8, 4, 3)
    adapter, x = TuckerAdapter(layer, SPEC), torch.randn(2, 8, 7, 7).contiguous(memory_format=memory_format)
    assert torch.equal(adapter(x, torch.rand(2, 2)), layer(x))


def test_a_convolution_without_a_batch_axis():
    layer = nn.Conv2d(8, 4, 3)
    adapter, gates, x = TuckerAdapter(layer, SPEC, init_weights=False), torch.rand(2, 2), torch.randn(8, 5, 6)
    torch.testing.assert_close(adapter(x, gates), adapter(x[None], gates)[0])


def test_refusals():
    with pytest.raises(ConfigError, match=r"base_layer: expected a convolution with groups=1.*got groups=2"):
        TuckerAdapter(nn.Conv2d(8, 4, 3, groups=2), SPEC)
    with pytest.raises(ConfigError, match=r"got MultiheadAttention .*\. Use an attention with"):
        TuckerAdapter(nn.MultiheadAttention(8, 2), SPEC)
    with pytest.raises(ConfigError, match="got MultiheadAttention"):
        TuckerAdapter(nn.MultiheadAttention(8, 2), SPEC, in_features=8)
    with pytest.raises(ConfigError, match=r"base_layer: expected a layer with in_features.*Pass in_features"):
        TuckerAdapter(nn.ReLU(), SPEC)
    with pytest.raises(ConfigError, match="rank: expected at most the layer's width 2, got 3"):
        TuckerAdapter(nn.Linear(2, 4), SPEC)


def test_token_routing_of_a_convolution_is_refused():
    adapter = TuckerAdapter(nn.Conv2d(8, 4, 3), SPEC)
    with pytest.raises(RouteError, match=r"gates: expected batch or sample routing for a convolution.*Conv2d"):
        adapter(torch.randn(2, 8, 5, 5), torch.rand(2, 5, 2, 2))


def test_any_layer_with_a_given_width_and_further_arguments():
    class Scaled(nn.Module):
        def forward(self, x, scale, *, shift):
            return x * scale + shift

    adapter = TuckerAdapter(Scaled(), SPEC, in_features=8)
    x = torch.randn(2, 8)
    gates = Router(SPEC, 8)(x)
    assert torch.equal(adapter(x, gates, 2.0, shift=1.0), x * 2.0 + 1.0)
