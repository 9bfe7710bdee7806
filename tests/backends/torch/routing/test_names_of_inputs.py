"""What a call goes on from is found by what it is: under another name, or in a container, nothing is routed anew."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    BertModel,
    DynamicCache,
    GPT2Model,
    LlamaForCausalLM,
    LlamaModel,
    OPTModel,
    RwkvConfig,
    RwkvForCausalLM,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from support.adapting import adapt
from support.refusals import refused
from support.tiny_models import KINDS, VOCABULARY, WIDTH, make, text, tokens
from tucka.errors import RouteError
from tucka.peft import TuckAConfig, last_route

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


BODIES = {"bert": BertModel, "llama": LlamaModel, "gpt2": GPT2Model, "opt": OPTModel}


def taking(kind, routing, *, names, input_names=None):
    """An adapted body whose arguments have other names: {other: the model's own}."""
    torch.manual_seed(0)
    body = BODIES[kind](make(kind).config)
    body = body.decoder if kind == "opt" else body  # the decoder is what the layers are called by

    class Renamed(type(body)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **{names.get(name, name): value for name, value in kwargs.items()})

    body.__class__ = Renamed
    return visible(body.eval(), KINDS[kind].targets, routing, input_names=input_names or {})


def visible(base, targets, routing, **options):
    """A model whose adapters show at once and route by products."""
    config = TuckAConfig(
        r=4, k=3, routing=routing, affinity="dot", init_weights=False, target_modules=targets, **options
    )
    torch.manual_seed(100)
    return get_peft_model(base, config).eval()


def padded(batch=3):
    inputs = text(batch=batch)
    inputs["attention_mask"][0, 4:] = 0
    return inputs


AS = {"seen": torch.bool, "kept": torch.int64, "weight": torch.float32}


@pytest.mark.each_value
@routings
@pytest.mark.parametrize("kind", BODIES)
@torch.no_grad()
def test_a_mask_under_another_name_is_refused_or_used_as_the_caller_says(kind, routing):
    ids, mask = padded().values()
    names = dict.fromkeys(AS, "attention_mask")
    model, told = taking(kind, routing, names=names), taking(kind, routing, names=names, input_names=names)
    other = taking(kind, routing, names=names, input_names={"kept": "other"})
    model(input_ids=ids, attention_mask=mask)
    route = last_route(model)
    for name, dtype in AS.items():
        with refused(RouteError, name, "input_names"):
            model(input_ids=ids, **{name: mask.to(dtype)})
        told(input_ids=ids, **{name: mask.to(dtype)})
        assert torch.equal(last_route(told), route)
    other(input_ids=ids, kept=mask)
    assert not torch.allclose(last_route(other), route)


@pytest.mark.parametrize("kind", BODIES)
@torch.no_grad()
def test_token_routing_needs_no_mask(kind):
    ids, mask = padded().values()
    model = taking(kind, "token", names={"seen": "attention_mask"})
    model(input_ids=ids, seen=mask)


class Own(nn.Module):
    """A model of its own with arguments of any names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, pad=None, **others):
        return self.second(torch.tanh(self.first(x)))


def own(routing="sample", **options):
    torch.manual_seed(0)
    return visible(Own(), ["first", "second"], routing, **options)


X = torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(4))
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])


@torch.no_grad()
def test_a_mask_that_is_true_where_a_token_is_padding_can_be_told_of():
    model = own(input_names={"pad": "key_padding_mask"})
    model(X, MASK == 0)
    route = last_route(model)
    other = own(input_names={"pad": "attention_mask"})
    other(X, MASK)
    assert torch.equal(last_route(other), route)
    with refused(RouteError, "pad", "input_names"):
        own()(X, MASK == 0)


TOLD = {"says": "position_ids", "lasts": "cu_seq_lens_q"}
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
PACKED = {"says": POSITIONS, "lasts": torch.tensor([0, 3, 7, 8], dtype=torch.int32)}


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_documents_are_kept_apart_whatever_tells_of_them(name):
    x = torch.randn(1, 8, WIDTH, generator=torch.Generator().manual_seed(4))
    model = own()
    model(x, **{name: PACKED[name]})
    route = last_route(model)
    told = own(input_names=TOLD)
    told(x, **{name: PACKED[name]})
    assert torch.equal(last_route(told), route)
    for document in (slice(0, 3), slice(3, 7), slice(7, 8)):
        model(x[:, document])
        torch.testing.assert_close(route[:, document], last_route(model)[:, None].expand_as(route[:, document]))
    with refused(RouteError, "route", "several"):
        own("batch")(x, **{name: PACKED[name]})


@torch.no_grad()
def test_documents_of_a_long_row_are_kept_apart():
    x = torch.randn(1, 300, WIDTH, generator=torch.Generator().manual_seed(4))
    model = own()
    model(x, lasts=torch.tensor([0, 100, 300]))
    route = last_route(model)
    for document in (slice(0, 100), slice(100, 300)):
        model(x[:, document])
        torch.testing.assert_close(route[:, document], last_route(model)[:, None].expand_as(route[:, document]))


@torch.no_grad()
def test_positions_that_did_not_restart_in_the_first_call_may_do_so_later():
    x = torch.randn(1, 8, WIDTH)
    model = own("batch")
    model(x, says=torch.arange(8)[None])
    with refused(RouteError, "route", "several"):
        model(x, says=POSITIONS)


HARMLESS = {
    "kinds of tokens": {"token_type_ids": MASK},
    "kinds of its own": {"segment_ids": MASK},
    "what is to be predicted": {"targets": MASK, "labels_of_words": MASK},
    "other numbers": {"ages": MASK * 7},
    "real numbers": {"prices": MASK * 0.3, "times": torch.arange(15.0).reshape(3, 5)},
    "numbers of samples": {"sizes": torch.tensor([0, 4, 9]), "domain": torch.tensor([0, 15, 2])},
    "of another sequence": {"decoder_mask": MASK, "image_mask": MASK == 1},
    "of another length": {"seen": MASK[:, :4], "rows": MASK.T},
    "of more axes": {"box": MASK[..., None].expand(3, 5, 4), "pair": torch.ones(3, 5, 5, dtype=torch.bool).tril()},
    "features of pairs": {
        "distances": torch.arange(5)[:, None].sub(torch.arange(5)).abs().expand(3, 5, 5),
        "bias": torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(4)),
        "slopes": -(10.0 ** torch.arange(6.0)).mul(torch.arange(5.0)[:, None, None]).reshape(1, 6, 1, 5),
        "one_hot": torch.eye(5).expand(3, 5, 5),
        "not_yet_trained": torch.zeros(1, 2, 5, 5),
        "empty": torch.zeros(3, 0, 5, 5),
        "relation_types": torch.eye(5, dtype=torch.int64).expand(3, 5, 5),
    },
    "of images": {"canvas": torch.zeros(3, 1, 5, 5), "ink": torch.eye(5).expand(3, 1, 5, 5), "seen": MASK[:, None, :4]},
    "no tensors": {"seen": True, "depth": 3, "which": None, "weights": [1.0, 2.0]},
}


@routings
@pytest.mark.parametrize("name", HARMLESS)
@torch.no_grad()
def test_what_does_not_look_like_a_mask_changes_nothing(name, routing):
    model = own(routing)
    model(X)
    route = last_route(model)
    for _ in range(2):
        model(X, **HARMLESS[name])
        assert torch.equal(last_route(model), route)


SHAPES = {
    "keys": lambda mask: mask[:, None],
    "keys of heads": lambda mask: mask[:, None, None].expand(3, 2, 1, 5),
    "pairs": lambda mask: mask[:, None].expand(3, 5, 5),
    "pairs of heads": lambda mask: mask[:, None, None].expand(3, 2, 5, 5),
    "causal": lambda mask: mask[:, None, None] * torch.ones(5, 5, dtype=mask.dtype).tril(),
}
NUMBERS = {
    "true": lambda mask: mask == 1,
    "one": lambda mask: mask,
    "infinite": lambda mask: torch.zeros(mask.shape).masked_fill(mask == 0, -torch.inf),
    "least": lambda mask: torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo(torch.float32).min),
    "large": lambda mask: torch.zeros(mask.shape).masked_fill(mask == 0, -1e4),
}


@pytest.mark.each_value
@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_mask_of_more_axes_is_refused_or_used_as_the_caller_says(shape, numbers):
    # Where no token is hidden, causal masks and the scores that they add are harmless, and the next call is read again.
    mask, none_hidden = (NUMBERS[numbers](SHAPES[shape](each)) for each in (MASK, torch.ones_like(MASK)))
    model = own()
    if shape == "causal":
        model(X, seen=none_hidden)
    with refused(RouteError, "seen", "input_names"):
        model(X, seen=mask)
    told, known = own(input_names={"seen": "attention_mask"}), own()
    told(X, seen=mask)
    known(X, attention_mask=MASK)
    assert torch.equal(last_route(told), last_route(known))
    own(input_names={"seen": "other"})(X, seen=mask)
    own()(X, attention_mask=MASK, seen=mask)
    own("token")(X, seen=mask)


@torch.no_grad()
def test_a_mask_of_more_axes_for_all_samples_and_for_the_heads_of_each():
    row = torch.tensor([1, 1, 1, 0, 0]).expand(1, 5, 5)
    for mask in (row == 1, row[None] == 1, row.expand(6, 5, 5), NUMBERS["least"](row.expand(6, 5, 5))):
        with refused(RouteError, "seen"):
            own()(X, seen=mask)
    own()(X, seen=row.expand(4, 5, 5), heads=row.expand(6, 1, 5, 5))  # of as many rows as no sample has


@torch.no_grad()
def test_scores_that_hide_tokens_are_refused_with_two_axes_too():
    with refused(RouteError, "seen", "input_names"):
        own()(X, seen=NUMBERS["infinite"](MASK))


@torch.no_grad()
def test_pairs_that_all_attend_say_nothing_yet():
    model = own()
    for everything in (torch.ones(3, 5, 5, dtype=torch.bool), torch.zeros(3, 2, 5, 5), torch.zeros(3, 1, 1, 5)):
        model(X, seen=everything)
    with refused(RouteError, "seen"):
        model(X, seen=SHAPES["pairs"](MASK))


@torch.no_grad()
def test_one_token_hides_no_other():
    own()(X[:, :1], seen=torch.ones(3, 1, 1, dtype=torch.bool))


@torch.no_grad()
def test_a_causal_mask_of_as_many_tokens_as_samples_is_no_padding():
    x, causal = torch.randn(4, 4, WIDTH), torch.ones(4, 4).tril()
    for mask in (causal, causal.T, causal == 0):
        own()(x, seen=mask)
    for padded in (torch.tensor([[1, 1, 0, 1]]).expand(4, 4), causal * torch.tensor([1, 1, 0, 1])):
        with refused(RouteError, "seen"):
            own()(x, seen=padded)


def test_an_argument_is_read_once(monkeypatch):
    model, read = own(), []
    monkeypatch.setattr("tucka.backends.torch.routing.forms._form_of", lambda *call: read.append(call[0]) or "other")
    for _ in range(3):
        model(X, seen=MASK, ages=MASK * 7)
    assert read == ["seen", "ages"]


def test_a_compiled_call_and_a_transformed_one_read_nothing():
    model = own()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X, ages=MASK * 7), model(X, ages=MASK * 7))
        torch.func.vmap(lambda ages: model(X, ages=ages))(torch.stack([MASK * 7] * 2))


def test_what_is_said_of_arguments_is_checked_and_saved(tmp_path):
    config = TuckAConfig(target_modules=["first"], input_names={"pad": "key_padding_mask"})
    config.save_pretrained(str(tmp_path))
    assert TuckAConfig.from_pretrained(str(tmp_path)).input_names == {"pad": "key_padding_mask"}
    assert TuckAConfig(input_names=None).input_names == {}
    with refused(ValueError, "input_names['pad']", "attention_mask"):
        TuckAConfig(input_names={"pad": "mask"})
    for wrong in ("pad", {1: "other"}):
        with refused(ValueError, "input_names", "dict"):
            TuckAConfig(input_names=wrong)
