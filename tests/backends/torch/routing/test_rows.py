"""Which rows of a layer's input belong to which sample: known from the model's own inputs and classes, or refused."""

import pytest
import torch
from torch import nn

from support.refusals import refused
from support.routed import (
    EXACT,
    FAMILIES,
    assert_rows_stand_alone,
    family,
    greedy,
    inputs_of,
    logits,
    route_of,
    routed,
)
from support.tiny_models import WIDTH, make, opt, tokens
from tucka.errors import ConfigError, RouteError
from tucka.peft import last_route, pin_route

finer = pytest.mark.parametrize("routing", ["sample", "token"])
# As many samples as tokens too, where an axis cannot be known by its length.
sizes = pytest.mark.parametrize(("batch", "length"), [(3, 7), (6, 6), (4, 2)])


@pytest.mark.each_value
@finer
@sizes
@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("xlnet", ["layer_1", "layer_2"]),
        ("xlnet", "all-linear"),
        ("longformer", ["query", "value"]),
        ("longformer", ["query", "value", "query_global", "key_global", "dense"]),
    ],
)
def test_models_that_turn_to_tokens_first_inside(name, targets, routing, batch, length):
    model = family(name, routing, targets)
    assert_rows_stand_alone(model, inputs_of(name, batch, length))
    assert last_route(model).shape[0] == 1  # of the last call, with one sample
    inputs = inputs_of(name, batch, length, padding=True)
    assert_rows_stand_alone(model, inputs)


@finer
def test_longformers_global_tokens(routing):
    model = family("longformer", routing, ["query", "query_global", "value_global"])
    inputs = inputs_of("longformer")
    inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"]).index_fill_(1, torch.tensor([0, 3]), 1)
    assert_rows_stand_alone(model, inputs)


class Encoder(nn.Module):
    """Torch's own encoder, perhaps after a layer of this model."""

    def __init__(self, *, batch_first=False, before=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=batch_first)
        self.before = nn.Linear(WIDTH, WIDTH) if before else nn.Identity()
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, src_key_padding_mask=None):
        return self.encoder(self.before(x), src_key_padding_mask=src_key_padding_mask)


def sequences(length, batch, *, batch_first):
    x = torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x if batch_first else x.transpose(0, 1)


@finer
@sizes
@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_torchs_encoder_with_samples_or_tokens_first(routing, batch, length, batch_first):
    torch.manual_seed(0)
    model = routed(Encoder(batch_first=batch_first), ["linear1", "linear2"], routing)
    x = sequences(length, batch, batch_first=batch_first)
    y = model(x)
    for row in range(batch):
        one = [x[row : row + 1], y[row : row + 1]] if batch_first else [x[:, row : row + 1], y[:, row : row + 1]]
        torch.testing.assert_close(model(one[0]), one[1], **EXACT)


@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_the_padding_mask_of_torchs_encoder_is_true_where_there_is_padding(batch_first):
    torch.manual_seed(0)
    model = routed(Encoder(batch_first=batch_first), ["linear1", "linear2"])
    x = sequences(5, 2, batch_first=batch_first)
    longer = torch.cat([x, x[:, :2] if batch_first else x[:2]], dim=1 if batch_first else 0)
    padding = torch.tensor([[False] * 5 + [True] * 2]).expand(2, 7)
    y = model(longer, src_key_padding_mask=padding)
    torch.testing.assert_close(y[:, :5] if batch_first else y[:5], model(x), **EXACT)


@finer
def test_a_model_of_ones_own_must_say_what_comes_first_where_that_is_in_doubt(routing):
    with refused(ConfigError, "target_modules", "before | samples_first"):
        routed(Encoder(before=True), ["before", "linear1"], routing)
    torch.manual_seed(0)
    model = routed(Encoder(before=True), ["before", "linear1"], routing, samples_first=False)
    for batch, length in ((3, 5), (4, 4)):
        x = sequences(length, batch, batch_first=False)
        with torch.no_grad():
            y = model(x)
            for row in range(batch):
                torch.testing.assert_close(model(x[:, row : row + 1]), y[:, row : row + 1], **EXACT)


