"""Bases whose weights are quantised or hidden: they are only called.

Stand-ins of the four ways to hide a weight, and the libraries themselves where they are installed.
"""

import copy
import functools
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from support.tiny_models import WIDTH
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import TuckaError
from tucka.peft import TuckAConfig, export_lora, initialize_router, pin_route


def quantized(layer):
    """Whole numbers and a scale for each output, as 8-bit libraries keep them."""
    scale = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 127
    return torch.round(layer.weight.detach() / scale).to(torch.int8), scale


class PackedWeight(nn.Linear):
    """As bitsandbytes: a Linear whose parameter holds whole numbers, and which computes in a dtype of its own."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.bias = layer.bias
        packed, self.scale = quantized(layer)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.compute_dtype = torch.float32

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class OtherNames(nn.Module):
    """As GPTQ: buffers of other names, no weight."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed, scale = quantized(layer)
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scale)
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.to(x.dtype) * self.scales, self.bias)


class Hidden(nn.Module):
    """Tells its width and nothing else."""

    def __init__(self, layer):
        super().__init__()
        self.in_features = layer.in_features
        self._call = [layer.requires_grad_(False)]

    def forward(self, x):
        return self._call[0](x)


class Numbers(torch.Tensor):
    """As torchao: a tensor that says it holds floating-point numbers, and holds others."""

    @staticmethod
    def __new__(cls, packed, scale):
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=scale.dtype)

    def __init__(self, packed, scale):
        self.packed, self.scale = packed, scale

    def __reduce_ex__(self, protocol):
        return Numbers, (self.packed, self.scale)

    def __deepcopy__(self, memo):
        return nn.Parameter(Numbers(self.packed.clone(), self.scale.clone()), requires_grad=False)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *bias = args
            return function(x, weight.packed.to(x.dtype) * weight.scale, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Numbers(args[0].packed, args[0].scale)
        raise NotImplementedError(function)


def special_tensor(layer):
    layer.weight = nn.Parameter(Numbers(*quantized(layer)), requires_grad=False)
    return layer


def bitsandbytes(layer, bits, device="cpu", **options):
    library = pytest.importorskip("bitsandbytes")
    options = {"compute_dtype": torch.float32, **options} if bits == 4 else {"has_fp16_weights": False}
    cls = library.nn.Linear4bit if bits == 4 else library.nn.Linear8bitLt
    packed = cls(layer.in_features, layer.out_features, **options)
    packed.support_avx512bf16_for_cpu = False  # else an evaluation packs the weight so that it cannot be trained on
    packed.load_state_dict(layer.state_dict())
    return packed.to(device)  # quantises


def torchao(layer):
    library = pytest.importorskip("torchao.quantization")
    library.quantize_(layer, library.Int8WeightOnlyConfig())
    return layer


KINDS = {
    "packed": PackedWeight, "names": OtherNames, "hidden": Hidden, "tensor": special_tensor, "torchao": torchao,
    "8 bits": functools.partial(bitsandbytes, bits=8), "4 bits": functools.partial(bitsandbytes, bits=4),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)


class Base(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.first, self.second = wrap(nn.Linear(WIDTH, 20)), wrap(nn.Linear(20, 4))

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def make_base(kind):
    torch.manual_seed(0)
    return Base(KINDS[kind])


def adapted(kind, **options):
    config = TuckAConfig(r=3, target_modules=["first", "second"], routing="sample", **options)
    torch.manual_seed(1)
    return get_peft_model(make_base(kind), config)


x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))


