"""Which calls inside of a generation are its own, and that their route is that of the prompt it was given."""

import functools
import threading

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor

from support.refusals import refused
from support.routed import EXACT, causal, greedy, logits, route_of, routed
from support.tiny_models import make, tokens
from tucka.errors import RouteError
from tucka.peft import expert_load, given_route, last_route

routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])
coarse = pytest.mark.parametrize("routing", ["batch", "sample"])
PROMPT, OTHER = tokens(1, 7, seed=5), tokens(1, 5, seed=33)


class Interruption:
    """A streamer, and a logits processor, that call the model for somebody else between two tokens."""

    def __init__(self, model, ids=OTHER):
        self.model, self.ids, self.seen = model, ids, []

    def put(self, _tokens):
        self.seen.append(logits(self.model, {"input_ids": self.ids}))

    def end(self):
        pass

    def __call__(self, _ids, scores):
        self.put(None)
        return scores


@pytest.mark.each_value
@routings
@pytest.mark.parametrize("way", ["streamer", "processor"])
@pytest.mark.parametrize("other", [OTHER, tokens(1, 7, seed=9), tokens(3, 7, seed=9)], ids=lambda ids: str(ids.shape))
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_call_for_somebody_else_between_two_tokens(routing, way, other, use_cache):
    model = causal(routing)
    plain = greedy(model, PROMPT, use_cache=use_cache)
    route, alone = last_route(model), logits(model, {"input_ids": other})
    between = Interruption(model, other)
    options = {"streamer": between} if way == "streamer" else {"logits_processor": [between]}
    assert torch.equal(greedy(model, PROMPT, use_cache=use_cache, **options), plain)
    assert len(between.seen) > 5
    assert all(torch.equal(seen, alone) for seen in between.seen)
    if routing != "token":
        assert torch.equal(last_route(model), route)


@routings
def test_a_generation_inside_of_a_generation(routing):
    model = causal(routing)
    plain, other = greedy(model, PROMPT), greedy(model, OTHER)
    seen = []

    class Inside(LogitsProcessor):
        def __call__(self, ids, scores):
            seen.append(greedy(model, OTHER))
            return scores

    assert torch.equal(greedy(model, PROMPT, logits_processor=[Inside()]), plain)
    assert all(torch.equal(each, other) for each in seen)


@routings
def test_guidance_by_a_negative_prompt_has_two_routes(routing):
    model, negative, scale = causal(routing), tokens(1, 7, seed=9), 1.5
    options = {"negative_prompt_ids": negative, "negative_prompt_attention_mask": torch.ones_like(negative)}
    made = greedy(model, PROMPT, guidance_scale=scale, **options)
    # By hand: two conversations, each with a cache and a route of its own.
    caches, inputs, wanted = [DynamicCache(config=model.config) for _ in range(2)], [PROMPT, negative], PROMPT
    for _ in range(6):
        scores = []
        for cache, ids in zip(caches, inputs, strict=True):
            found = logits(model, {"input_ids": ids, "past_key_values": cache, "use_cache": True})
            scores.append(found[:, -1].float().log_softmax(dim=-1))
        token = (scale * (scores[0] - scores[1]) + scores[1]).argmax(dim=-1, keepdim=True)
        inputs, wanted = [token, token], torch.cat([wanted, token], dim=1)
    assert torch.equal(made, wanted)
    assert not torch.equal(made, greedy(model, PROMPT))


def repeating():
    """A prompt in which a look-up finds candidates."""
    return torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])


# Ways to guess several tokens at once; the guesses are no part of the prompt.
GUESSES = {
    "look-up": lambda model: {"prompt_lookup_num_tokens": 3},
    "assistant": lambda model: {"assistant_model": make("llama", seed=1).double()},
    "its own base": lambda model: {"assistant_model": model.base_model.model},
    "an adapted assistant": lambda model: {"assistant_model": causal("sample")},
    "early exit": lambda model: {"assistant_early_exit": 1},
}


@pytest.mark.each_value
@routings
@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("prompt", [PROMPT, repeating()], ids=["plain", "repeating"])
def test_candidates_do_not_change_what_is_generated(routing, guess, prompt):
    model = causal(routing)
    plain = greedy(model, prompt, new=10)
    route = last_route(model)
    assert torch.equal(greedy(model, prompt, new=10, **GUESSES[guess](model)), plain)
    if routing != "token":
        assert torch.equal(last_route(model), route)
        assert torch.equal(route_of(model, {"input_ids": prompt}), route)


