"""What a call of a model was given: how many samples and tokens, which of them count, and which cache it continues."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["OTHER", "ROLES", "Inputs", "caches_in", "read_inputs", "tensors_in"]

# Inputs whose second axis counts no tokens of the layers inside: pixels, samples of sound, spectra.
_RAW = ("pixel", "input_values", "input_features", "audio", "image", "video", "waveform", "spectro")
# Masks in torch's own layers are true where a token is padding; everywhere else where it is a token.
_PADDING = ("src_key_padding_mask", "key_padding_mask")
_KEPT = ("attention_mask", "pixel_mask", "pixel_attention_mask", "patch_valid")
# Of the other sequence, which cross-attention and the text's part of a joint attention see.
_OF_OTHERS = ("encoder_attention_mask", "encoder_hidden_states_mask")
_LENGTHS = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens")
# What a caller may say that an argument of a model of its own is.
OTHER = "other"
ROLES = ("attention_mask", "key_padding_mask", "position_ids", "cu_seq_lens_q", OTHER)

# What models are called with to go on from earlier tokens, where it is no cache that tells its length.
_STATES = ("state", "mems", "cache_params", "past_key_values", "past", "cache")

# Models that generate music, whose inputs have a row for each codebook of a sample.
_OF_MUSIC = tuple(
    f"{name}{part}" for name in ("Musicgen", "MusicgenMelody") for part in ("Decoder", "Model", "ForCausalLM")
)
_CODES = ("input_ids", "")


@dataclass
class Inputs:
    """The leading sizes of one call's inputs, and what tells tokens from padding and documents from each other."""

    rows: int | None = None  # B, the samples
    tokens: int | None = None  # S; None where layers inside see other tokens than the inputs have
    mask: Any = None  # true where a token counts; as it was given
    mask_of_others: Any = None  # the same of another sequence
    positions: Tensor | None = None  # explicit positions (B, S), which restart at each document
    lengths: Tensor | None = None  # cumulated lengths of documents that share one row
    are_images: bool = False  # the documents: each is a sample of a batch, which one route may be for
    others: Mapping[str, Any] = field(default_factory=dict)  # all arguments by their names
    labels: Tensor | None = None
    cache: Any = None
    has_states: bool = False  # whether it goes on from states of which no length is known
    main: Tensor | None = None
    device: torch.device | None = None

    def is_packed(self) -> bool:
        """Tell whether several documents may share a row."""
        return self.lengths is not None or self.positions is not None

    def documents(self, rows: int, tokens: int) -> Tensor | None:
        """Number the documents in each row, shape (rows, tokens); None where each row is one document."""
        if self.lengths is not None:
            places = torch.arange(rows * tokens, device=self.lengths.device)
            return torch.bucketize(places, self.lengths[1:-1], right=True).reshape(rows, tokens)
        positions = self.positions
        if (
            positions is None
            or positions.ndim != 2
            or positions.shape[1] != tokens
            or positions.shape[0] not in (1, rows)
        ):
            return None
        # The rule by which transformers itself separates packed documents.
        begins = torch.ones_like(positions, dtype=torch.bool)
        begins[:, 1:] = positions.diff(dim=1) != 1
        return (begins.cumsum(dim=1) - 1).expand(rows, tokens)


def read_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> Inputs:
    """Read a call of a module; `names` says what some of its arguments are, as in `ROLES`."""
    named = _named(module, args, kwargs)
    if names:
        named = {names.get(name, name): value for name, value in named.items()}
    name, main = _main_input(module, args, named)
    found = Inputs(main=main, others=named)
    if main is not None:
        found.device = main.device
        found.rows, found.tokens = _sizes(name, main)
    found.mask = _mask_in(named)
    found.mask_of_others = next((named[key] for key in _OF_OTHERS if isinstance(named.get(key), Tensor)), None)
    found.labels = named.get("labels")
    found.cache = next(caches_in(named), None)
    if found.cache is None:
        for state in _STATES:
            if named.get(state) is not None and _holds_tensors(named[state]):
                found.has_states = True
    positions = named.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 3 and positions.shape[0] == 4:
        positions = positions[0]  # of text, before those of time, height and width
    found.positions = positions if isinstance(positions, Tensor) and positions.ndim == 2 else None
    lengths = next((named[key] for key in _LENGTHS if isinstance(named.get(key), Tensor)), None)
    grid = named.get("grid_thw")
    if lengths is None and isinstance(grid, Tensor):
        lengths = nn.functional.pad(grid.prod(dim=-1).cumsum(dim=0), (1, 0))
        found.are_images = True
        found.rows, found.tokens = 1, None if main is None else main.shape[0]
    found.lengths = lengths
    codebooks = getattr(module, "num_codebooks", None)
    if isinstance(codebooks, int) and found.rows is not None and name in _CODES and type(module).__name__ in _OF_MUSIC:
        found.rows //= codebooks
    return found


