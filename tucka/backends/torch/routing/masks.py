"""Masks as models take them, converted to one that tells which tokens of a layer's input count."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tucka.backends.torch.private import assert_later, audio_mask, pooled_mask
from tucka.backends.torch.routing.inputs import Inputs
from tucka.errors import RouteError, expected

__all__ = ["fitting_mask"]

_FULL = "full_attention"


def fitting_mask(inputs: Inputs, model: nn.Module, x: Tensor, *, past: bool) -> Tensor | None:
    """Convert the mask of a call to one for the tokens of `x` (B, T, ..., d), shape (B, T, ...); None if all count."""
    mask = inputs.mask
    if isinstance(mask, Mapping):  # one for each kind of layer
        mask = mask.get(_FULL)
    convert = _BY_CLASS.get(type(model).__name__, _by_sound if inputs.tokens is None else None)
    if mask is None or x.ndim < 3 or convert is _all:
        return None
    if not isinstance(mask, Tensor):
        raise _unusable(model, type(mask).__name__)
    rows, tokens = x.shape[0], x.shape[1]
    if mask.ndim == 3 and x.ndim == 4 and mask.shape[0] == rows:  # of pixels: as the models themselves shrink it
        return nn.functional.interpolate(mask[None].float(), size=x.shape[1:3])[0] != 0
    if mask.ndim > 2:
        if not past and not inputs.is_packed():
            _check_one_document(mask, model)
        mask = _attended_keys(mask)
        if not past and mask.shape[1] > tokens:  # a cache of fixed size, of which the tokens fill the beginning
            mask = mask[:, :tokens]
    if mask.ndim != 2 or mask.shape[0] not in (1, rows):
        raise _unusable(model, f"shape {tuple(mask.shape)} for inputs {tuple(x.shape)}")
    mask = mask.expand(rows, -1).to(x.device)
    if past and mask.shape[1] > tokens:
        mask = mask[:, mask.shape[1] - tokens :]
    if mask.shape[1] == tokens:
        return mask
    converted = None if convert is None else convert(mask, tokens, model, inputs)
    if converted is None or tuple(converted.shape) != (rows, tokens):
        raise _unusable(model, f"shape {tuple(mask.shape)} for inputs {tuple(x.shape)}")
    return converted


def _attended(mask: Tensor) -> Tensor:
    """Say which keys each query attends to, from a mask (B, ..., queries, keys)."""
    attended = mask != 0
    if mask.is_floating_point():  # ones and zeros, or zeros and large negative numbers
        attended = torch.where((mask > 0).any(), mask > 0, mask == 0)
    # Padding that comes first attends to nothing, for which transformers lets it attend to everything. The last query
    # of a causal mask attends to everything as well, and where all queries do there is no padding.
    everything = attended.all(dim=-1, keepdim=True)
    last = torch.arange(mask.shape[-2], device=mask.device)[:, None] == mask.shape[-2] - 1
    return attended & (~everything | last | everything.all(dim=-2, keepdim=True))


def _attended_keys(mask: Tensor) -> Tensor:
    """Say which tokens any other attends to, from a mask (B, ..., queries, keys): the tokens that are no padding."""
    return _attended(mask).flatten(1, -2).any(dim=1)


def _check_one_document(mask: Tensor, model: nn.Module) -> None:
    """Raise where the first token that others attend to differs within a row: blocks of documents, or a window."""
    attended = _attended(mask)
    queries = attended.flatten(1, -3).any(dim=1) if mask.ndim > 3 else attended
    if queries.shape[1] != queries.shape[2]:
        return
    first = queries.int().argmax(dim=2)
    # Padding attends to anything, or to nothing.
    counts = queries.any(dim=1) & queries.any(dim=2)
    least = first.masked_fill(~counts, mask.shape[-1]).amin(dim=1)
    most = first.masked_fill(~counts, -1).amax(dim=1)
    message = expected(
        "attention_mask",
        "one document in each row",
        "blocks or a window",
        where=type(model).__name__,
        cure="Pass position_ids that restart with each document too, or use routing='token'",
    )
    if torch.compiler.is_compiling():
        assert_later((least >= most).all(), message)
    elif bool((least < most).any()):
        raise RouteError(message)


def _unusable(model: nn.Module, got: str) -> RouteError:
    rule = "a mask that tells padding from tokens: (B, S), (B, queries, keys) or (B, heads, queries, keys)"
    cure = "Route by token (routing='token'), give the route (given_route), or pass another mask"
    return RouteError(expected("attention_mask", rule, got, where=type(model).__name__, cure=cure))


# Conversions of a mask (B, S) for models whose layers see T tokens that the inputs do not have one by one.
_Convert = Callable[[Tensor, int, nn.Module, Inputs], Tensor | None]


def _by_sound(mask: Tensor, tokens: int, model: nn.Module, _inputs: Inputs) -> Tensor | None:
    return audio_mask(model, mask, tokens)


def _followed_by_real_ones(mask: Tensor, tokens: int, _model: nn.Module, _inputs: Inputs) -> Tensor | None:
    """Of text that is followed by the patches of an image."""
    return nn.functional.pad(mask, (0, tokens - mask.shape[1]), value=1) if tokens > mask.shape[1] else None


def _preceded_by_real_ones(mask: Tensor, tokens: int, _model: nn.Module, _inputs: Inputs) -> Tensor | None:
    """Of text that follows the patches of an image."""
    return nn.functional.pad(mask, (tokens - mask.shape[1], 0), value=1) if tokens > mask.shape[1] else None


def _after_a_text(mask: Tensor, tokens: int, _model: nn.Module, _inputs: Inputs) -> Tensor | None:
    """Of a text and the patches of an image that follows it."""
    return mask[:, mask.shape[1] - tokens :] if tokens < mask.shape[1] else None


def _followed_by_patches(mask: Tensor, tokens: int, model: nn.Module, inputs: Inputs) -> Tensor | None:
    """Of text that is followed by an image's own token and its patches, those of the largest image of the batch."""
    pixels, config = inputs.others.get("pixel_mask"), cast(Any, model).config
    if not isinstance(pixels, Tensor):
        return _followed_by_real_ones(mask, tokens, model, inputs)
    grid = tuple(side // config.patch_size for side in pixels.shape[-2:])
    patches = nn.functional.interpolate(pixels[:, None].float(), size=grid).flatten(1).sum(dim=1, keepdim=True)
    places = torch.arange(tokens - mask.shape[1], device=mask.device)
    return torch.cat([mask, (places <= patches.to(mask.device)).to(mask)], dim=1)


def _with_visual_tokens(mask: Tensor, tokens: int, _model: nn.Module, inputs: Inputs) -> Tensor | None:
    """Of text that is followed by visual tokens with a mask of their own."""
    visual: Any = inputs.others.get("visual_attention_mask")
    if not isinstance(visual, Tensor):
        return _followed_by_real_ones(mask, tokens, _model, inputs)
    return torch.cat([mask, visual.to(mask)], dim=1)


def _padded_to_a_block(mask: Tensor, tokens: int, _model: nn.Module, _inputs: Inputs) -> Tensor | None:
    """Of models that pad their inputs themselves."""
    return nn.functional.pad(mask, (0, tokens - mask.shape[1])) if tokens > mask.shape[1] else None


def _pooled(mask: Tensor, tokens: int, model: nn.Module, _inputs: Inputs) -> Tensor | None:
    return pooled_mask(model, mask, tokens)


def _strided(mask: Tensor, tokens: int, _model: nn.Module, _inputs: Inputs) -> Tensor | None:
    """Of Moonshine's sound, whose convolutions have a common stride."""
    return mask[:, :: 64 * 3 * 2][:, :tokens]


def _with_entities(mask: Tensor, _tokens: int, _model: nn.Module, inputs: Inputs) -> Tensor | None:
    """Of words that are followed by entities with a mask of their own."""
    entities: Any = inputs.others.get("entity_attention_mask")
    return torch.cat([mask, entities.to(mask)], dim=1) if isinstance(entities, Tensor) else None


def _all(_mask: Tensor, _tokens: int, _model: nn.Module, _inputs: Inputs) -> Tensor | None:
    """Of tokens that all count, whatever the mask says: latents that attend to the inputs, or padded sound."""


_BY_CLASS: dict[str, _Convert] = {
    "LayoutLMv3Model": _followed_by_real_ones,
    "UdopStack": _followed_by_real_ones,
    "GitModel": _preceded_by_real_ones,
    "ViltModel": _followed_by_patches,
    "NaFlexVit": _preceded_by_real_ones,  # of class and register tokens
    "MochiTransformer3DModel": _preceded_by_real_ones,  # of the mean of the text
    "ErnieImageTransformer2DModel": _preceded_by_real_ones,  # of patches
    "PriorTransformer": _followed_by_real_ones,
    "ChromaTransformer2DModel": _after_a_text,
    "VisualBertModel": _with_visual_tokens,
    "Idefics2PerceiverResampler": _all,
    "LongformerModel": _padded_to_a_block,
    "LEDEncoder": _padded_to_a_block,
    "LEDModel": _padded_to_a_block,
    "ReformerModel": _padded_to_a_block,
    "PegasusXEncoder": _padded_to_a_block,
    "BigBirdModel": _padded_to_a_block,
    "BigBirdPegasusEncoder": _padded_to_a_block,
    "CanineModel": _pooled,
    "MoonshineEncoder": _strided,
    "LukeModel": _with_entities,
    "MLukeModel": _with_entities,
    "PerceiverModel": _all,
    "WhisperEncoder": _all,  # it attends to all frames, whatever the mask says
}
