"""Blocks of doctests without the blank line that ends them in the source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from docutils import nodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata


def trim(_app: Sphinx, page: nodes.document) -> None:
    """Cut white space off the ends of a page's code."""
    for block in page.findall(nodes.literal_block):
        if block.rawsource == block.astext():  # else something is marked up inside
            block.rawsource = block.rawsource.rstrip()
            block[:] = [nodes.Text(block.rawsource)]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Trim each page after it was read."""
    app.connect("doctree-read", trim)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
