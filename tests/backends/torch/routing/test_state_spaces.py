"""State-space models: their states carry the route as other models' keys do; layers that are only read are refused."""

import copy

import pytest
import torch

from support.refusals import refused
from support.routed import EXACT, FAMILIES, assert_rows_stand_alone, family, greedy, inputs_of, logits, routed
from support.tiny_models import tokens
from tucka.errors import ConfigError, RouteError
from tucka.peft import last_route

routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])
names = pytest.mark.parametrize("name", ["mamba", "falcon-mamba", "mamba2"])
PROMPT, STEP = tokens(2, 7, seed=5), torch.tensor([[9], [11]])
# float32 inside, in whatever dtype the model is.
CLOSE = {"rtol": 0, "atol": 1e-4}


@pytest.mark.each_value
@names
@routings
def test_it_evaluates_and_generates(name, routing):
    model = family(name, routing)
    if routing == "batch":
        assert logits(model, inputs_of(name)).isfinite().all()
    else:
        assert_rows_stand_alone(model, inputs_of(name))
    assert torch.equal(greedy(model, PROMPT), greedy(model, PROMPT, use_cache=False))
    beams = greedy(model, PROMPT, num_beams=2, use_cache=False)
    assert beams.shape == (2, 13)


@names
@routings
@torch.no_grad()
def test_the_states_carry_the_route(name, routing):
    model = family(name, routing)
    first = model(input_ids=PROMPT, use_cache=True)
    route, twin = last_route(model), copy.deepcopy(first.cache_params)
    output = model(input_ids=STEP, cache_params=first.cache_params, use_cache=True).logits
    if routing == "token":
        whole = model(input_ids=torch.cat([PROMPT, STEP], dim=1)).logits[:, -1:]
        torch.testing.assert_close(output, whole, **CLOSE)
    else:
        assert torch.equal(last_route(model), route)
    torch.testing.assert_close(model(input_ids=STEP, cache_params=twin, use_cache=True).logits, output, **EXACT)


@names
@pytest.mark.parametrize("routing", ["batch", "sample"])
@torch.no_grad()
def test_states_of_another_origin_are_refused(name, routing):
    model = family(name, routing)
    with model.disable_adapter():
        states = model(input_ids=PROMPT, use_cache=True).cache_params
    with refused(RouteError, "route", "filled cache | in_proj | given_route"):
        model(input_ids=STEP, cache_params=states, use_cache=True)


@names
def test_training_reaches_every_tensor(name):
    model = family(name, "sample").train()
    logits_ = model(input_ids=PROMPT).logits
    logits_.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("mamba", ["in_proj", "dt_proj"]),
        ("mamba", ["out_proj"]),
        ("mamba", "all-linear"),
        ("falcon-mamba", ["dt_proj"]),
        ("falcon-mamba", ["in_proj", "out_proj"]),
        ("mamba2", ["out_proj"]),
        ("mamba2", "all-linear"),
    ],
)
def test_a_layer_whose_weight_is_only_read_is_refused_by_name(name, targets):
    base = FAMILIES[name].build()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    with refused(ConfigError, "target_modules", "_proj | Mixer | weight | exclude_modules"):
        family(name, "sample", targets)
    assert all(torch.equal(base.state_dict()[key], value) for key, value in state.items())


@pytest.mark.parametrize(("name", "out"), [("mamba", ["dt_proj", "out_proj", "x_proj"]), ("mamba2", ["out_proj"])])
def test_the_cure_that_the_error_names_works(name, out):
    model = family(name, "sample", "all-linear", exclude_modules=out)
    assert_rows_stand_alone(model, inputs_of(name))


@routings
def test_a_hybrid_of_attention_and_states(routing):
    base = FAMILIES["jamba"].build()
    base.set_experts_implementation("eager")  # the other ones have no float64
    model = routed(base, ["q_proj", "v_proj", "in_proj"], routing)
    assert torch.equal(greedy(model, PROMPT), greedy(model, PROMPT, use_cache=False))
