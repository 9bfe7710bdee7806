"""Routes in generation and with caches: one from the prompt to the end, whatever is cached, searched or sampled."""

import copy
import inspect
import pickle

import pytest
import torch
from transformers import DynamicCache

from support.adapting import config_for, visible, watched
from support.tiny_models import inputs_for, make, output_of, text
from support.upstream import transformers_takes_peft
from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import given_route, last_route

CAUSAL = ["llama", "opt", "gpt2"]
SEARCHES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 8},
    "beams": {"do_sample": False, "num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
    "several beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
}
generators = pytest.mark.parametrize("kind", [*CAUSAL, "t5"])
routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])


def generate(model, inputs, **options):
    torch.manual_seed(3)
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    return model.generate(**prompt, **{"max_new_tokens": 5, "do_sample": False, **options})


@pytest.mark.each_value
@generators
@routings
@pytest.mark.parametrize("search", SEARCHES)
def test_cached_and_uncached_generation_give_the_same_tokens(kind, routing, search):
    model = visible(kind, routing, alpha=2.0)
    inputs = text(batch=2)
    inputs["attention_mask"][0, :2] = 0
    cached = generate(model, inputs, **SEARCHES[search])
    assert torch.equal(generate(model, inputs, use_cache=False, **SEARCHES[search]), cached)
    assert not torch.equal(generate(make(kind), inputs, **SEARCHES[search]), cached)


@generators
@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_a_generation_routes_once_on_its_prompt(kind, routing, monkeypatch):
    model, inputs = visible(kind, routing), text(batch=2)
    router = scope_of(model).router("default")
    calls = []
    router.register_forward_hook(lambda module, args, gates: calls.append(gates))
    generate(model, inputs, use_cache=False)
    assert len(calls) == 1
    with torch.no_grad():
        if kind == "t5":
            model(input_ids=inputs["input_ids"], decoder_input_ids=inputs["input_ids"])
        else:
            model(input_ids=inputs["input_ids"])
    torch.testing.assert_close(calls[1], calls[0])
    generate(model, text(batch=2, seed=9))
    assert len(calls) == 3


@pytest.mark.parametrize("kind", CAUSAL)
def test_generation_is_a_loop_of_forwards_under_the_prompts_route(kind):
    model, ids = visible(kind), text(batch=2)["input_ids"]
    expected = generate(model, text(batch=2))
    model(input_ids=ids)
    grown = ids
    with torch.no_grad(), given_route(model, gates=last_route(model)):
        for _ in range(5):
            grown = torch.cat([grown, model(input_ids=grown).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(grown, expected)


@pytest.mark.parametrize("kind", CAUSAL)
def test_left_padding_does_not_change_what_is_generated(kind):
    model, inputs = visible(kind), text(batch=1, length=4)
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), inputs["input_ids"]], dim=1),
        "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1]]),
    }
    short, long = generate(model, inputs)[:, 4:], generate(model, padded)[:, 7:]
    assert torch.equal(short, long)


@transformers_takes_peft
@generators
def test_transformers_own_adapters_generate_the_same(kind):
    wrapped, inputs = visible(kind), text(batch=2)
    native = make(kind)
    torch.manual_seed(100)
    config = config_for(kind, routing="sample", init_weights=False, affinity="dot")
    native.add_adapter(config)
    native.load_state_dict({k.removeprefix("base_model.model."): v for k, v in wrapped.state_dict().items()})
    native.eval()
    expected = generate(wrapped, inputs, num_beams=2)
    for model in (native, copy.deepcopy(native), pickle.loads(pickle.dumps(native))):
        for use_cache in (True, False):
            assert torch.equal(generate(model, inputs, num_beams=2, use_cache=use_cache), expected)
        assert "max_new_tokens" not in inspect.signature(model.generate).parameters
        assert "inputs" in inspect.signature(model.generate).parameters
    native.delete_adapter("default")
    assert torch.equal(generate(native, inputs), generate(make(kind), inputs))


def test_a_failed_generation_leaves_the_next_one_clean():
    model, inputs = visible("llama"), text(batch=2)
    expected = generate(model, inputs)

    def stop(ids, scores):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, text(batch=3, seed=5), logits_processor=[stop])
    assert torch.equal(generate(model, inputs), expected)
    with torch.no_grad():
        output_of(model, inputs)
    assert last_route(model).shape[0] == 2


# Caches outside of generation


