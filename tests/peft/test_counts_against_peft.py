"""The formulas of the baselines, against the modules and files of PEFT itself."""

import json

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tucka
import tucka.peft
from support.cost_meter import measure
from tucka.spec import mixes_each_row

CONFIGS = {
    "lora": lambda sizes, names: peft.LoraConfig(target_modules=names, **sizes),
    "dora": lambda sizes, names: peft.LoraConfig(target_modules=names, use_dora=True, **sizes),
    "vera": lambda sizes, names: peft.VeraConfig(target_modules=names, **sizes),
    "oft": lambda sizes, names: peft.OFTConfig(target_modules=names, oft_block_size=sizes["block_size"]),
    "boft": lambda sizes, names: peft.BOFTConfig(target_modules=names, boft_block_size=sizes["block_size"]),
    # A random start: the symmetric one warns about odd ranks.
    "hra": lambda sizes, names: peft.HRAConfig(target_modules=names, init_weights=False, **sizes),
}
CONFIGS["tucka"] = lambda sizes, names: tucka.peft.TuckAConfig(target_modules=names, **sizes)
methods = pytest.mark.parametrize("method", CONFIGS)
baselines = pytest.mark.parametrize("method", sorted(CONFIGS.keys() - {"tucka"}))


@pytest.fixture(autouse=True, scope="module")
def without_extension():
    """Keep BOFT from building its CUDA extension, which it tries anew for each layer where it cannot be built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
        yield


class Stack(nn.Module):
    """Linear layers side by side, each with an input of its own."""

    def __init__(self, layers, *, bias):
        super().__init__()
        self.layers = nn.ModuleDict(
            {f"layer{index}": nn.Linear(*layer, bias=bias) for index, layer in enumerate(layers)}
        )

    def forward(self, inputs):
        return torch.cat([layer(x) for layer, x in zip(self.layers.values(), inputs, strict=True)], dim=-1)


@st.composite
def stacks(draw, method):
    """Sizes of a method and layers that suit them; for the baselines a rank above the width is among them."""
    if method in ("oft", "boft"):
        block = draw(st.integers(2, 4))
        sizes, widths = {"block_size": block}, st.integers(1, 3).map(lambda blocks: blocks * block)
    else:
        letters = "rktp" if method == "tucka" else "r"
        # One expert in a group has nothing to learn by routing, of which the configuration warns.
        sizes = {letter: draw(st.integers(2 if letter == "t" else 1, 5)) for letter in letters}
        widths = st.integers(sizes["r"] if method == "tucka" else 1, 8)
    layers = draw(st.lists(st.tuples(widths, st.integers(1, 8)), min_size=1, max_size=3))
    return sizes, layers


def adapt(method, sizes, layers, *, bias=True):
    stack = Stack(layers, bias=bias)
    return peft.get_peft_model(stack, CONFIGS[method](sizes, list(stack.layers)))


@methods
@given(data=st.data())
def test_parameters_are_those_that_peft_trains(method, data):
    sizes, layers = data.draw(stacks(method))
    model = adapt(method, sizes, layers)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert tucka.count_parameters(method, layers, **sizes) == trained


@baselines
@given(data=st.data(), tokens=st.integers(2, 6), bias=st.booleans())
def test_multiply_adds_and_kept_bytes_are_those_of_pefts_own_step(method, data, tokens, bias):
    sizes, layers = data.draw(stacks(method))
    model = adapt(method, sizes, layers, bias=bias)
    inputs = [torch.randn(tokens, width, requires_grad=True) for width, _ in layers]
    measured = measure(lambda: model(inputs), owned=[*model.parameters(), *model.buffers()])
    frozen = tokens * sum(width * out for width, out in layers)
    assert tucka.count_flops(method, layers, tokens=tokens, **sizes) == measured.forward - frozen
    assert tucka.count_flops(method, layers, tokens=tokens, backward=True, **sizes) == measured.backward - frozen
    assert tucka.count_activation_bytes(method, layers, tokens=tokens, **sizes) == measured.kept_bytes


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
@given(data=st.data(), samples=st.integers(2, 3), length=st.integers(2, 3))
def test_multiply_adds_of_tucka_are_those_of_its_own_peft_method(routing, data, samples, length):
    # For a width of 1 torch takes the logits element by element.
    sizes, layers = data.draw(stacks("tucka").filter(lambda case: case[1][0][0] > 1))
    model = adapt("tucka", {**sizes, "routing": routing}, layers)
    inputs = [torch.randn(samples, length, width, requires_grad=True) for width, _ in layers]
    measured = measure(lambda: model(inputs))
    tokens = samples * length
    frozen = tokens * sum(width * out for width, out in layers)
    # Where token routing forms an outer product, it does so element by element, which torch's counter leaves out.
    weighed = sizes["k"] * sizes["t"] if sizes["t"] <= sizes["p"] else sizes["k"] * sizes["p"] + 1
    forms_outer = routing == "token" and not mixes_each_row(sizes["r"], weighed)
    outer = tokens * weighed * sizes["r"] * len(layers) if forms_outer else 0
    passed = {"tokens": tokens, "samples": samples, "routing": routing, "rotation": True, **sizes}
    assert tucka.count_flops("tucka", layers, **passed) == measured.forward - frozen + outer
    assert tucka.count_flops("tucka", layers, backward=True, **passed) == measured.backward - frozen + 2 * outer


@methods
def test_file_bytes_are_those_of_pefts_file_without_its_header(method, tmp_path):
    layers, sizes = [(8, 4), (12, 20)], {"block_size": 4} if method in ("oft", "boft") else {"r": 4}
    adapt(method, sizes, layers).save_pretrained(tmp_path)
    content = (tmp_path / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    entries = json.loads(content[8 : 8 + length])
    counted = sizes | ({"rotation": True} if method == "tucka" else {})
    assert tucka.count_file_bytes(method, layers, **counted) == len(content) - 8 - length
    tensors = len(entries) - ("__metadata__" in entries)
    assert length <= 150 * tensors


@given(
    layers=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3), tokens=st.integers(1, 5)
)
def test_full_fine_tuning_is_the_layers_themselves(layers, tokens):
    model = Stack(layers, bias=False)
    inputs = [torch.randn(tokens, width, requires_grad=True) for width, _ in layers]
    measured = measure(lambda: model(inputs), owned=model.parameters())
    frozen = tokens * sum(width * out for width, out in layers)
    assert tucka.count_parameters("full", layers) == sum(parameter.numel() for parameter in model.parameters())
    assert tucka.count_flops("full", layers, tokens=tokens) == measured.forward - frozen
    assert tucka.count_flops("full", layers, tokens=tokens, backward=True) == measured.backward - frozen
    assert tucka.count_activation_bytes("full", layers, tokens=tokens) == measured.kept_bytes


@settings(max_examples=10)
@given(blocks=st.integers(1, 3), block=st.integers(2, 4), out=st.integers(1, 6), tokens=st.integers(2, 5))
def test_the_papers_block_methods_are_blocks_on_activations_and_a_scale(blocks, block, out, tokens):
    width = blocks * block
    raw = torch.randn(blocks, block, block, requires_grad=True)
    scale = torch.ones(out, requires_grad=True)
    weight = torch.randn(out, width)
    x = torch.randn(tokens, width, requires_grad=True)
    identity = torch.eye(block)

    def forward():
        skew = 0.5 * (raw - raw.transpose(1, 2))
        rotation = torch.linalg.solve(identity + skew, identity - skew, left=False)
        rotated = torch.einsum("nkb,kbc->nkc", x.reshape(tokens, blocks, block), rotation)
        return nn.functional.linear(rotated.reshape(tokens, width), weight) * scale

    measured = measure(forward, owned=[raw, scale, weight])
    frozen = tokens * width * out
    for method in ("oft", "boft"):
        sizes = {"block_size": block, "variant": "paper"}
        assert tucka.count_parameters(method, [(width, out)], **sizes) == raw.numel() + scale.numel()
        assert tucka.count_flops(method, [(width, out)], tokens=tokens, **sizes) == measured.forward - frozen
        backward = tucka.count_flops(method, [(width, out)], tokens=tokens, backward=True, **sizes)
        assert backward == measured.backward - frozen
        assert tucka.count_activation_bytes(method, [(width, out)], tokens=tokens, **sizes) == measured.kept_bytes
