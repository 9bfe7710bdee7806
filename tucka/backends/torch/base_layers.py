"""What an adapter knows of the layer that it adapts: channel axis, width and, where it can be read, the weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from tucka.backends.torch.checks import Where, check_activations, check_device, check_tensors, named
from tucka.backends.torch.private import has_input_hooks, whole_shape
from tucka.backends.torch.thin import has_autocast, wide_dtype
from tucka.checks import check_count
from tucka.errors import ArrayError, ConfigError, ShapeError, expected

__all__ = [
    "channel_axis",
    "checked_rows",
    "from_rows",
    "input_axis",
    "is_convolution",
    "is_cut_along_input",
    "is_experts",
    "is_readable",
    "layer_dtype",
    "layer_weight",
    "open_weight",
    "output_width",
    "step_gain",
    "weight_rows",
    "width_of",
]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
# These layers neither convert their input nor say where they are when they refuse it.
_STRICT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# How many vectors the gain is measured with, and how many rows of the weight are cast at a time. Half precisions are
# cast, since products in them are slow on some processors and may overflow.
_PROBES, _ROWS = 8, 1024
# A gain outside these bounds comes from a damaged or empty weight, and cores in half precision could not balance it.
_LEAST, _MOST = 1e-2, 1e2


# Which axis


def is_convolution(layer: object) -> TypeGuard[nn.Conv2d]:
    """Tell whether a layer is one of torch's convolutions."""
    return isinstance(layer, _CONVOLUTIONS)


def channel_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's input that its adapter works on, from the end: -1, or a convolution's channels."""
    return -1 - len(layer.kernel_size) if is_convolution(layer) else -1


def checked_rows(layer: nn.Module, x: Tensor, bases: Sequence[Tensor], where: Where) -> Tensor:
    """View a layer's input channels last, (..., d), or raise where the layer or a basis (d, r) does not fit it."""
    check_tensors(where, x=x)
    axis = channel_axis(layer)
    if x.ndim < -axis:
        rule = "axes (..., d)" if axis == -1 else f"axes (..., d, *positions) with {-1 - axis} of positions"
        raise ShapeError(expected("x", rule, f"shape {tuple(x.shape)}", where=named(where)))
    rows = x if axis == -1 else x.movedim(axis, -1)
    cure = "Give the layer inputs of the width that it was adapted for"
    check_activations(rows, bases[0].shape[0], where, source="the adapter's width", cure=cure)
    for basis in bases:
        if basis.is_meta and not x.is_meta:  # offloaded: brought here when its module is called
            continue
        check_device("x", x, basis.device, where, owner="its adapter")
    _check_dtype(layer, x, where)
    return rows


def from_rows(layer: nn.Module, rows: Tensor, x: Tensor) -> Tensor:
    """Put the channels of adapted rows (..., d) back to where the input `x` has them."""
    axis = channel_axis(layer)
    if axis == -1:
        return rows
    moved = rows.movedim(-1, axis)
    # Laid out in memory as x, so that the layer chooses the same kernel and rounds in the same way. The strides of axes
    # of size one count too, and only a view makes them anew.
    return moved.contiguous().flatten().view(x.shape) if x.is_contiguous() else moved


def _check_dtype(layer: nn.Module, x: Tensor, where: Where) -> None:
    """Raise if torch's own layer would refuse an input for its dtype: torch's message does not name the layer."""
    # A layer of another class, with hooks of its own or under autocast may convert its input.
    if type(layer) not in _STRICT or has_input_hooks(layer) or has_autocast(x.device.type):
        return
    weight = layer.weight
    plain = type(weight) is nn.Parameter and weight.is_floating_point()
    if plain and weight.dtype != x.dtype:
        rule = f"dtype {weight.dtype} as the layer's weight"
        cure = f"Convert it with x.to({weight.dtype}), or use autocast"
        raise ArrayError(expected("x", rule, x.dtype, where=named(where), cure=cure))


# Which width


def width_of(layer: nn.Module, where: str, in_features: int | None = None) -> int:
    """Return the size of the axis that an adapter works on: `in_features` if given, else what the layer tells."""
    if isinstance(layer, nn.MultiheadAttention):
        rule, cure = "a layer that is called with one input", "Use an attention with separate q, k, v projections"
        raise ConfigError(expected("base_layer", rule, "MultiheadAttention", where=where, cure=cure))
    if is_convolution(layer):
        if layer.groups != 1:
            rule = "a convolution with groups=1, since the adapter mixes all channels"
            raise ConfigError(expected("base_layer", rule, f"groups={layer.groups}", where=where))
        return int(layer.in_channels)
    width = getattr(layer, "in_features", None) if in_features is None else in_features
    if in_features is not None and type(layer) is nn.Linear and type(layer.weight) is nn.Parameter:
        # What layers of other classes tell may count packed numbers.
        told = whole_shape(layer.weight)[1]
        if check_count("in_features", in_features, where=where) != told:
            rule, cure = f"{told}, the width of the layer's weight", "Leave it out"
            raise ConfigError(expected("in_features", rule, in_features, where=where, cure=cure))
    if width is None and is_experts(layer):
        width = whole_shape(layer_weight(layer))[input_axis(layer)]
    if width is None and type(layer).__name__ == "Conv1D":  # Hugging Face's: weight (in, out)
        width = whole_shape(layer.weight)[0]  # type: ignore[arg-type]
    if in_features is None and not isinstance(width, int):
        rule = "a layer with in_features, a Conv1D or a convolution"
        cure = "Pass in_features if it maps the last axis"
        raise ConfigError(expected("base_layer", rule, type(layer).__name__, where=where, cure=cure))
    return check_count("in_features", width, where=where)


