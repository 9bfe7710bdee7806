"""Several documents in one row: a route for each of them, or a refusal; tokens route themselves."""

import itertools

import pytest
import torch

from support.refusals import refused
from support.routed import EXACT, causal, logits
from support.tiny_models import tokens
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import RouteError
from tucka.peft import expert_load, given_route, initialize_router, last_route, pin_route

LENGTHS = (7, 5, 1, 4)
DOCUMENTS = [tokens(1, length, seed=seed) for seed, length in enumerate(LENGTHS)]
ROW = torch.cat(DOCUMENTS, dim=1)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0)
finer = pytest.mark.parametrize("routing", ["sample", "token"])


def blocks():
    """Which query attends to which key: earlier ones of its own document."""
    number = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    return ((number[:, None] == number) & torch.ones(len(number), len(number), dtype=torch.bool).tril())[None, None]


# The ways to say it to a model, of which the base itself keeps the documents apart.
WAYS = {
    "positions": {"position_ids": POSITIONS},
    "lengths": {
        "position_ids": POSITIONS,
        **{"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "max_length_q": 7, "max_length_k": 7},
    },
    "blocks and positions": {"attention_mask": blocks(), "position_ids": POSITIONS},
}
ways = pytest.mark.parametrize("way", WAYS)


def packed(model, row=ROW, **options):
    return logits(model, {"input_ids": row, "use_cache": False, **options})


def apart(model):
    return torch.cat([packed(model, document) for document in DOCUMENTS], dim=1)


@ways
@finer
def test_each_document_is_as_it_is_alone(way, routing):
    model = causal(routing)
    torch.testing.assert_close(packed(model, **WAYS[way]), apart(model), **EXACT)
    with model.disable_adapter():
        plain = packed(model, **WAYS[way])
        torch.testing.assert_close(plain, apart(model), **EXACT)
    assert not torch.allclose(plain, apart(model), atol=1e-2)


@finer
def test_several_packed_rows(routing):
    """Rows of equal length with other documents inside."""
    model = causal(routing)
    rows = torch.cat([ROW, ROW.flip(1)])
    positions = torch.cat([POSITIONS, torch.arange(17)[None]])
    output = packed(model, rows, position_ids=positions)
    torch.testing.assert_close(output[:1], apart(model), **EXACT)
    torch.testing.assert_close(output[1:], packed(model, rows[1:]), **EXACT)


@ways
def test_batch_routing_refuses_several_documents(way):
    model = causal("batch")
    with refused(RouteError, "route", "one document | q_proj | routing='sample' | routing='token'"):
        packed(model, **WAYS[way])
    packed(model, position_ids=torch.arange(17)[None])  # of one


@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_blocks_alone_do_not_tell_where_a_document_begins_and_are_refused(routing):
    model = causal(routing)
    with refused(RouteError, "attention_mask", "one document | blocks | position_ids | routing='token'"):
        packed(model, attention_mask=blocks())


def test_blocks_alone_suffice_for_token_routing():
    """Up to the base's rotary positions, which count through the row."""
    model = causal("token")
    shifted = [packed(model, document, position_ids=ENDS[n] + torch.arange(document.shape[1])[None]) for n, document in
               enumerate(DOCUMENTS)]  # fmt: skip
    torch.testing.assert_close(packed(model, attention_mask=blocks()), torch.cat(shifted, dim=1), **EXACT)


@finer
def test_a_document_does_not_change_with_the_others(routing):
    model = causal(routing)
    other = torch.cat([DOCUMENTS[0], tokens(1, 10, seed=9)], dim=1)
    outputs = [packed(model, row, position_ids=POSITIONS)[:, :7] for row in (ROW, other)]
    torch.testing.assert_close(*outputs, **EXACT)


def test_the_routes_and_the_load_of_documents():
    model = causal("sample")
    packed(model, position_ids=POSITIONS)
    route = last_route(model)
    assert route.shape == (1, 17, 4, 2)
    for start, end in itertools.pairwise(ENDS):
        assert (route[:, start:end] == route[:, start : start + 1]).all()
    assert not torch.allclose(route[:, 0], route[:, 7])
    load = expert_load(model)
    single = causal("sample")
    apart(single)
    # Each token counts, so that a document counts by its length.
    lengths = torch.zeros(4, dtype=torch.long)
    for start, length in zip(ENDS[:-1], LENGTHS, strict=True):
        lengths += length * (route[0, start] != 0).any(dim=-1)
    assert load.tolist() == lengths.tolist()
    assert int(expert_load(single).sum()) == len(LENGTHS)


@finer
def test_a_router_starts_from_documents(routing):
    started = []
    for together in (True, False):
        model = causal(routing)
        batches = [{"input_ids": ROW, "position_ids": POSITIONS, "use_cache": False}]
        initialize_router(model, batches if together else [{"input_ids": each} for each in DOCUMENTS], progress=False)
        started.append(scope_of(model).router("default").centroids)
    torch.testing.assert_close(*started, rtol=0, atol=1e-5)


def test_a_pinned_route_is_the_mean_over_documents():
    pinned = []
    for together in (True, False):
        model = causal("sample")
        batches = [{"input_ids": ROW, "position_ids": POSITIONS, "use_cache": False}]
        pin_route(model, batches=batches if together else [{"input_ids": each} for each in DOCUMENTS])
        pinned.append(last_route(model))
    torch.testing.assert_close(*pinned, rtol=0, atol=1e-6)


@finer
def test_gradients_of_packed_documents(routing):
    found = []
    for together in (True, False):
        model = causal(routing)  # in evaluation, where no router starts
        if together:
            model(input_ids=ROW, position_ids=POSITIONS, use_cache=False).logits.square().sum().backward()
        else:
            for document in DOCUMENTS:
                model(input_ids=document, use_cache=False).logits.square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(found[0]) > 3
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_padding_that_begins_with_other_positions_is_no_document(routing):
    """As transformers makes positions of a mask: ones, or zeros, before the first token."""
    model, ids = causal(routing), tokens(2, 6)
    alone = logits(model, {"input_ids": ids})
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]]).expand(2, 9)
    padded = torch.nn.functional.pad(ids, (3, 0))
    for filler in (0, 1):
        positions = torch.nn.functional.pad(torch.arange(6).expand(2, 6), (3, 0), value=filler)
        output = logits(model, {"input_ids": padded, "attention_mask": mask, "position_ids": positions})
        torch.testing.assert_close(output[:, 3:], alone, **EXACT)


def test_a_route_that_is_given_serves_the_whole_row():
    model = causal("given")
    with given_route(model, groups=[2]):
        together = packed(model, position_ids=POSITIONS)
        torch.testing.assert_close(together, apart(model), **EXACT)