@pytest.mark.parametrize("guess", ["look-up", "assistant"])
def test_candidates_of_a_padded_prompt(guess):
    model = causal("sample")
    padded = torch.nn.functional.pad(repeating(), (3, 0))
    mask = (padded != 0).long()
    guesses = GUESSES[guess](model)
    plain = greedy(model, repeating(), new=8)[:, 12:]
    assert torch.equal(greedy(model, padded, new=8, attention_mask=mask, **guesses)[:, 15:], plain)


@coarse
def test_a_prompt_in_chunks_is_refused_unless_its_route_is_known(routing):
    model = causal(routing)
    with refused(RouteError, "route", "whole prompt of 7 tokens | prefill_chunk_size | q_proj | given_route"):
        greedy(model, PROMPT, prefill_chunk_size=3)
    route = route_of(model, {"input_ids": PROMPT})
    with given_route(model, gates=route):
        assert torch.equal(greedy(model, PROMPT, prefill_chunk_size=3), greedy(model, PROMPT))
    assert torch.equal(greedy(model, PROMPT, prefill_chunk_size=7), greedy(model, PROMPT))  # one chunk


def test_a_prompt_in_chunks_with_token_routing():
    model = causal("token")
    assert torch.equal(greedy(model, PROMPT, prefill_chunk_size=3), greedy(model, PROMPT))


def test_rows_that_a_model_doubles_for_guidance_are_told_of_the_rows_that_were_given(monkeypatch):
    """As models of music do; and not of the rows that the generation makes of those."""
    model = causal("sample")
    inner = model.base_model.model
    prepare = inner.prepare_inputs_for_generation

    @functools.wraps(prepare)  # whose arguments generation asks for
    def doubled(ids, **options):
        options.pop("attention_mask")
        return prepare(ids.repeat(2, 1), **options)

    monkeypatch.setattr(inner, "prepare_inputs_for_generation", doubled)
    with (
        given_route(model, gates=torch.full((2, 4, 2), 0.5)),
        refused(RouteError, "route", "as many samples as given_route was told of, 2"),
    ):
        greedy(model, tokens(2, 7), num_beams=2, num_return_sequences=2)


@routings
@pytest.mark.parametrize("search", [{"num_beams": 3}, {"num_beams": 1}], ids=str)
def test_embeddings_as_the_prompt(routing, search):
    model, ids = causal(routing), tokens(2, 7)
    embeddings = model.get_input_embeddings()(ids).detach()
    mask = torch.ones_like(ids)
    made = model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=5, do_sample=False, **search)
    assert torch.equal(made, greedy(model, ids, new=5, **search)[:, 7:])


@routings
def test_the_loop_of_somebody_else(routing):
    """`custom_generate` runs inside of generate, and calls the model as it likes: each call is one of its own."""
    model = causal(routing)
    seen = []

    def loop(model, input_ids=None, **_options):
        for _ in range(3):
            found = logits(model, {"input_ids": input_ids, "use_cache": False})
            seen.append((input_ids, found))
            input_ids = torch.cat([input_ids, found[:, -1:].argmax(dim=-1)], dim=1)
        return input_ids

    model.generate(input_ids=PROMPT, custom_generate=loop, max_new_tokens=3)
    for ids, found in seen:
        torch.testing.assert_close(logits(model, {"input_ids": ids, "use_cache": False}), found, **EXACT)


def test_the_padding_of_a_prompt_in_chunks_does_not_count():
    model, prompts = causal("token"), tokens(2, 7)
    padded = torch.ones_like(prompts)
    padded[0, :2] = 0
    for options in ({}, {"prefill_chunk_size": 3}):
        made = {"attention_mask": padded, "max_new_tokens": 1, "do_sample": False, **options}
        model.generate(input_ids=prompts, **made)
        assert int(expert_load(model, reset=True).sum()) == 14 - 2


@routings
def test_threads_generate_from_one_model(routing):
    model = causal(routing)
    prompts = [tokens(1, 5 + number, seed=number) for number in range(4)]
    wanted = [greedy(model, prompt) for prompt in prompts]
    failures = []

    def work(number):
        for _ in range(3):
            if not torch.equal(greedy(model, prompts[number]), wanted[number]):
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_layers_that_read_the_tokens_of_a_bare_model():
    """A base model that generates, without PEFT's wrapper around it."""
    model = routed(make("gpt2"), ["c_attn"])
    root = model.base_model.model
    between = Interruption(root)
    assert torch.equal(greedy(root, PROMPT, streamer=between), greedy(model, PROMPT))
