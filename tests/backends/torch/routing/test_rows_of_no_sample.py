"""Inputs that depend on no sample, such as tables of positions: one fixed route, whatever else is in the batch."""

import pytest
import torch

from support.routed import (
    EXACT,
    assert_rows_stand_alone,
    family,
    inputs_of,
    logits,
    row_of,
)
from support.upstream import checkpoint_layers
from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import adapted_modules, expert_load, last_route

# Projections that get tokens and, in a second call, the table of relative positions; and all.
TARGETS = [["query_proj", "value_proj", "dense"], ["key_proj", "query_proj"], "all-linear"]
# The table has twice the span of rows: 16.
LENGTHS = [4, 7, 16]
routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])


def gates_in(model, layer):
    """The gates of each call of a layer."""
    seen = []
    layer.register_forward_hook(
        lambda module, args, out: seen.append(scope_of(model).fit("default", module, args[0]).gates)
    )
    return seen


@pytest.mark.each_value
@pytest.mark.parametrize("targets", TARGETS, ids=str)
@pytest.mark.parametrize("routing", ["sample", "token"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_a_sample_of_deberta_does_not_depend_on_its_batch(targets, routing, length, batch):
    model = family("deberta-v3", routing, targets)
    assert_rows_stand_alone(model, inputs_of("deberta-v3", batch, length), rows=batch)


@pytest.mark.each_value
@routings
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_the_table_has_the_even_mixture_at_every_size(routing, length, batch):
    model = family("deberta-v3", routing, ["query_proj", "key_proj"])
    layer = next(module for name, module in model.named_modules() if name.endswith("query_proj"))
    seen = gates_in(model, layer)
    logits(model, inputs_of("deberta-v3", batch, length))
    of_tokens, of_positions = seen
    assert torch.equal(of_positions, torch.full((4, 2), 1 / 8))
    assert torch.equal(of_tokens, last_route(model))
    shape = {"batch": (4, 2), "sample": (batch, 4, 2), "token": (batch, length, 4, 2)}[routing]
    assert of_tokens.shape == shape
    decisions = {"batch": 1, "sample": batch, "token": batch * length}[routing]
    assert int(expert_load(model).sum()) == decisions  # the table makes none


def test_batch_routing_at_batch_size_one_is_that_of_the_sample():
    batch, sample = (family("deberta-v3", routing, "all-linear") for routing in ("batch", "sample"))
    for row in range(3):
        one = row_of(inputs_of("deberta-v3"), row)
        torch.testing.assert_close(logits(batch, one), logits(sample, one), **EXACT)


@routings
def test_tables_with_projections_of_their_own(routing):
    """DeBERTa's first version; no router is owned by a layer that sees positions only."""
    model = family("deberta", routing, ["pos_proj", "pos_q_proj", "in_proj"])
    owners = [row.name for row in adapted_modules(model) if row.owns_router]
    assert len(owners) == 1
    assert owners[0].endswith("in_proj")
    seen = [gates_in(model, module) for name, module in model.named_modules() if name.endswith("pos_proj")]
    inputs = inputs_of("deberta", 3, 7)
    logits(model, inputs)
    assert all(torch.equal(gates, torch.full((4, 2), 1 / 8)) for calls in seen for gates in calls)
    assert all(seen)
    if routing != "batch":
        assert_rows_stand_alone(model, inputs)


@routings
def test_checkpointing_tells_tokens_from_positions_in_the_recomputation_too(routing):
    found = []
    for checkpointed in (False, True):
        model = family("deberta-v3", routing, ["query_proj", "key_proj", "value_proj"]).train()
        scope_of(model).router("default").is_initialized.fill_(True)
        scope_of(model).router("default")._has_started = True
        if checkpointed:
            checkpoint_layers(model)
        model.enable_input_require_grads()
        model(**inputs_of("deberta-v3")).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*found, **EXACT)
