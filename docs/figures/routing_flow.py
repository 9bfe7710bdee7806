"""Draw how one route is made in a forward and used by all layers; writes docs/_static/routing-flow.svg.

Run: python docs/figures/routing_flow.py
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

# White text is read on the boxes, and the ink on a white page; the site inverts the figure on a dark page.
ROUTER, GATE, LAYER, INK = "#2f7470", "#d98a2b", "#3f66ad", "#707070"


def box(axes: Axes, x: float, y: float, width: float, text: str, below: str, color: str) -> None:
    """Draw a rounded box centred at (x, y) with a line of small text under it."""
    height = 0.95
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.06", facecolor=color, edgecolor="none"
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=12, color="white")
    axes.text(x, y - 0.95, below, ha="center", va="center", fontsize=11, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0) -> None:
    """Draw an arrow."""
    style = {"arrowstyle": "-|>", "connectionstyle": f"arc3,rad={bend}", "mutation_scale": 13}
    axes.add_patch(FancyArrowPatch(start, end, color=INK, linewidth=1.3, **style))


def gates(axes: Axes, x: float, y: float) -> None:
    """Draw a gate tensor of 4 groups of 2: one row has gates, the others are zero."""
    size = 0.42
    for group in range(4):
        for expert in range(2):
            chosen = group == 1
            strength = (0.95, 0.45)[expert] if chosen else 0.0
            corner = (x + (expert - 1) * size, y + (1 - group) * size)
            axes.add_patch(Rectangle(corner, size, size, facecolor=GATE, alpha=strength, edgecolor="none"))
            axes.add_patch(Rectangle(corner, size, size, facecolor="none", edgecolor=INK, linewidth=0.9))
    axes.text(x, y + 2.55 * size, r"gates $\gamma$", ha="center", fontsize=12, color=INK)
    axes.text(x, y - 2.95 * size, r"$k \times t$, zeros but in one row", ha="center", fontsize=11, color=INK)


def draw() -> Figure:
    """Return the figure."""
    figure = Figure(figsize=(8.2, 3.65))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 18.4), ylim=(0, 8.2), aspect="equal")
    axes.axis("off")
    top, bottom = 6.0, 1.75
    box(axes, 4.1, top, 2.7, "mean", "over the tokens", ROUTER)
    box(axes, 8.8, top, 2.9, "compare", r"feature $h$ with centroids $e$", ROUTER)
    gates(axes, 14.1, top + 0.1)
    arrow(axes, (5.6, top), (7.2, top))
    arrow(axes, (10.4, top), (12.9, top))
    axes.text(11.6, top + 0.25, "argmax", ha="center", fontsize=11, color=INK)
    for x, name, below in (
        (4.1, "first layer", "provides the feature"),
        (9.2, "second layer", r"its own $\mathcal{G}, C, U$"),
        (14.3, "all others", "the same gates"),
    ):
        box(axes, x, bottom, 3.5, name, below, LAYER)
        arrow(axes, (13.8, top - 1.6), (x + 0.2, bottom + 0.65), bend=0.06 if x < 10 else 0)
    arrow(axes, (0.5, bottom), (2.2, bottom))
    axes.text(0.9, bottom + 0.25, r"$x$", ha="center", fontsize=14, color=INK)
    arrow(axes, (1.5, bottom + 0.1), (2.6, top - 0.1), bend=-0.25)
    arrow(axes, (6.0, bottom), (7.3, bottom))
    arrow(axes, (11.1, bottom), (12.4, bottom))
    arrow(axes, (16.2, bottom), (17.8, bottom))
    return figure


if __name__ == "__main__":
    target = Path(__file__).parent.parent / "_static" / "routing-flow.svg"
    matplotlib.rcParams["svg.hashsalt"] = "tucka"  # the same file from every run
    draw().savefig(target, transparent=True, metadata={"Date": None})
