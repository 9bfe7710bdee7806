"""The route travels with the cache, through copies and operations on its rows, or the call is refused."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache

from support.caches import OPERATIONS, ORDER, PROMPT, STEP, by_hand, filled, step
from support.refusals import refused
from support.routed import EXACT, FAMILIES, causal, family, greedy, logits, routed
from support.tiny_models import tokens
from tucka.errors import RouteError

routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])
coarse = pytest.mark.parametrize("routing", ["batch", "sample"])
modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


@pytest.mark.each_value
@routings
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_cache_that_was_copied_or_whose_rows_were_chosen(routing, name):
    model = causal(routing)
    together = step(model, filled(model))
    cache = filled(model)
    change, rows = OPERATIONS[name]
    cache = change(cache) or cache
    torch.testing.assert_close(step(model, cache, rows(STEP)), rows(together), **EXACT)


@coarse
def test_a_cache_that_was_cropped(routing):
    model = causal(routing)
    cache = filled(model)
    wanted = step(model, cache, STEP)
    cache.crop(-1)
    torch.testing.assert_close(step(model, cache, STEP), wanted, **EXACT)


@coarse
def test_a_filled_cache_of_unknown_origin_is_refused(routing):
    model = causal(routing)
    with refused(RouteError, "route", "cache that carries no route | q_proj | given_route"):
        step(model, by_hand(filled(model), model))
    with refused(RouteError, "route", "cache that carries no route"):
        step(model, filled(causal(routing)))


@coarse
def test_a_call_that_fails_in_its_head_leaves_no_route_in_the_cache(routing):
    model = causal(routing)
    cache = DynamicCache(config=model.config)
    with pytest.raises(IndexError):
        model(input_ids=PROMPT, past_key_values=cache, labels=PROMPT + 1000)
    assert cache.get_seq_length() == PROMPT.shape[1]
    with refused(RouteError, "route", "cache that carries no route"):
        step(model, cache)


def test_a_filled_cache_of_unknown_origin_with_token_routing():
    model = causal("token")
    wanted = step(model, filled(model))
    torch.testing.assert_close(step(model, by_hand(filled(model), model)), wanted, **EXACT)


MOVES = {
    "replaced": lambda layer: setattr(layer, "keys", layer.keys[ORDER]),
    "in place": lambda layer: layer.keys.copy_(layer.keys[ORDER]),
    "one row": lambda layer: layer.keys[0].zero_(),
}


@pytest.mark.each_value
@coarse
@modes
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_rows_that_are_moved_by_hand_are_noticed(routing, mode, move, kind):
    model = causal(routing)
    with mode():
        cache = StaticCache(config=model.config, max_cache_len=16) if kind == "static" else None
        cache = filled(model, cache=cache)
        for layer in cache.layers:
            MOVES[move](layer)
        with refused(RouteError, "route", "rows have been changed"):
            model(input_ids=STEP, past_key_values=cache)


@coarse
@modes
def test_states_without_keys_are_noticed_too(routing, mode):
    model = family("mamba", routing)
    with mode():
        cache = model(input_ids=PROMPT, use_cache=True).cache_params
        model(input_ids=STEP, cache_params=copy.deepcopy(cache))
        for layer in cache.layers:
            for states in (layer.conv_states, layer.recurrent_states):
                states[0].copy_(states[0][ORDER])
        with refused(RouteError, "route", "rows have been changed"):
            model(input_ids=STEP, cache_params=cache)


def latent():
    """A model whose cache holds latents, which one adapted layer sees again with each token."""
    base = FAMILIES["deepseek-v3"].build()
    base.set_experts_implementation("eager")
    return routed(base, ["q_b_proj", "kv_b_proj"], "token")


def test_latents_of_earlier_tokens_keep_the_routes_of_their_tokens():
    model = latent()
    whole = logits(model, {"input_ids": torch.cat([PROMPT, STEP], dim=1)})[:, -1:]
    torch.testing.assert_close(step(model, filled(model)), whole, **EXACT)
    for name in ("copied", "reordered", "selected", "repeated"):
        cache = filled(model)
        change, rows = OPERATIONS[name]
        cache = change(cache) or cache
        torch.testing.assert_close(step(model, cache, rows(STEP)), rows(whole), **EXACT)


def test_latents_of_tokens_whose_routes_are_not_known_are_refused():
    model = latent()
    with refused(RouteError, "route", "routes of all cached tokens | kv_b_proj | exclude_modules"):
        step(model, by_hand(filled(model), model))
    with model.disable_adapter():
        cache = filled(model)
    with refused(RouteError, "route", "routes of all cached tokens | kv_b_proj"):
        step(model, cache)


# Compiled: half a minute each


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = {
    "left": (lambda cache: None, lambda rows: rows),
    "emptied": (lambda cache: cache.reset(), lambda rows: tokens(3, 7, seed=8)),
    **{name: OPERATIONS[name] for name in ("reordered", "selected", "repeated")},
}


CASES = [
    case
    for case in itertools.product(("batch", "sample"), COMPILED, ("dynamic", "static"))
    if case[2] == "dynamic" or case[1] not in ("selected", "repeated")  # which caches of fixed size do not have
]


@pytest.mark.slow  # each compiles a model
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(("routing", "name", "kind"), CASES)
def test_a_cache_that_a_compiled_prompt_has_filled(routing, name, kind):
    model = causal(routing)
    change, rows = COMPILED[name]

    def fresh():
        return StaticCache(config=model.config, max_cache_len=16) if kind == "static" else None

    cache = filled(model, cache=fresh())
    change(cache)
    wanted = step(model, cache, rows(STEP))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = filled(compiled, cache=fresh())
    change(cache)
    torch.testing.assert_close(step(compiled, cache, rows(STEP)), wanted, **EXACT)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@coarse
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_rows_that_are_moved_between_compiled_calls_are_noticed(routing, kind):
    model = causal(routing)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=16) if kind == "static" else None
    cache = filled(compiled, cache=cache)
    for layer in cache.layers:
        layer.keys.copy_(layer.keys[ORDER])
    with pytest.raises(RuntimeError, match="rows that have been moved"):
        step(compiled, cache)


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_compiler")
@coarse
def test_a_static_cache_that_was_filled_by_another_model_is_noticed_when_compiled(routing):
    model = causal(routing)
    cache = filled(causal(routing), cache=StaticCache(config=model.config, max_cache_len=16))
    with pytest.raises(RuntimeError, match="carries no route"):
        step(torch.compile(model, backend="eager", fullgraph=True), cache)


def test_a_conversation_goes_on_after_a_generation_was_interrupted():
    model = causal("sample")
    cache = DynamicCache(config=model.config)

    def stop(ids, scores):
        if ids.shape[1] > PROMPT.shape[1] + 2:
            raise KeyboardInterrupt
        return scores

    with pytest.raises(KeyboardInterrupt):
        greedy(model, PROMPT, past_key_values=cache, logits_processor=[stop])
    wanted = filled(model)
    wanted.crop(-1)
    cache.crop(-(cache.get_seq_length() - 6))
    torch.testing.assert_close(step(model, cache), step(model, wanted), **EXACT)
