"""Arguments with unknown names: one that looks like a mask is refused, positions and lengths are taken as such."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor

from tucka.backends.torch.private import is_exporting, is_transformed
from tucka.backends.torch.routing.inputs import OTHER, ROLES, Inputs, tensors_in
from tucka.errors import RouteError, expected

__all__ = ["KNOWN_NAMES", "Forms"]

# Arguments of transformers' models that tell of no padding, and of no documents but with others that do.
KNOWN_NAMES = frozenset(
    [
        "input_ids",
        "inputs_embeds",
        "hidden_states",
        "pixel_values",
        "x",
        "labels",
        "token_type_ids",
        "cache_position",
        "cu_seq_lens_k",
        "seq_idx",
        "perm_mask",
        "bool_masked_pos",
        "encoder_outputs",
        "encoder_hidden_states",
        "encoder_attention_mask",
        "decoder_input_ids",
        "decoder_attention_mask",
        "past_key_values",
        "cache",
        "cache_params",
        "use_cache",
        "return_dict",
        "logits_to_keep",
        "output_attentions",
        "output_hidden_states",
    ]
).union(ROLES)
# A name with one of these is of another sequence.
_OF_OTHERS = ("decoder", "encoder", "entity", "image", "pixel", "visual", "vision", "video", "audio", "patch")
# One with these says what it is: numbers or kinds of tokens, what is to be predicted, which tokens a loss is of.
_NO_MASKS = ("ids", "type", "lang", "label", "target", "loss", "global", "special", "head")
# What is added to the scores of hidden tokens: models take the least number of a dtype, minus infinity, -1e9 or -1e4.
_HIDES = -1e4


class Forms:
    """What the arguments of one model with unknown names have turned out to be. Each is read until that is clear."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], str] = {}

    def apply(self, inputs: Inputs, unknown: Iterable[str], where: str) -> None:
        """Take positions and lengths as such, in a call that no mask or no packing is known of; refuse a mask."""
        if inputs.rows is None or inputs.tokens is None or inputs.are_images:
            return
        for name, value in _unnamed(inputs, unknown):
            form = self.known.get((where, name))
            if form is None:
                if not _is_readable(value) or not _may_be_one(value, inputs):
                    continue
                form = _form_of(name, value, inputs.rows * inputs.tokens)
                if form is None:
                    continue
                self.known[where, name] = form
            if form == "positions" and not inputs.is_packed():
                inputs.positions = value
            elif form == "lengths" and not inputs.is_packed():
                inputs.lengths = value
            elif form == "mask" and inputs.mask is None:
                roles = ", ".join(repr(role) for role in ROLES[1:])
                cure = f"Say it in the configuration, input_names={{{name!r}: 'attention_mask'}}, or one of {roles}"
                rule, got = "to be told what this argument is", f"what looks like a mask, {tuple(value.shape)}"
                raise RouteError(expected(name, rule, got, where=where, cure=cure))


def _unnamed(inputs: Inputs, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors among arguments whose names do not tell what they are."""
    for name in names:
        value = inputs.others[name]
        if value is None or any(word in name for word in _OF_OTHERS):
            continue
        for _, tensor in tensors_in({name: value}):
            if tensor is not inputs.main:
                yield name, tensor


def _is_readable(value: Tensor) -> bool:
    """Tell whether a tensor's numbers can be read here."""
    return not (torch.compiler.is_compiling() or is_exporting() or value.is_meta or is_transformed(value))


def _may_be_one(value: Tensor, inputs: Inputs) -> bool:
    """Tell by its shape and dtype whether an argument may tell of padding or of documents."""
    if value.ndim == 1:
        return value.numel() > 1 and value.dtype in (torch.int32, torch.int64)
    rows, tokens = cast(int, inputs.rows), inputs.tokens
    if value.ndim == 2:
        return value.shape[0] in (1, rows) and value.shape[1] == tokens
    if value.ndim not in (3, 4) or value.numel() == 0 or tokens == 1 or inputs.mask is not None:
        return False
    # torch's own attention takes the heads of a sample as rows.
    is_of_rows = value.shape[0] in (1, rows) or (value.ndim == 3 and rows > 0 and value.shape[0] % rows == 0)
    return is_of_rows and value.shape[-2] in (1, tokens) and value.shape[-1] == tokens


def _form_of(name: str, value: Tensor, tokens: int) -> str | None:
    """Say what an argument looks like: a mask, positions (B, S) or cumulated lengths; None if this call cannot tell."""
    # It cannot where all tokens attend to all, or each to those before it.
    if value.ndim == 1:
        is_cumulated = int(value[0]) == 0 and int(value[-1]) == tokens and bool((value.diff() > 0).all())
        return "lengths" if is_cumulated else OTHER
    by_query, is_float = value.ndim > 2 and value.shape[-2] > 1, value.is_floating_point()
    if value.ndim > 2 and (by_query or is_float) and bool((value == value.flatten()[:1]).all()):
        return None
    if is_float and bool(((value == 0) | (value <= _HIDES)).all()) and bool((value != 0).any()):
        value, is_float = value == 0, False
    if bool(((value == 0) | (value == 1)).all()) and not (by_query and is_float):
        if any(word in name for word in _NO_MASKS):
            return OTHER
        return None if _is_causal(value) else "mask"
    if is_float or value.ndim > 2:
        return OTHER
    counted = (value[:, 1:] == value[:, :-1] + 1) | (value[:, 1:] == 0)
    return "positions" if bool((value[:, 0] == 0).all() & counted.all()) else OTHER


def _is_causal(value: Tensor) -> bool:
    """Tell whether zeros and ones (..., S, S) tell each token from those after it, or before it, and no more."""
    queries, keys = value.shape[-2:]
    causal = torch.ones(queries, keys, dtype=torch.bool, device=value.device).tril()
    forms = (causal, ~causal, causal.T, ~causal.T) if queries == keys > 1 else ()
    return any(bool(((value != 0) == form).all()) for form in forms)
