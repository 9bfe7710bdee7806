"""Draw how cores, expert factor and basis make a group of experts; writes docs/_static/tensor-experts.svg.

Run: python docs/figures/tensor_experts.py
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

# The ink is read on a white page; the site inverts the figure on a dark page.
CORE, FACTOR, BASIS, EXPERT, INK = "#d98a2b", "#3f8f8a", "#4f79c4", "#a86aa8", "#707070"


def shade(color: str, toward: float, amount: float) -> tuple[float, ...]:
    """Mix a colour with a grey level."""
    return tuple((1 - amount) * channel + amount * toward for channel in to_rgb(color))


def box(axes: Axes, x: float, y: float, width: float, height: float, depth: float, color: str, pale: float = 0) -> None:
    """Draw a block with its lower left front corner at (x, y); depth runs to the upper right."""
    dx, dy = 0.6 * depth, 0.45 * depth
    front = [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]
    top = [(x, y + height), (x + width, y + height), (x + width + dx, y + height + dy), (x + dx, y + height + dy)]
    side = [(x + width, y), (x + width + dx, y + dy), (x + width + dx, y + height + dy), (x + width, y + height)]
    for corners, toward, amount in ((front, 1, 0), (top, 1, 0.35), (side, 0, 0.2)):
        face = shade(shade(color, toward, amount), 1, pale)
        axes.add_patch(Polygon(corners, closed=True, facecolor=face, edgecolor="white", linewidth=0.8))


def label(axes: Axes, x: float, y: float, text: str, size: float = 11) -> None:
    """Write centred text."""
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=INK)


def draw() -> Figure:
    """Return the figure."""
    figure = Figure(figsize=(8.2, 3.12))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 18.4), ylim=(0, 7), aspect="equal")
    axes.axis("off")
    for slice_ in reversed(range(3)):
        box(axes, 0.5 + 0.75 * slice_, 1.9 + 0.55 * slice_, 2.6, 2.6, 0.5, EXPERT, pale=0.18 * slice_)
    label(axes, 2.7, 6.45, r"$t$ experts of group $i$")
    label(axes, 2.1, 1.35, r"$d \times d$, never formed", 11)
    label(axes, 6.0, 3.5, "=", 20)
    box(axes, 6.9, 2.1, 0.8, 2.9, 0.0, BASIS)
    label(axes, 7.3, 1.5, r"$U$", 13)
    label(axes, 7.3, 0.85, r"$d \times r$", 11)
    for core in reversed(range(4)):
        box(axes, 8.9 + 0.95 * core, 3.0 + 0.5 * core, 1.0, 1.0, 0.5, CORE, pale=0.0 if core == 1 else 0.55)
    label(axes, 11.0, 6.45, r"$k$ cores of $p \times r \times r$; a route takes one", 11)
    label(axes, 11.35, 2.85, r"$\times_0$", 13)
    box(axes, 11.9, 2.2, 1.3, 1.0, 0.0, FACTOR)
    label(axes, 12.55, 1.5, r"$C$", 13)
    label(axes, 12.55, 0.85, r"$t \times p$", 11)
    box(axes, 14.6, 3.1, 2.9, 0.8, 0.0, BASIS)
    label(axes, 16.05, 2.5, r"$U^\top$", 13)
    label(axes, 16.05, 1.85, r"$r \times d$", 11)
    return figure


if __name__ == "__main__":
    target = Path(__file__).parent.parent / "_static" / "tensor-experts.svg"
    matplotlib.rcParams["svg.hashsalt"] = "tucka"  # the same file from every run
    draw().savefig(target, transparent=True, metadata={"Date": None})
