"""What all figures share: colours, and Axes of a new figure."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

__all__ = ["axes_or_new", "colour", "ink", "is_dark", "marker", "muted", "number_on", "open_frame", "short"]

# Okabe and Ito's colours, which readers of any colour vision can tell apart, in an order that differs in lightness too.
# Their last colour, black, cannot be seen on a dark ground; a grey of middle lightness replaces it.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8C8C8C")
_BRIGHTER = {"#0072B2": "#3D9BD6"}  # on a dark ground
# On a light ground, so that a mark has a contrast of at least 3; a darker yellow would look like the orange.
_DARKER = {"#E69F00": "#B87900", "#CC79A7": "#C26B9B", "#56B4E9": "#2B8CC4", "#F0E442": "#6A3D9A"}
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")


def colour(index: int, ax: Axes) -> str:
    """Return the colour of a series; numbers count from 0, and the colours repeat after eight."""
    plain = _COLOURS[index % len(_COLOURS)]
    return (_BRIGHTER if is_dark(ax) else _DARKER).get(plain, plain)


def marker(index: int) -> str:
    """Return the marker of a series; where colours repeat, another marker goes with each of them."""
    return _MARKERS[(index + index // len(_COLOURS)) % len(_MARKERS)]


def _luminance(shade: Any) -> float:
    """Return how much light a colour gives, from 0 for black to 1 for white, as WCAG 2 defines it."""
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(shade))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def number_on(shade: Any) -> str:
    """Return black or white: the one that has more contrast with the colour behind it, at least 4.5."""
    return "black" if _luminance(shade) > 0.179 else "white"


def is_dark(ax: Axes) -> bool:
    """Tell whether the ground is dark: whether text on these Axes is light."""
    return _luminance(ink(ax)) > 0.22


def ink(ax: Axes) -> str:
    """Return the colour of text and of lines that belong to no series."""
    return str(ax.xaxis.label.get_color())


def muted(ax: Axes) -> str:
    """Return a grey that can be seen on the ground of these Axes and does not stand out."""
    return "#B4B4B4" if is_dark(ax) else "#5F5F5F"


def axes_or_new(ax: Axes | None, *, width: float = 5.2, height: float = 3.6) -> Axes:
    """Return the given Axes, or those of a new figure, which needs no window; width and height are in inches."""
    if ax is not None:
        return ax
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def open_frame(ax: Axes) -> None:
    """Remove the lines of the frame that carry no ticks, and draw grids behind the data."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)


def short(number: float) -> str:
    """Write a count with three digits and its unit: 770, 12k or 1.5M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
