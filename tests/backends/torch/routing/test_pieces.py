"""Layers that a model calls on pieces of its tokens, one after the other: as on the whole, or refused."""

import pytest
import torch
from transformers import BertModel, CanineConfig, CanineModel

from support.routed import EXACT, inputs_of, routed
from support.tiny_models import bert_config, tokens
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import RouteError
from tucka.peft import last_route

routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])


def bert(piece, targets, routing):
    torch.manual_seed(0)
    return routed(BertModel(bert_config(chunk_size_feed_forward=piece)), targets, routing)


def result_of(model, **inputs):
    """The hidden states; None where the call is refused."""
    try:
        with torch.no_grad():
            return model(**inputs)[0]
    except RouteError:
        return None


@pytest.mark.each_value
@routings
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("piece", [1, 2, 3, 6])  # of 6 tokens in 3 samples
@pytest.mark.parametrize(
    "targets",
    [["query", "intermediate.dense"], ["intermediate.dense"], ["intermediate.dense", "output.dense"]],
    ids=str,
)
def test_a_feed_forward_layer_that_gets_pieces(targets, piece, masked, routing):
    inputs = {"input_ids": tokens(3, 6)}
    if masked:
        inputs["attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    found = result_of(bert(piece, targets, routing), **inputs)
    if found is not None:
        whole = result_of(bert(0, targets, routing), **inputs)
        torch.testing.assert_close(found, whole, **EXACT)
    else:
        assert piece < 6  # one piece is the whole


def canine(routing):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    local = {"local_transformer_stride": 4, "downsampling_rate": 4, "num_hash_buckets": 64}
    config = CanineConfig(**sizes, **local, initializer_range=0.25, hidden_dropout_prob=0.0)
    config.attention_probs_dropout_prob = 0.0
    return routed(CanineModel(config), ["query", "value"], routing)


@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_a_route_is_made_of_the_whole_text_and_not_of_its_first_piece(routing):
    """CANINE's first layers attend to a few characters at a time: here to 4 of 16."""
    inputs = inputs_of("canine", 2, 7)
    other = {"input_ids": torch.cat([inputs["input_ids"][:, :4], inputs["input_ids"][:, 4:].flip(1)], dim=1)}
    routes = []
    for each in (inputs, other):
        model = canine(routing)
        if result_of(model, **each) is not None:
            routes.append(last_route(model))
    assert not routes or not torch.equal(*routes)


def gates_by_call(model):
    """The gates of each call of the first layer that gets pieces."""
    seen = []
    layer = next(module for name, module in model.named_modules() if "initial_char" in name and name.endswith("query"))
    layer.register_forward_hook(
        lambda module, args, out: seen.append(scope_of(model).fit("default", module, args[0]).gates)
    )
    return seen


@pytest.mark.parametrize("length", [16, 24])
def test_each_character_has_its_own_route(length):
    """What one piece's characters are has no influence on the gates of another piece's."""
    model = canine("token")
    seen = gates_by_call(model)
    ids = inputs_of("canine", 1, length - 9)["input_ids"]
    if result_of(model, input_ids=ids) is None:
        return
    first = [gates.clone() for gates in seen]
    seen.clear()
    result_of(model, input_ids=torch.cat([ids[:, :4].flip(1), ids[:, 4:]], dim=1))
    assert not torch.equal(seen[0], first[0])
    assert torch.equal(seen[2], first[2])  # the third piece of the first layer
