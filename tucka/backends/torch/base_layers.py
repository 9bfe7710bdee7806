"""What an adapter knows of the layer that it adapts: channel axis, width and, where it can be read, the weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tucka.errors import ConfigError, expected

__all__ = [
    "channel_axis",
    "from_rows",
    "input_axis",
    "is_readable",
    "open_weight",
    "step_gain",
    "to_rows",
    "weight_rows",
    "width_of",
]


def channel_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's input that its adapter works on, counted from the end.

    Parameters
    ----------
    layer : Module
        The layer.

    Returns
    -------
    int
        -1, but for a convolution the axis before its spatial ones, with or without a batch axis.

    Examples
    --------
    >>> channel_axis(nn.Linear(3, 3)), channel_axis(nn.Conv2d(3, 3, 1))
    (-1, -3)
    """
    return -1 - len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else -1


def to_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Move the channels of a layer's input to the last axis.

    Parameters
    ----------
    layer : Module
        The layer.
    x : Tensor
        Its input.

    Returns
    -------
    Tensor, shape (..., d)
        A view of `x`.

    Examples
    --------
    >>> import torch
    >>> to_rows(nn.Conv1d(3, 3, 1), torch.ones(2, 3, 5)).shape
    torch.Size([2, 5, 3])
    """
    axis = channel_axis(layer)
    # Inputs with too few axes are left for the check of shapes to name.
    return x if axis == -1 or x.ndim < -axis else x.movedim(axis, -1)


def from_rows(layer: nn.Module, rows: Tensor, x: Tensor) -> Tensor:
    """Undo `to_rows`.

    Parameters
    ----------
    layer : Module
        The layer.
    rows : Tensor, shape (..., d)
        Adapted input, channels last.
    x : Tensor
        The input as it was.

    Returns
    -------
    Tensor
        Laid out in memory as `x`, so that the layer chooses the same kernel and rounds in the same way.

    Examples
    --------
    >>> import torch
    >>> layer, x = nn.Conv1d(3, 3, 1), torch.ones(2, 3, 5)
    >>> from_rows(layer, to_rows(layer, x), x).shape
    torch.Size([2, 3, 5])
    """
    axis = channel_axis(layer)
    if axis == -1:
        return rows
    moved = rows.movedim(-1, axis)
    return moved.contiguous() if x.is_contiguous() else moved


def width_of(layer: nn.Module, where: str, in_features: int | None = None) -> int:
    """Return the size of the axis that an adapter of `layer` works on.

    Parameters
    ----------
    layer : Module
        A linear layer, Hugging Face's Conv1D, a convolution, or anything with ``in_features``.
    where : str
        The layer's name, for the message.
    in_features : int, optional
        The width, for layers that do not tell it.

    Returns
    -------
    int
        Width of its input.

    Raises
    ------
    ConfigError
        If it does not tell, or cannot be adapted.

    Examples
    --------
    >>> width_of(nn.Linear(3, 5), "example")
    3
    """
    if isinstance(layer, nn.MultiheadAttention):
        rule, cure = "a layer that is called with one input", "Use an attention with separate q, k, v projections"
        raise ConfigError(expected("base_layer", rule, "MultiheadAttention", where=where, cure=cure))
    if isinstance(layer, nn.modules.conv._ConvNd):
        if layer.groups != 1:
            rule = "a convolution with groups=1, since the adapter mixes all channels"
            raise ConfigError(expected("base_layer", rule, f"groups={layer.groups}", where=where))
        return int(layer.in_channels)
    width = getattr(layer, "in_features", None) if in_features is None else in_features
    if width is None and type(layer).__name__ == "Conv1D":  # Hugging Face's: weight (in, out)
        width = layer.weight.shape[0]  # type: ignore[index]
    if not isinstance(width, int):
        rule = "a layer with in_features, a Conv1D or a convolution"
        raise ConfigError(expected("base_layer", rule, type(layer).__name__, where=where, cure="Pass in_features"))
    return width


_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# How many vectors the gain is measured with, and how many rows of the weight at a time: half precisions are cast, since
# products in them are slow on some processors, and may overflow.
_PROBES, _ROWS = 8, 1024
# A gain outside says that the weight is damaged or empty, and cores in half precision could not make up for it.
_LEAST, _MOST = 1e-2, 1e2


def input_axis(layer: nn.Module) -> int:
    """Return the axis of a layer's weight that belongs to its input.

    Parameters
    ----------
    layer : Module
        The layer.

    Returns
    -------
    int
        1, but 0 for Hugging Face's Conv1D and transposed convolutions.

    Examples
    --------
    >>> input_axis(nn.Linear(3, 5)), input_axis(nn.ConvTranspose1d(3, 5, 1))
    (1, 0)
    """
    turned = type(layer).__name__ == "Conv1D" or isinstance(layer, nn.modules.conv._ConvTransposeNd)
    return 0 if turned else 1


def open_weight(layer: nn.Module, width: int) -> Tensor | None:
    """Return a layer's weight if it can be read, and written, as a matrix of floating-point numbers.

    Parameters
    ----------
    layer : Module
        The layer.
    width : int
        Of its input.

    Returns
    -------
    Parameter or None
        None for quantised weights, hidden ones, and layouts that are not known.

    Examples
    --------
    >>> open_weight(nn.Linear(3, 5), 3).shape
    torch.Size([5, 3])
    >>> open_weight(nn.ReLU(), 3) is None
    True
    """
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, nn.Parameter) and is_readable(weight, layer, width) else None


def is_readable(weight: Tensor, layer: nn.Module, width: int) -> bool:
    """Tell whether a tensor holds plain floating-point numbers in the layout of a layer's weight.

    Parameters
    ----------
    weight : Tensor
        The tensor.
    layer : Module
        The layer.
    width : int
        Of its input.

    Returns
    -------
    bool
        False for a kind of tensor that only looks like one of numbers, as torchao's, and for eight bits, which have a
        scale elsewhere.

    Examples
    --------
    >>> is_readable(torch.ones(5, 3), nn.Linear(3, 5), 3), is_readable(torch.ones(15), nn.Linear(3, 5), 3)
    (True, False)
    """
    plain = type(weight.data) is Tensor and weight.layout == torch.strided and weight.dtype in _NUMBERS
    return plain and weight.ndim > 1 and weight.shape[input_axis(layer)] == width


def weight_rows(weight: Tensor, axis: int) -> Tensor:
    """View a weight as a matrix, one row for each output and kernel position.

    Parameters
    ----------
    weight : Tensor
        The weight.
    axis : int
        Of its input.

    Returns
    -------
    Tensor, shape (out, d)
        A view where the layout allows it.

    Examples
    --------
    >>> weight_rows(nn.Conv1d(3, 5, 2).weight, axis=1).shape
    torch.Size([10, 3])
    """
    rows = weight.detach().movedim(axis, -1)
    return rows.reshape(-1, rows.shape[-1])


@torch.no_grad()
def step_gain(layer: nn.Module, weight: Tensor | None) -> float | None:
    r"""Measure how far outputs move for a step of one in every input, as an optimiser like Adam takes it.

    Parameters
    ----------
    layer : Module
        The layer.
    weight : Tensor or None
        Its weight W, in floating point.

    Returns
    -------
    float or None
        Root mean square of :math:`W\,\mathrm{sign}(W^\top g)` for a few g drawn from a normal distribution, the same
        at every call; of a convolution, as if the steps of neighbours were independent. At least 0.01 and at most 100.
        None without a weight, or for one that has no values yet.

    Examples
    --------
    >>> layer = nn.Linear(3, 3)
    >>> step_gain(layer, 2.0 * torch.eye(3))
    2.0
    """
    if weight is None or weight.is_meta:
        return None
    dtype = torch.promote_types(weight.dtype, torch.float32)
    blocks = weight_rows(weight, input_axis(layer)).split(_ROWS)
    generator = torch.Generator("cpu").manual_seed(0)
    wanted = torch.zeros(_PROBES, blocks[0].shape[1], dtype=dtype, device=weight.device)
    for block in blocks:
        drawn = torch.randn(_PROBES, len(block), generator=generator, device="cpu")
        wanted += drawn.to(wanted) @ block.to(dtype)
    steps = wanted.sign()
    total = sum((steps @ block.to(dtype).T).square().sum() for block in blocks)
    gain = float((total * weight.shape[input_axis(layer)] / (_PROBES * weight.numel())) ** 0.5)
    if isinstance(layer, nn.modules.conv._ConvNd):
        each = math.prod(layer.kernel_size)  # of the inputs that an output sums over
        gain *= (each / math.prod(layer.stride) if layer.transposed else each) ** 0.5
    return min(max(gain, _LEAST), _MOST) if math.isfinite(gain) and gain > 0 else None
