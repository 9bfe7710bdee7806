"""What a call goes on from is found by what it is: under another name, or in a container, nothing is routed anew."""

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from support.adapting import adapt
from support.refusals import refused
from support.tiny_models import VOCABULARY, make, text, tokens
from tucka.errors import RouteError
from tucka.peft import last_route

routings = pytest.mark.parametrize("routing", ["batch", "sample"])


class Llama(LlamaForCausalLM):
    """A model that takes its cache under another name, maybe in a container."""

    def forward(self, input_ids=None, memory=None, **kwargs):
        if isinstance(memory, (tuple, dict)):
            memory = next(iter(memory.values() if isinstance(memory, dict) else memory))
        return super().forward(input_ids=input_ids, past_key_values=memory, **kwargs)


class T5(T5ForConditionalGeneration):
    """A model that takes its encoder's output under another name."""

    def forward(self, input_ids=None, seen=None, **kwargs):
        return super().forward(input_ids=input_ids, encoder_outputs=seen, **kwargs)


def renamed(kind, cls, routing):
    torch.manual_seed(0)
    model = cls(make(kind).config).eval()
    return adapt(kind, routing=routing, init_weights=False, affinity="dot", model=model)


WRAPPED = {"bare": lambda cache: cache, "a tuple": lambda cache: (cache,), "a dict": lambda cache: {"it": cache}}


@routings
@pytest.mark.parametrize("wrapped", WRAPPED)
@torch.no_grad()
def test_a_cache_under_another_name_carries_its_route(routing, wrapped):
    model = renamed("llama", Llama, routing)
    prompt, step = tokens(2, 7, seed=5), tokens(2, 1, seed=6)
    cache = DynamicCache(config=model.config)
    model(input_ids=prompt, memory=WRAPPED[wrapped](cache), use_cache=True)
    route = last_route(model)
    model(input_ids=step, use_cache=True)
    assert not torch.equal(last_route(model), route)
    model(input_ids=step, memory=WRAPPED[wrapped](cache), use_cache=True)
    assert torch.equal(last_route(model), route)


@routings
@torch.no_grad()
def test_an_encoders_output_under_another_name_carries_its_route(routing):
    model, inputs = renamed("t5", T5, routing), text(batch=2)
    expected = model(**inputs, decoder_input_ids=inputs["input_ids"]).logits
    hidden = model.get_encoder()(**inputs)
    output = model(seen=hidden, decoder_input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    torch.testing.assert_close(output.logits, expected)


STATES = {
    "rwkv": (
        lambda: RwkvForCausalLM(
            RwkvConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16)
        ),
        ["key", "value"],
        "state",
    ),
    "xlnet": (
        lambda: XLNetLMHeadModel(
            XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=2, n_head=2, d_inner=24, mem_len=8)
        ),
        ["layer_1", "layer_2"],
        "mems",
    ),
}


@routings
@pytest.mark.parametrize("name", STATES)
@torch.no_grad()
def test_states_that_tell_no_length_are_refused(name, routing):
    build, targets, key = STATES[name]
    torch.manual_seed(0)
    base = build().eval()
    model = adapt("llama", routing=routing, init_weights=False, model=base, target_modules=targets)
    output = model(input_ids=text(batch=2)["input_ids"], use_cache=True)
    with refused(RouteError, "route", "cache"):
        model(input_ids=tokens(2, 1, seed=6), **{key: output[key]})
    assert model.generate(input_ids=tokens(2, 5, seed=5), max_new_tokens=3, do_sample=False).shape == (2, 8)
