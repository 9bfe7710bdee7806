"""Marks the figures of pages, so that the style sheet can fit them to a dark theme and to a narrow page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from docutils import nodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata


def mark(app: Sphinx, page: nodes.document) -> None:
    """Give the class ``figure`` to each drawing; the lessons' figures have a style of their own."""
    if not app.env.docname.startswith("tutorials"):
        for image in page.findall(nodes.image):
            image["classes"].append("figure")


def setup(app: Sphinx) -> ExtensionMetadata:
    """Mark the figures of each page after Sphinx has read it."""
    app.connect("doctree-read", mark)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