@pytest.mark.each_value
@pytest.mark.parametrize("targets", [["fc1"], ["fc1", "fc2"], ["q_proj", "fc1"]])
@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_opts_layers_of_flattened_tokens(targets, routing):
    torch.manual_seed(0)
    model, ids = routed(opt(), targets, routing), tokens(3, 6)
    shape = {"batch": (4, 2), "sample": (3, 4, 2), "token": (3, 6, 4, 2)}[routing]
    assert route_of(model, {"input_ids": ids}).shape == shape
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], dim=1)
    alone, beside = (logits(model, {"input_ids": x, "attention_mask": (x != 0).long()}) for x in (ids, padded))
    torch.testing.assert_close(beside[:, -6:], alone, **EXACT)
    if routing != "batch":
        assert_rows_stand_alone(model, {"input_ids": ids})
    assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))
    assert torch.equal(greedy(model, ids, num_beams=2), greedy(model, ids, num_beams=2, use_cache=False))


@pytest.mark.parametrize("routing", ["batch", "sample"])
@torch.no_grad()
def test_a_convolutions_input_without_a_batch_axis_is_refused(routing):
    torch.manual_seed(0)
    model = routed(nn.Sequential(nn.Conv2d(4, 3, 1)), ["0"], routing, r=2)
    x = torch.randn(4, 5, 5, dtype=torch.float64)
    with refused(RouteError, "route", "(B, d, ...) | (4, 5, 5) | x[None]"):
        model(x)
    pin_route(model, group=1)  # then no row needs a sample
    torch.testing.assert_close(model(x)[None], model(x[None]), **EXACT)


class Mixture(nn.Module):
    """A mixture of experts that are modules, each of which gets the tokens that are sent to it."""

    def __init__(self):
        super().__init__()
        self.inp, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        flat = torch.tanh(self.inp(x)).reshape(-1, WIDTH)
        chosen, y = self.gate(flat).argmax(dim=-1), torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            y = y.index_add(0, rows, expert(flat[rows]))
        return y.reshape(x.shape)


@finer
def test_experts_that_see_dispatched_tokens_are_refused_before_any_size_is_known(routing):
    with refused(ConfigError, "target_modules", "experts.0 | exclude_modules | routing='batch'"):
        routed(Mixture(), ["inp", "0", "1", "2"], routing)
    model = routed(Mixture(), ["inp", "gate"], routing)
    x = torch.randn(4, 6, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([model(row[None]) for row in x]), model(x), **EXACT)


def test_dispatched_tokens_may_be_adapted_by_batch_routing():
    model = routed(Mixture(), ["inp", "0", "1", "2"], "batch")
    for batch, length in ((2, 6), (1, 1), (3, 4)):
        assert model(torch.randn(batch, length, WIDTH, dtype=torch.float64)).shape == (batch, length, WIDTH)


@pytest.mark.each_value
@finer
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "experts"], ["experts"]], ids=str)
def test_a_mixture_of_transformers_is_adapted_beside_its_experts_and_at_their_common_input(routing, targets):
    base = FAMILIES["mixtral"].build()
    base.set_experts_implementation("eager")  # the other ones have no float64
    model = routed(base, targets, routing)
    assert_rows_stand_alone(model, inputs_of("mixtral"))
    ids = inputs_of("mixtral")["input_ids"]
    assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "vit", "t5"])
@finer
def test_as_many_samples_as_tokens(kind, routing):
    """Nothing is taken for something else because its length is the same: ViT has 5 tokens, others have 5 each."""
    model = routed(make(kind), "all-linear", routing)
    if kind == "vit":
        inputs = {"pixel_values": torch.randn(5, 3, 8, 8, dtype=torch.float64)}
    else:
        inputs = {"input_ids": tokens(5, 5), **({"decoder_input_ids": tokens(5, 5, seed=2)} if kind == "t5" else {})}
    assert_rows_stand_alone(model, inputs, rows=5)
