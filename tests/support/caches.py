"""Key-value caches, and what people do to them."""

import copy

import torch
from transformers import DynamicCache

from support.routed import logits
from support.tiny_models import tokens

PROMPT, STEP = tokens(3, 7, seed=5), torch.tensor([[9], [11], [13]])
ORDER = torch.tensor([2, 0, 1])


def step(model, cache, ids=STEP):
    return logits(model, {"input_ids": ids, "past_key_values": cache})


def filled(model, ids=PROMPT, cache=None):
    cache = DynamicCache(config=model.config) if cache is None else cache
    step(model, cache, ids)
    return cache


def by_hand(cache, model):
    """The same keys and values in a cache that nothing but them went into."""
    other = DynamicCache(config=model.config)
    for number, layer in enumerate(cache.layers):
        other.update(layer.keys, layer.values, number)
    return other


# Each changes a cache, and the rows of the step that follows.
OPERATIONS = {
    "copied": (copy.deepcopy, lambda rows: rows),
    "copied twice": (lambda cache: copy.deepcopy(copy.deepcopy(cache)), lambda rows: rows),
    "reordered": (lambda cache: cache.reorder_cache(ORDER), lambda rows: rows[ORDER]),
    "selected": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), lambda rows: rows[[2, 0]]),
    "repeated": (lambda cache: cache.batch_repeat_interleave(2), lambda rows: rows.repeat_interleave(2, dim=0)),
    "copied, then reordered": (
        lambda cache: [cache := copy.deepcopy(cache), cache.reorder_cache(ORDER)][0],
        lambda rows: rows[ORDER],
    ),
    "reordered, then copied": (
        lambda cache: [cache.reorder_cache(ORDER), copy.deepcopy(cache)][1],
        lambda rows: rows[ORDER],
    ),
    "selected, then repeated": (
        lambda cache: [cache.batch_select_indices(torch.tensor([1])), cache.batch_repeat_interleave(3)][0],
        lambda rows: rows[[1, 1, 1]],
    ),
}
