"""Draws the tutorials' figures as vectors without background; the style sheet inverts them on a dark page."""

from __future__ import annotations

import logging
from textwrap import indent
from typing import Any

import matplotlib
from sphinx_gallery.scrapers import matplotlib_scraper

_INK = "#707070"  # 5.0 : 1 on white, and 5.7 : 1 when it is inverted on the dark page
STYLE = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "axes.titlesize": "medium",
    "figure.constrained_layout.use": True,
    "image.cmap": "RdBu_r",
    "lines.linewidth": 2,
    "svg.hashsalt": "tucka",  # every run writes the same file
}


def scrape(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save the open figures."""
    drawn = matplotlib_scraper(block, block_vars, gallery_conf, format="svg", metadata={"Date": None})
    # In a box of their own, which scrolls on a narrow page.
    return f"\n.. container:: lesson-figure\n\n{indent(drawn, '   ')}\n" if drawn.strip() else drawn


def restyle(_gallery_conf: dict[str, Any], _name: str | None) -> None:
    """Set the style before each tutorial; it runs after sphinx-gallery's own reset."""
    for name in ("matplotlib.category", "jax._src.xla_bridge", "datasets"):
        logging.getLogger(name).setLevel(logging.WARNING)
    matplotlib.rcParams.update(STYLE)
