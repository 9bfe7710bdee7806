"""Figures, one function each: accuracy against size, the load of the expert groups, which group serves what.

Each takes matplotlib Axes to draw in, or makes a figure of its own (``axes.figure.savefig(...)`` writes it), and
returns the Axes. No function touches matplotlib's global state. Colours are told apart by readers of any colour vision,
and no fact is told by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from tucka.core.counts import count_parameters
from tucka.core.load import load_entropy
from tucka.errors import ConfigError, ShapeError, expected
from tucka.spec import check_count

__all__ = ["TradeoffPoint", "expert_load", "group_by_label", "parameter_scaling", "tradeoff"]

# Okabe and Ito's, in an order that also differs in lightness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_GREY = "#666666"


class TradeoffPoint(NamedTuple):
    """One method in `tradeoff`.

    Parameters
    ----------
    name : str
        Written beside the point.
    parameters : int
        Trainable parameters, at least 1.
    accuracy : float
        Between 0 and 1.
    error : float
        Half the length of the error bar; none if 0.
    """

    name: str
    parameters: int
    accuracy: float
    error: float = 0.0


def _axes(ax: Axes | None) -> Axes:
    """Return `ax`, or the Axes of a new figure that needs no window."""
    if ax is not None:
        return ax
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)


def _short(number: float) -> str:
    """Write a count as a reader says it: 770, 12k, 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def tradeoff(points: Sequence[TradeoffPoint | tuple[str, int, float]], ax: Axes | None = None) -> Axes:
    """Draw accuracy against the number of trainable parameters.

    Parameters
    ----------
    points : sequence of TradeoffPoint
        One for each method; plain tuples in the same order do as well.
    ax : Axes, optional
        Where to draw; a new figure if None.

    Returns
    -------
    Axes
        With one point for each method, named in the legend.

    Raises
    ------
    ConfigError
        If there is no point, or one without parameters.

    Examples
    --------
    >>> tradeoff([("LoRA", 294_912, 0.86), ("TuckA", 166_008, 0.85)]).get_ylabel()
    'mean accuracy'
    """
    named = [TradeoffPoint(*point) for point in points]
    if not named or min(point.parameters for point in named) < 1:
        raise ConfigError(expected("points", "at least one, each with parameters", list(points), where="tradeoff"))
    ax = _axes(ax)
    ax.set_xscale("log")
    for index, point in enumerate(named):
        colour, marker = _COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)]
        label = f"{point.name}: {point.accuracy:.1%}, {_short(point.parameters)}"
        if point.error:
            ax.errorbar(point.parameters, point.accuracy, yerr=point.error, fmt="none", color=colour, capsize=3)
        ax.plot(point.parameters, point.accuracy, marker, color=colour, markersize=8, label=label)
    # Names go to the legend: beside the points they would cover each other where methods are alike.
    ax.legend(frameon=False, loc="best")
    ax.margins(x=0.12, y=0.15)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(xlabel="trainable parameters", ylabel="mean accuracy", title="Accuracy and size")
    ax.grid(alpha=0.3)
    _plain(ax)
    return ax


def expert_load(load: Sequence[float], ax: Axes | None = None) -> Axes:
    """Draw how often each expert group was chosen.

    Parameters
    ----------
    load : sequence of float
        A count for each group, as `tucka.peft.expert_load` returns them.
    ax : Axes, optional
        Where to draw; a new figure if None.

    Returns
    -------
    Axes
        With a bar for each group's share and a line at the even share.

    Raises
    ------
    ShapeError
        If `load` is not a vector.
    ConfigError
        If a count is negative or not finite, or all are zero.

    Examples
    --------
    >>> [float(bar.get_height()) for bar in expert_load([30, 10]).patches]
    [0.75, 0.25]
    """
    counts = [float(count) for count in load]
    entropy = load_entropy(counts)
    ax = _axes(ax)
    shares = [count / sum(counts) for count in counts]
    names = [str(group) for group in range(len(shares))]
    bars = ax.bar(names, shares, color=_COLOURS[0], width=0.7)
    ax.bar_label(bars, labels=[f"{share:.0%}" for share in shares], padding=2)
    ax.axhline(1 / len(shares), color=_GREY, linestyle="--", linewidth=1, label="even share")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.margins(y=0.15)
    ax.set(xlabel="expert group", ylabel="share of the routings", title=f"Expert load (entropy {entropy:.2f})")
    ax.legend(frameon=False)
    _plain(ax)
    return ax