@functools.lru_cache(maxsize=512)
def _parameter_names(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    batch = args[0] if args else next(iter(kwargs.values())) if len(kwargs) == 1 else None
    if isinstance(batch, Mapping):  # all inputs in one argument
        return {**batch, **kwargs}
    if not args:  # the usual call, which needs no look at the signature
        return kwargs
    if torch.compiler.is_compiling() and len(args) == 1:
        return kwargs
    return {**dict(zip(_parameter_names(cast(Any, type(module))), args, strict=False)), **kwargs}


def _main_input(module: nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[str, Tensor | None]:
    """Find the input that the others accompany, and its name."""
    wanted = getattr(module, "main_input_name", None)
    for name in (wanted, "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"):
        if isinstance(name, str) and isinstance(named.get(name), Tensor):
            return name, named[name]
    if args and isinstance(args[0], Tensor):
        return wanted if isinstance(wanted, str) else "", args[0]
    first = next(((name, leaf) for name, leaf in tensors_in(named) if leaf.ndim > 1 and "mask" not in name), None)
    return ("", None) if first is None else first


def tensors_in(named: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    """Yield the tensors among arguments and in their containers, with their names."""
    for name, value in named.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from ((key, inner) for key, inner in value.items() if isinstance(inner, Tensor))
        elif isinstance(value, (tuple, list)):
            yield from ((name, inner) for inner in value if isinstance(inner, Tensor))


def _sizes(name: str, main: Tensor) -> tuple[int | None, int | None]:
    """Return how many samples and tokens an input has, as far as its axes tell."""
    if main.ndim < 2:
        return None, None
    if name.startswith(_RAW):
        return main.shape[0], None
    whole = not main.is_floating_point()
    if whole and main.ndim == 3:  # the choices of each sample, which models flatten: each choice is a row of its own
        return main.shape[0] * main.shape[1], main.shape[2]
    if (whole and main.ndim == 2) or (main.ndim > 2 and not whole):
        return main.shape[0], math.prod(main.shape[1:-1] if not whole else main.shape[1:])
    return main.shape[0], None


def _mask_in(named: Mapping[str, Any]) -> Any:
    """Find the mask of a call; true where a token counts."""
    for name in _KEPT:
        if named.get(name) is not None:
            return named[name]
    for name in _PADDING:
        padding = named.get(name)
        if isinstance(padding, Tensor):
            return ~padding if padding.dtype == torch.bool else padding == 0
    text, lengths = named.get("text_bth"), named.get("text_lens")  # of ERNIE-Image
    if isinstance(text, Tensor) and isinstance(lengths, Tensor):
        return torch.arange(text.shape[1], device=lengths.device) < lengths[:, None]
    return None


def caches_in(values: Any) -> Iterator[Any]:
    """Find caches by what they are, under whatever name a version of transformers passes them, or in what container."""
    if isinstance(values, Mapping):
        values = values.values()
    inside = []
    for value in () if isinstance(values, Tensor) else values:
        if value is None or isinstance(value, (Tensor, nn.Module)):
            continue
        if hasattr(value, "get_seq_length"):
            yield value
        elif isinstance(value, (Mapping, tuple, list)):
            inside.append(value)
    for container in inside:
        for value in container.values() if isinstance(container, Mapping) else container:
            if hasattr(value, "get_seq_length") and not isinstance(value, nn.Module):
                yield value


def _holds_tensors(states: Any) -> bool:
    """Tell whether states hold anything: a list of tensors or of others, or an object with tensors in it."""
    if states is None or isinstance(states, (bool, int, str)):
        return False
    if isinstance(states, Tensor):
        return True
    values = vars(states) if hasattr(states, "__dict__") and not isinstance(states, (Mapping, tuple, list)) else states
    inner = values.values() if isinstance(values, Mapping) else values if isinstance(values, (tuple, list)) else ()
    return any(_holds_tensors(value) for value in inner)
