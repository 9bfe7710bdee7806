"""Figures about size: accuracy against parameters, and parameters against the number of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from tucka.checks import check_count
from tucka.core.counts import count_parameters
from tucka.errors import ConfigError, expected
from tucka.plots.style import axes_or_new, colour, is_dark, marker, open_frame, short

__all__ = ["TradeoffPoint", "parameter_scaling", "tradeoff"]


class TradeoffPoint(NamedTuple):
    """One method in `tradeoff`.

    Parameters
    ----------
    name : str
        Written in the legend.
    parameters : int
        Trainable parameters, at least 1.
    accuracy : float
        Between 0 and 1.
    error : float
        Half the length of the error bar; no bar if 0.

    Examples
    --------
    >>> TradeoffPoint("LoRA", 294_912, 0.86).error
    0.0
    """

    name: str
    parameters: int
    accuracy: float
    error: float = 0.0


def tradeoff(points: Sequence[TradeoffPoint | tuple[str, int, float]], *, ax: Axes | None = None) -> Axes:
    """Draw accuracy against the number of trainable parameters: the paper's Figures 1(a) and 5(a).

    Parameters
    ----------
    points : sequence of TradeoffPoint
        One for each method; plain tuples in the same order are accepted too.
    ax : Axes, optional
        Where to draw; a new figure if None.

    Returns
    -------
    Axes
        With one point for each method, named in the legend.

    Raises
    ------
    ConfigError
        If there is no point, or if one has no parameters.

    Examples
    --------
    >>> tradeoff([("LoRA", 294_912, 0.86), ("TuckA", 166_008, 0.85)]).get_ylabel()
    'mean accuracy'
    """
    for point in points:
        if not isinstance(point, Sequence) or not 3 <= len(point) <= 4:
            raise ConfigError(
                expected("points", "(name, parameters, accuracy) of each method", point, where="tradeoff")
            )
    named = [TradeoffPoint(*point) for point in points]
    if not named or min(point.parameters for point in named) < 1:
        raise ConfigError(expected("points", "at least one, each with parameters", list(points), where="tradeoff"))
    ax = axes_or_new(ax)
    ax.set_xscale("log")
    for index, point in enumerate(named):
        shade = colour(index, ax)
        label = f"{point.name}: {point.accuracy:.1%}, {short(point.parameters)}"
        if point.error:
            ax.errorbar(
                point.parameters, point.accuracy, yerr=point.error, fmt="none", color=shade, capsize=3, elinewidth=1.3
            )
        ax.plot(
            point.parameters,
            point.accuracy,
            marker(index),
            color=shade,
            markersize=12 if marker(index) == "*" else 8,  # a star of one size looks smaller
            markeredgecolor="black" if is_dark(ax) else "white",
            markeredgewidth=0.7,
            label=label,
        )
    # Names are in the legend: beside the points, the names of similar methods would cover each other.
    ax.legend(frameon=False, loc="best")
    ax.margins(x=0.12, y=0.15)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    sizes = [point.parameters for point in named]
    # Few labels over a wide range, so that they do not touch; more where the sizes are close to each other.
    ratio = max(sizes) / min(sizes)
    fine = (1.0, 2.0, 5.0) if ratio >= 4 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0,) if ratio >= 100 else fine))
    ax.xaxis.set_minor_formatter(NullFormatter())
    spread = max(point.accuracy for point in named) - min(point.accuracy for point in named)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=1 if spread < 0.05 else 0))
    ax.set(xlabel="trainable parameters", ylabel="mean accuracy", title="Accuracy and size")
    ax.grid(alpha=0.3, linewidth=0.6)
    open_frame(ax)
    return ax


def parameter_scaling(
    *, layer: tuple[int, int] = (768, 768), r: int = 8, p: int = 2, experts: int = 32, ax: Axes | None = None
) -> Axes:
    """Draw how the trainable parameters of one layer grow with the number of experts: the paper's Figure 1(b).

    One more group costs one core, one more expert in a group very little, one more LoRA its full price.

    Parameters
    ----------
    layer : tuple of int
        Input and output width.
    r, p : int
        The ranks of TuckA; LoRA has the rank r too.
    experts : int
        The largest number of experts drawn; even, at least 2.
    ax : Axes, optional
        Where to draw; a new figure if None.

    Returns
    -------
    Axes
        With a line for each way to add experts. Routers are left out, because mixtures of LoRA differ in them.

    Raises
    ------
    ConfigError
        If a size is outside its rule.

    Examples
    --------
    >>> axes = parameter_scaling(experts=4)
    >>> {line.get_label(): line.get_ydata().tolist() for line in axes.lines}["separate LoRA experts, r=8"]
    [24576, 49152]
    """
    if check_count("experts", experts, least=2, where="parameter_scaling") % 2:
        raise ConfigError(expected("experts", "an even number", experts, where="parameter_scaling"))
    ax = axes_or_new(ax)
    numbers = list(range(2, experts + 1, 2))

    def tucka(k: int, t: int) -> int:
        return count_parameters("tucka", [layer], r=r, p=p, k=k, t=t, pinned=True)

    lines = {
        f"separate LoRA experts, r={r}": [count * count_parameters("lora", [layer], r=r) for count in numbers],
        f"TuckA, more groups of t=2, r={r}": [tucka(count // 2, 2) for count in numbers],
        f"TuckA, more experts in k=1 group, r={r}": [tucka(1, count) for count in numbers],
    }
    for index, (label, values) in enumerate(lines.items()):
        ax.plot(numbers, values, color=colour(index, ax), marker=marker(index), markersize=4, label=label)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    title = f"Parameters of one {layer[0]} × {layer[1]} layer"
    ax.set(xlabel="number of experts", ylabel="trainable parameters, without routers", title=title)
    ax.grid(alpha=0.3, linewidth=0.6)
    ax.legend(frameon=False)
    open_frame(ax)
    return ax