def output_width(layer: nn.Module) -> int | None:
    """Return the size of the axis that a layer writes, if it tells; None if not."""
    for name in ("out_features", "out_channels", "nf"):  # of a linear layer, a convolution, Hugging Face's Conv1D
        width = getattr(layer, name, None)
        if isinstance(width, int):
            return width
    return None


# Which weight


def input_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's weight that belongs to its input."""
    if is_experts(layer):
        down: Any = layer.down_proj
        up, down = whole_shape(layer_weight(layer)), whole_shape(down)
        known = getattr(layer, "is_transposed", None)
        # Their output is as wide as their input: (E, f, d) beside (E, d, f), or (E, d, f) beside (E, f, d).
        transposed = up[1] == down[2] and up[2] != down[1] if known is None else known
        return 1 if transposed else 2
    turned = type(layer).__name__ == "Conv1D" or isinstance(layer, _TRANSPOSED)
    return 0 if turned else 1


def is_experts(layer: nn.Module) -> bool:
    """Tell whether a layer is a mixture's experts with one weight (E, ., .) for each projection, as in transformers."""
    return getattr(layer, "weight", None) is None and layer_weight(layer) is not None


def layer_weight(layer: nn.Module) -> Any:
    """Return the weight that reads a layer's input; None if the layer has none under a name that is known."""
    weight = getattr(layer, "weight", None)
    if weight is not None:
        return weight
    down = getattr(layer, "down_proj", None)
    for name in ("gate_up_proj", "up_proj"):
        found = getattr(layer, name, None)
        if all(isinstance(each, nn.Parameter) and len(whole_shape(each)) == 3 for each in (found, down)):
            return found
    return None


def layer_dtype(layer: nn.Module) -> torch.dtype | None:
    """Return the dtype of a layer's weight, if it is an ordinary parameter."""
    weight = layer_weight(layer)
    return weight.dtype if type(weight) is nn.Parameter else None


def open_weight(layer: nn.Module, width: int) -> Tensor | None:
    """Return a layer's weight if it can be read, and written, as numbers; None for quantised and hidden ones."""
    weight = layer_weight(layer)
    return weight if isinstance(weight, nn.Parameter) and is_readable(weight, layer, width) else None


def is_cut_along_input(layer: nn.Module) -> bool:
    """Tell whether each process has a part of the columns of a layer's weight, and sees that part of its input."""
    placements = getattr(layer_weight(layer), "placements", ())  # of a DTensor
    return any(getattr(placement, "dim", None) == input_axis(layer) for placement in placements)


def is_readable(weight: Tensor, layer: nn.Module, width: int) -> bool:
    """Tell whether a tensor holds plain floating-point numbers in the layout of a layer's weight."""
    # The exact class, since torchao's packed tensors are subclasses. Eight-bit floats have a scale elsewhere.
    plain = type(weight.data) is Tensor and weight.layout == torch.strided and weight.dtype in _NUMBERS
    return plain and weight.ndim > 1 and weight.shape[input_axis(layer)] == width


def weight_rows(weight: Tensor, axis: int) -> Tensor:
    """View a weight with input axis `axis` as a matrix (out, d), one row for each output and kernel position."""
    rows = weight.detach().movedim(axis, -1)
    return rows.reshape(-1, rows.shape[-1])


# The gain


@torch.no_grad()
def step_gain(layer: nn.Module, weight: Tensor | None) -> float | None:
    r"""Measure how far outputs move for a step of one in every input: the root mean square of W sign(Wᵀg), g normal."""
    # An optimiser like Adam takes such steps. The g are the same at every call, so that a start can be repeated.
    if weight is None or weight.is_meta:
        return None
    dtype = wide_dtype(weight)
    blocks = weight_rows(weight, input_axis(layer)).split(_ROWS)
    generator = torch.Generator("cpu").manual_seed(0)
    wanted = torch.zeros(_PROBES, blocks[0].shape[1], dtype=dtype, device=weight.device)
    for block in blocks:
        drawn = torch.randn(_PROBES, len(block), generator=generator, device="cpu")
        wanted += drawn.to(wanted) @ block.to(dtype)
    steps = wanted.sign()
    total = sum((steps @ block.to(dtype).T).square().sum() for block in blocks)
    gain = float((total * weight.shape[input_axis(layer)] / (_PROBES * weight.numel())) ** 0.5)
    if is_convolution(layer):
        # As if the steps of neighbouring positions were independent.
        summed = math.prod(layer.kernel_size)  # positions that an output sums over
        gain *= (summed / math.prod(layer.stride) if layer.transposed else summed) ** 0.5
    return min(max(gain, _LEAST), _MOST) if math.isfinite(gain) and gain > 0 else None
