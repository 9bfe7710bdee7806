"""What the figures of all benchmarks share, so that they can be read on light, on dark and on narrow pages.

The ground is transparent, and the site's style sheet inverts a figure on a dark page and keeps its hues. Words have a
contrast of at least 4.5 on both pages, marks of at least 3; words have ten points; no figure is wider than a page.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.6  # inches, the site's column
OURS, OTHERS, MUTED = "#0B6E69", "#6F7A80", "#5F5F5F"
SERIES = ("#0072B2", "#C25700", "#00845F", "#A8438A", "#6F7A80", "#8A7D00", "#6A3D9A", "#B02A30")
_STYLE = {"font.size": 10, "axes.titlesize": "medium", "legend.frameon": False, "svg.hashsalt": "tucka"}


def panels(rows: int = 1, columns: int = 1, *, height: float, **options: Any) -> tuple[Figure, Any]:
    """Make a figure as wide as a page and its Axes, (rows, columns)."""
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE | {"axes.prop_cycle": cycler(color=SERIES)}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def legend_below(figure: Figure, columns: int) -> None:
    """Name each series once, under the panels, where a legend covers no data."""
    named = {}
    for axes in figure.axes:
        named |= {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=columns, frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write the figure; every run writes the same file."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure.savefig(path, transparent=True, metadata={"Date": None})
