"""What a forward keeps for its backward, and how many multiply-adds it takes."""

import pytest
import torch
from torch import nn

import tucka
from support.cost_meter import measure
from tucka.backends.torch import HouseholderAdapter, TuckerAdapter
from tucka.spec import TuckerSpec

WIDTH, RANK, TOKENS = 128, 4, (4, 64)


class Lora(nn.Module):
    """The arithmetic of PEFT's LoRA, its casts included."""

    def __init__(self, base_layer, rank):
        super().__init__()
        self.base_layer = base_layer
        self.a = nn.Linear(base_layer.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base_layer.out_features, bias=False)

    def forward(self, x, _gates):
        return self.base_layer(x) + (self.b(self.a(x.to(self.a.weight.dtype))) * 0.5).to(x.dtype)


def frozen(dtype=torch.float32):
    return nn.Linear(WIDTH, WIDTH).requires_grad_(False).to(dtype)


def kept(layers, x, gates):
    owned = [gates, *(tensor for layer in layers for tensor in (*layer.parameters(), *layer.buffers()))]
    return measure(lambda: sum(layer(x, gates).float().sum() for layer in layers), owned=owned).kept_bytes


def adapters(routing, count, dtype=torch.float32):
    spec = TuckerSpec(rank=RANK, routing=routing)
    gates = torch.rand(*{"batch": (), "sample": TOKENS[:1], "token": TOKENS}[routing], 2, 2)
    return [TuckerAdapter(frozen(dtype), spec) for _ in range(count)], gates


def activations(dtype=torch.float32):
    return torch.randn(*TOKENS, WIDTH).to(dtype).requires_grad_()


@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_little_more_than_lora(routing):
    x = torch.randn(4, 256, 768, requires_grad=True)
    spec = TuckerSpec(rank=8, routing=routing)
    gates = torch.rand(*{"batch": (), "sample": (4,)}[routing], 2, 2)
    base = nn.Linear(768, 8).requires_grad_(False)
    assert kept([TuckerAdapter(base, spec)], x, gates) <= 1.02 * kept([Lora(base, 8)], x, gates)


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_less_than_lora_on_a_bfloat16_base(routing):
    layers, gates = adapters(routing, 1, torch.bfloat16)
    x = activations(torch.bfloat16)
    assert kept(layers, x, gates) < kept([Lora(layers[0].base_layer, RANK)], x, gates)


def layouts(x):
    return {
        "contiguous": x,
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": torch.cat([x, x], dim=-1)[..., ::2],
    }


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_layers_that_read_one_input_share_it(routing, layout):
    x = layouts(activations())[layout].detach().requires_grad_()
    (one, gates), (three, _) = adapters(routing, 1), adapters(routing, 3)
    in_x = x.untyped_storage().nbytes()
    assert kept(three, x, gates) - in_x == 3 * (kept(one, x, gates) - in_x)


def test_layers_that_read_one_input_share_it_under_autocast():
    x = activations()
    (one, gates), (three, _) = adapters("batch", 1), adapters("batch", 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert kept(three, x, gates) - 4 * x.numel() == 3 * (kept(one, x, gates) - 4 * x.numel())


def test_reflections_share_their_input_too():
    x = activations()

    def of(count):
        layers = [HouseholderAdapter(frozen(), RANK) for _ in range(count)]
        owned = [tensor for layer in layers for tensor in layer.parameters()]
        return measure(lambda: sum(layer(x).sum() for layer in layers), owned=owned).kept_bytes

    assert of(3) - 4 * x.numel() == 3 * (of(1) - 4 * x.numel())


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_multiply_adds_are_those_of_the_formula(routing):
    layers, gates = adapters(routing, 1)
    x = activations()
    rows = x.numel() // WIDTH
    measured = measure(lambda: layers[0](x, gates)).forward - rows * WIDTH * WIDTH
    sizes = {"r": RANK, "k": 2, "t": 2, "p": 2, "routing": routing, "rotation": True}
    formula = tucka.count_flops("tucka", [(WIDTH, WIDTH)], tokens=rows, samples=TOKENS[0], **sizes)
    routers = 4 * WIDTH * {"batch": 1, "sample": TOKENS[0], "token": rows}[routing]
    assert measured == pytest.approx(formula - routers, rel=0.02)


def test_mixing_does_not_grow_with_the_batch():
    def mixing(samples):
        spec = TuckerSpec(rank=RANK)
        adapter, gates = TuckerAdapter(nn.Identity(), spec, in_features=WIDTH), torch.rand(2, 2)
        x = torch.randn(samples, 8, WIDTH)
        thin = samples * 8 * (2 * WIDTH * RANK + RANK * RANK)
        return measure(lambda: adapter(x, gates)).forward - thin

    turning = WIDTH * RANK * RANK + 2 * RANK**3
    assert mixing(1) == mixing(50) == 2 * 2 * 2 + (2 * 2 + 1) * RANK * RANK + turning