@pytest.mark.parametrize("kind", CAUSAL)
@torch.no_grad()
def test_interleaved_conversations_keep_their_own_routes(kind):
    model = visible(kind, k=4)
    prompts = [text(batch=1, length=5, seed=seed)["input_ids"] for seed in (1, 2)]
    apart = []
    for prompt in prompts:
        outputs, cache, ids = [], DynamicCache(config=model.config), prompt
        for _ in range(3):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            ids = output.logits[:, -1:].argmax(-1)
            outputs.append((output.logits, last_route(model)))
        apart.append(outputs)
    assert not torch.equal(apart[0][0][1], apart[1][0][1])
    caches, inputs = [DynamicCache(config=model.config) for _ in prompts], list(prompts)
    for step in range(3):
        for number in (0, 1):
            output = model(input_ids=inputs[number], past_key_values=caches[number], use_cache=True)
            inputs[number] = output.logits[:, -1:].argmax(-1)
            assert torch.equal(output.logits, apart[number][step][0])
            assert torch.equal(last_route(model), apart[number][step][1])
            assert torch.equal(last_route(model), apart[number][0][1])


@torch.no_grad()
def test_a_cache_that_the_model_made_itself_and_tuples_carry_the_route_too():
    model, inputs = visible("llama"), text(batch=2)
    first = model(**inputs, use_cache=True)
    route = last_route(model)
    step = torch.full((2, 1), 7)
    model(input_ids=step, past_key_values=first.past_key_values)
    assert torch.equal(last_route(model), route)
    parts = model(**inputs, use_cache=True, return_dict=False)
    model(input_ids=step, past_key_values=parts[1], return_dict=False)
    assert torch.equal(last_route(model), route)


@torch.no_grad()
def test_an_emptied_cache_begins_a_new_conversation():
    model, inputs = visible("llama"), text(batch=2)
    cache = model(**inputs, use_cache=True).past_key_values
    cache.crop(-6)
    other = text(batch=2, seed=8)
    model(**other, past_key_values=cache)
    route = last_route(model)
    model(**other)
    assert torch.equal(last_route(model), route)


@torch.no_grad()
def test_a_conversation_goes_on_in_generate_with_its_route():
    model, inputs = visible("llama"), text(batch=2)
    first = generate(model, inputs, return_dict_in_generate=True)
    route = last_route(model)
    longer = torch.cat([first.sequences, text(batch=2, length=2, seed=4)["input_ids"]], dim=1)
    again = {"input_ids": longer, "attention_mask": torch.ones_like(longer)}
    generate(model, again, past_key_values=first.past_key_values)
    assert torch.equal(last_route(model), route)


# Encoder and decoder


@routings
@torch.no_grad()
def test_the_encoder_routes_and_the_decoder_follows(routing):
    model, inputs = visible("t5", routing), inputs_for("t5")
    made = watched(model)
    model(**inputs)
    assert len(made) == 1
    first = model.base_model.model.encoder.block[0].layer[0]
    read = first.layer_norm(model.get_input_embeddings()(inputs["input_ids"]))
    torch.testing.assert_close(made[0][0], read)
    shape = {"batch": (3, 2), "sample": (3, 3, 2), "token": (3, 6, 3, 2)}[routing]
    assert last_route(model).shape == shape


@torch.no_grad()
def test_a_decoder_as_long_as_its_encoder_does_not_take_its_tokens_for_its_own():
    model = visible("t5", "token")
    gates = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "tucka_experts"):
            layer.register_forward_hook(
                lambda module, args, out, name=name: gates.update(
                    {name: scope_of(model).fit("default", module, args[0]).gates}
                )
            )
    inputs = inputs_for("t5")
    model(**inputs)
    encoder = {value.ndim for name, value in gates.items() if ".encoder." in name}
    decoder = {value.ndim for name, value in gates.items() if ".decoder." in name}
    assert (encoder, decoder) == ({4}, {3})


@torch.no_grad()
def test_padding_of_the_encoder_reaches_generation():
    model, inputs = visible("t5", "sample"), text(batch=2)
    padded = {key: torch.cat([value, torch.zeros(2, 3, dtype=value.dtype)], dim=1) for key, value in inputs.items()}
    assert torch.equal(generate(model, inputs, num_beams=2), generate(model, padded, num_beams=2))
    generate(model, inputs)
    route = last_route(model)
    generate(model, padded)
    torch.testing.assert_close(last_route(model), route)
