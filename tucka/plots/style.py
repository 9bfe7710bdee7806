"""What all figures share: colours, text that can be read on light and dark, Axes of one's own."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

__all__ = ["MARKERS", "axes_or_new", "colour", "ink", "is_dark", "lightness", "muted", "open_frame", "short"]

# Okabe and Ito's, which readers of any colour vision tell apart; in an order that differs in lightness too. The last
# one of theirs is black, which a dark ground would hide: a grey of middle lightness stands for it.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8C8C8C")
_BRIGHTER = {"#0072B2": "#3D9BD6"}  # on a dark ground
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")


def colour(index: int, ax: Axes) -> str:
    """Return the colour of the series number `index`; after eight they repeat.

    Parameters
    ----------
    index : int
        From 0.
    ax : Axes
        Where it is drawn.

    Returns
    -------
    str
        A colour.
    """
    plain = _COLOURS[index % len(_COLOURS)]
    return _BRIGHTER.get(plain, plain) if is_dark(ax) else plain


def lightness(shade: Any) -> float:
    """Return how light a colour looks.

    Parameters
    ----------
    shade : colour
        In any of matplotlib's ways to write one.

    Returns
    -------
    float
        From 0 for black to 1 for white.

    Examples
    --------
    >>> lightness("black"), lightness("white")
    (0.0, 1.0)
    """
    red, green, blue = to_rgb(shade)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def is_dark(ax: Axes) -> bool:
    """Tell whether text on these Axes is light, which says that the ground is dark.

    Parameters
    ----------
    ax : Axes
        Made under any of matplotlib's styles.

    Returns
    -------
    bool
        True under ``dark_background`` and its kind.
    """
    return lightness(ink(ax)) > 0.5


def ink(ax: Axes) -> str:
    """Return the colour of text and of lines that carry no series.

    Parameters
    ----------
    ax : Axes
        Made under any of matplotlib's styles.

    Returns
    -------
    str
        A colour.
    """
    return str(ax.xaxis.label.get_color())


def muted(ax: Axes) -> str:
    """Return a grey that can be seen on the ground of these Axes and does not compete.

    Parameters
    ----------
    ax : Axes
        Made under any of matplotlib's styles.

    Returns
    -------
    str
        A colour.
    """
    return "#B4B4B4" if is_dark(ax) else "#5F5F5F"


def axes_or_new(ax: Axes | None, *, width: float = 5.2, height: float = 3.6) -> Axes:
    """Return `ax`, or the Axes of a new figure that needs no window.

    Parameters
    ----------
    ax : Axes or None
        What the caller was given.
    width, height : float
        Of a new figure, in inches.

    Returns
    -------
    Axes
        To draw in.
    """
    if ax is not None:
        return ax
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def open_frame(ax: Axes) -> None:
    """Leave only the lines of the frame that carry ticks, and draw grids behind the data.

    Parameters
    ----------
    ax : Axes
        Changed in place.
    """
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)


def short(number: float) -> str:
    """Write a count as a reader says it.

    Parameters
    ----------
    number : float
        Not negative.

    Returns
    -------
    str
        Such as 770, 12k or 1.5M.

    Examples
    --------
    >>> short(770), short(12_000), short(1_500_000)
    ('770', '12k', '1.5M')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
