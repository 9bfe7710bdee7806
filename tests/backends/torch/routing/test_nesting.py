"""Adapted models inside of others, and models that are called from inside of themselves."""

import warnings

import pytest
import torch
from peft import get_peft_model
from torch import nn

from support.refusals import refused
from support.routed import causal, greedy, logits
from support.tiny_models import WIDTH, make, tokens
from tucka.errors import ConfigError, RouteError
from tucka.peft import TuckAConfig, adapted_modules, add_group, initialize_router, last_route, pin_route
from tucka.peft.adapters import layers_of

routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])
OUTER, INNER = tokens(2, 7, seed=5), tokens(3, 5, seed=33)


@routings
@pytest.mark.parametrize("where", ["", "model", "model.embed_tokens", "model.layers.0.mlp", "model.layers.1"])
def test_a_model_that_is_called_from_inside_of_itself(routing, where):
    model = causal(routing)
    outer, inner, seen = logits(model, {"input_ids": OUTER}), logits(model, {"input_ids": INNER}), []

    def call_again(_module, _args):
        if not seen:
            seen.append(None)
            seen.append(logits(model, {"input_ids": INNER}))

    handle = model.base_model.model.get_submodule(where).register_forward_pre_hook(call_again)
    assert torch.equal(logits(model, {"input_ids": OUTER}), outer)
    assert torch.equal(seen[1], inner)
    handle.remove()


@routings
def test_a_generation_from_inside_of_a_forward(routing):
    model = causal(routing)
    outer, made, seen = logits(model, {"input_ids": OUTER}), greedy(model, INNER), []

    def generate(_module, _args):
        if not seen:
            seen.append(None)
            seen.append(greedy(model, INNER))

    handle = model.base_model.model.model.embed_tokens.register_forward_pre_hook(generate)
    assert torch.equal(logits(model, {"input_ids": OUTER}), outer)
    assert torch.equal(seen[1], made)
    handle.remove()


class Around(nn.Module):
    """A model with two layers of its own around another one."""

    def __init__(self, inside):
        super().__init__()
        self.before, self.inside, self.after = nn.Linear(WIDTH, WIDTH), inside, nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.after(self.inside(self.before(x)))


def nested(outer=("before", "after"), routing="sample", **options):
    """An adapted model inside of an adapted model, both with an adapter of the same name."""
    torch.manual_seed(0)
    sizes = {"r": 4, "k": 3, "init_weights": False, "affinity": "dot"}
    inner = get_peft_model(
        make("plain"), TuckAConfig(**sizes, routing="sample", target_modules=["first", "second", "head"])
    )
    inner.base_model.model.head = nn.Identity()
    config = TuckAConfig(**{**sizes, "routing": routing, "target_modules": list(outer), **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes the inner model for one that is adapted a second time
        return get_peft_model(Around(inner), config).eval(), inner.eval()


def test_pinning_an_outer_model_leaves_the_inner_one_routed():
    model, inner = nested()
    x = torch.randn(3, WIDTH)
    model(x)
    route = last_route(inner)
    pin_route(model, group=1)
    assert all(p.requires_grad for name, p in inner.named_parameters() if "tucka_router" in name)
    model(x)
    assert last_route(inner).shape == route.shape
    with refused(RouteError, "model"):
        last_route(nn.ModuleList([make("plain"), nested()[0], nested()[0]]))


def test_merging_an_outer_model_leaves_the_inner_one_as_it_is():
    model, inner = nested()
    x = torch.randn(3, WIDTH)
    pin_route(model, group=1)
    wanted = model(x)
    model.merge_adapter()
    assert not any(layer.merged for _, layer in layers_of(inner))
    torch.testing.assert_close(model(x), wanted)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), wanted)
    with refused(ConfigError, "model", "adapted model inside | Unload the inner model first"):
        model.merge_and_unload()
    with refused(ConfigError, "model", "adapted model inside | Unload the inner model first"):
        model.unload()
    torch.testing.assert_close(model(x), wanted)


def test_groups_and_starts_of_an_outer_model_are_its_own():
    model, inner = nested(routing="given")
    shapes = {name: p.shape for name, p in inner.named_parameters()}
    assert add_group(model) == 3
    assert {name: p.shape for name, p in inner.named_parameters()} == shapes
    model, inner = nested()
    before = [p.clone() for name, p in inner.named_parameters() if "tucka_router" in name]
    initialize_router(model, torch.randn(4, 3, WIDTH), progress=False)
    after = [p for name, p in inner.named_parameters() if "tucka_router" in name]
    assert all(map(torch.equal, before, after))
    assert len(adapted_modules(model)) == 4
    assert [name for name, _ in layers_of(model)] == ["base_model.model.before", "base_model.model.after"]


def test_targets_inside_of_an_adapted_model_are_refused():
    with refused(ConfigError, "target_modules", "exclude_modules"):
        nested(outer=["before", "second"])