def group_by_label(load_table: Mapping[str, Sequence[float]], ax: Axes | None = None) -> Axes:
    """Draw which expert group serves which kind of input.

    Parameters
    ----------
    load_table : mapping of str to sequence of float
        For each label (a domain, a language, a class) the count of each group; all of one length.
    ax : Axes, optional
        Where to draw; a new figure if None.

    Returns
    -------
    Axes
        With a row for each label and a column for each group, each cell the group's share in the row.

    Raises
    ------
    ShapeError
        If there is no row, or rows differ in length.
    ConfigError
        If a count is negative or not finite, or a row holds only zeros.

    Examples
    --------
    >>> axes = group_by_label({"news": [3, 1], "tweets": [0, 4]})
    >>> axes.images[0].get_array().tolist()
    [[0.75, 0.25], [0.0, 1.0]]
    """
    rows = {label: [float(count) for count in load] for label, load in load_table.items()}
    if len({len(row) for row in rows.values()}) != 1:
        lengths = {label: len(row) for label, row in rows.items()}
        raise ShapeError(expected("load_table", "rows of one length", lengths, where="group_by_label"))
    for row in rows.values():
        load_entropy(row)  # for its rules on counts
    ax = _axes(ax)
    shares = np.array([np.divide(row, sum(row)) for row in rows.values()])
    most = float(shares.max())
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=most, aspect="auto")
    for (row_index, group), share in np.ndenumerate(shares):
        colour = "white" if share > 0.6 * most else "black"
        ax.text(group, row_index, f"{share:.0%}", ha="center", va="center", color=colour)
    ax.set_xticks(range(shares.shape[1]), [str(group) for group in range(shares.shape[1])])
    ax.set_yticks(range(len(rows)), list(rows))
    # White lines between cells: minor ticks lie on the cells' borders.
    ax.set_xticks(np.arange(0.5, shares.shape[1] - 1), minor=True)
    ax.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
    ax.grid(which="minor", color="white", linewidth=2)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="expert group", title="Which group serves what")
    return ax


def parameter_scaling(
    layer: tuple[int, int] = (768, 768), *, r: int = 8, p: int = 2, experts: int = 32, ax: Axes | None = None
) -> Axes:
    """Draw how the trainable parameters of one layer grow with the number of experts: the paper's Figure 1(b).

    More groups cost a core each, more experts in a group next to nothing, separate LoRA experts their full price.

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
        With a line for each way to add experts. Routers are left out: LoRA's mixtures differ in theirs.

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
    ax = _axes(ax)
    numbers = list(range(2, experts + 1, 2))

    def tucka(k: int, t: int) -> int:
        return count_parameters("tucka", [layer], r=r, p=p, k=k, t=t, pinned=True)

    lines = {
        f"separate LoRA experts, r={r}": [count * count_parameters("lora", [layer], r=r) for count in numbers],
        f"TuckA, more groups of t=2, r={r}": [tucka(count // 2, 2) for count in numbers],
        f"TuckA, more experts in k=1 group, r={r}": [tucka(1, count) for count in numbers],
    }
    for index, (label, values) in enumerate(lines.items()):
        ax.plot(numbers, values, color=_COLOURS[index], marker=_MARKERS[index], markersize=4, label=label)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    title = f"Parameters of one {layer[0]} × {layer[1]} layer"
    ax.set(xlabel="number of experts", ylabel="trainable parameters, without routers", title=title)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    _plain(ax)
    return ax