@kinds
def test_adapters_start_train_and_switch_off_on_hidden_weights(kind):
    base = make_base(kind)(x).detach()
    model = adapted(kind)
    assert torch.equal(model(x), base)
    initialize_router(model, [x], progress=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert not torch.allclose(model(x), base, atol=1e-3)
    assert {p.dtype for name, p in model.named_parameters() if "tucka_" in name} == {torch.float32}
    with model.disable_adapter():
        assert torch.equal(model(x), base)


def strength(model):
    """How strong the rotation of the first layer is."""
    return model.base_model.model.first.tucka_experts["default"].strength.item()


@kinds
def test_the_start_knows_the_size_of_a_weight_that_peft_can_read(kind):
    torch.manual_seed(0)
    plain = get_peft_model(Base(nn.Identity()), TuckAConfig(r=3, target_modules=["first", "second"]))
    readable = kind in ("torchao", "8 bits", "4 bits")
    typical = (8 / 3) ** 0.5
    wanted = strength(plain) if readable else typical
    assert strength(adapted(kind)) == pytest.approx(wanted, rel=0.1 if readable else 1e-5)
    assert strength(plain) != pytest.approx(typical, rel=0.2)


@kinds
@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("ran", [True, False])
def test_an_adapter_is_added_without_touching_the_base(kind, ran, low):
    model = adapted(kind)
    layer = model.base_model.model.first.get_base_layer()
    output = model(x).detach() if ran else None
    weight = getattr(layer, "weight", None)
    model.add_adapter("other", TuckAConfig(r=2, target_modules=["first", "second"]), low_cpu_mem_usage=low)
    assert getattr(layer, "weight", None) is weight
    if ran:
        assert torch.equal(model(x), output)
    assert torch.equal(model(x), make_base(kind)(x))


@kinds
def test_saving_loading_and_unloading(kind, tmp_path):
    model = adapted(kind, init_weights=False)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(kind), tmp_path)
    assert torch.equal(loaded(x), model.eval()(x))
    assert torch.equal(loaded.unload()(x), make_base(kind).eval()(x))


@kinds
def test_copies(kind):
    model = adapted(kind, init_weights=False)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    if kind not in ("tensor", "torchao"):
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@kinds
def test_merging_is_refused_with_the_cure_and_changes_nothing(kind):
    model = adapted(kind, init_weights=False)
    pin_route(model, group=0)
    output, keys = model(x), set(model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(TuckaError, match=r"merge: expected .* full precision .*export_lora"):
            merge()
    assert torch.equal(model(x), output)
    assert set(model.state_dict()) == keys
    assert scope_of(model)._root is not None


@pytest.mark.parametrize("kind", ["packed", "names", "torchao", "8 bits", "4 bits"])
@torch.no_grad()
def test_an_export_reproduces_the_outputs_on_the_quantised_base(kind, tmp_path):
    """By hand, since PEFT's LoRA knows some of these kinds only where transformers has made them."""
    model = adapted(kind, init_weights=False)
    pin_route(model, group=0)
    lora = export_lora(model, tmp_path)
    pairs = load_file(tmp_path / "adapter_model.safetensors")

    def with_lora(name, x):
        layer = model.base_model.model.get_submodule(name).get_base_layer()
        down, up = (pairs[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        return layer(x) + lora.lora_alpha / lora.r * (x @ down.t() @ up.t())

    found = with_lora("second", torch.tanh(with_lora("first", x)))
    # Eight bits of bitsandbytes round the activations too.
    tolerance = 0.03 if kind == "8 bits" else 1e-5
    torch.testing.assert_close(found, model(x), rtol=0, atol=tolerance * float(model(x).abs().max()))


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_on_a_gpu(bits):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    wrap = functools.partial(bitsandbytes, bits=bits, device="cuda", compute_dtype=torch.float16)
    base = Base(lambda layer: wrap(layer.half())).cuda()
    half = x.half().cuda()
    before = base(half)
    model = get_peft_model(base, TuckAConfig(r=3, target_modules=["first", "second"], routing="sample"))
    assert torch.equal(model(half), before)
    model(half).float().square().mean().backward()
    pin_route(model, group=0)
    with pytest.raises(TuckaError, match="full precision"):
        model.merge_adapter()
