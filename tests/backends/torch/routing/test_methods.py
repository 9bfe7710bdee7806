"""Methods that are called instead of the forward, and halves of a model that are called one by one."""

import copy
import inspect

import pytest
import torch
from torch import nn

from support.refusals import refused
from support.routed import EXACT, routed
from support.tiny_models import WIDTH
from tucka.errors import RouteError
from tucka.peft import given_route, last_route, pin_route

routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])


class Vision(nn.Module):
    """A model as timm has them; the library is known by the module of the class."""

    __module__ = "timm.models.made_for_a_test"

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 5)

    def forward_features(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x

    def forward_intermediates(self, x):
        first = torch.tanh(self.blocks[0](x))
        return self.forward_features(x), [first]

    def forward_head(self, x, pre_logits=False):
        pooled = x.mean(dim=1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


def vision(routing, targets=("0", "1", "head")):
    return routed(Vision(), list(targets), routing)


def patches(batch=3, length=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)


@routings
@torch.no_grad()
def test_features_and_head_give_what_the_forward_gives(routing):
    model, x = vision(routing), patches()
    wanted, route = model(x), last_route(model)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features), wanted, **EXACT)
    torch.testing.assert_close(last_route(model), route, **EXACT)
    torch.testing.assert_close(model.forward_intermediates(x)[0], features, **EXACT)
    model.forward_features(patches(seed=2))  # the features keep their own route
    torch.testing.assert_close(model.forward_head(features), wanted, **EXACT)


@pytest.mark.parametrize("routing", ["sample", "token"])
@torch.no_grad()
def test_features_of_a_sample_do_not_depend_on_the_others(routing):
    model, x = vision(routing), patches()
    together = model.forward_features(x)
    for row in range(3):
        torch.testing.assert_close(model.forward_features(x[row : row + 1]), together[row : row + 1], **EXACT)


@routings
def test_features_that_are_changed_or_not_the_models_own_have_no_route(routing):
    model, x = vision(routing), patches()
    features = model.forward_features(x)
    for others in (features + 0, torch.randn_like(features)):
        with refused(RouteError, "route", "forward_features | head | given_route"):
            model.forward_head(others)
    with given_route(model, groups=0):
        model.forward_head(features + 0)
    without_head = vision(routing, ["0", "1"])
    assert without_head.forward_head(torch.randn_like(features)).shape == (3, 5)


@routings
def test_gradients_go_through_features_and_head(routing):
    model, x = vision(routing), patches()
    found = []
    for call in (model, lambda x: model.forward_head(model.forward_features(x))):
        model.zero_grad()
        call(x).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("tucka_router" in name for name in found[0])
    torch.testing.assert_close(found[1], found[0], **EXACT)


@torch.no_grad()
def test_the_methods_stay_the_models_own():
    model, x = vision("sample"), patches()
    plain = model.get_base_model()
    assert list(inspect.signature(plain.forward_head).parameters) == ["x", "pre_logits"]
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied.forward_features(x), model.forward_features(x), **EXACT)
    assert copied.get_base_model().forward_features.call.module is copied.get_base_model()
    pin_route(model, group=1)
    assert "forward_features" not in vars(plain)
    torch.testing.assert_close(model.forward_head(model.forward_features(x)), model(x), **EXACT)


@torch.no_grad()
def test_a_method_of_another_library_is_put_back():
    base = Vision().double()
    base.forward_features = own = base.forward_features
    model = routed(base, ["0"])
    assert model.forward_features(patches()).shape == (3, 6, WIDTH)
    assert vars(model.unload())["forward_features"] is own


class Autoencoder(nn.Module):
    """A model of diffusers with two halves."""

    __module__ = "diffusers.models.made_for_a_test"

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 8))
        self.quant = nn.Linear(8, 8)
        self.decoder = nn.Sequential(nn.Linear(8, WIDTH))

    def encode(self, x):
        return self.quant(self.encoder(x))

    def decode(self, codes):
        return self.decoder(codes)

    def forward(self, x):
        return self.decode(self.encode(x))


@routings
@torch.no_grad()
def test_the_halves_of_an_autoencoder_are_called_one_by_one(routing):
    model, x = routed(Autoencoder(), ["encoder.0", "quant", "decoder.0"], routing), patches()
    wanted = model(x)
    codes = model.encode(x)
    torch.testing.assert_close(model.decode(codes), wanted, **EXACT)
    torch.testing.assert_close(model.decode(codes.clone()), wanted, **EXACT)  # a half has its own route
    assert sorted(model.base_model._scope().routers("default")) == ["decoder", "encoder", "quant"]
