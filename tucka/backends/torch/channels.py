"""Where a layer's channels are: on the last axis, or before the spatial ones."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["channel_axis", "from_rows", "to_rows"]


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
