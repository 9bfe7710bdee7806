"""Which layers can be adapted, and on how many channels."""

from __future__ import annotations

from torch import nn

from tucka.errors import ConfigError, expected

__all__ = ["width_of"]


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
