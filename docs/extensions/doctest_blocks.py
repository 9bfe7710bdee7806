"""Removes the blank line that ends a doctest block in the source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from docutils import nodes

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata


def trim(_app: Sphinx, page: nodes.document) -> None:
    """Remove the white space at the end of each code block of a page."""
    for block in page.findall(nodes.literal_block):
        if block.rawsource == block.astext():  # a block with markup inside has another text
            block.rawsource = block.rawsource.rstrip()
            block[:] = [nodes.Text(block.rawsource)]


def setup(app: Sphinx) -> ExtensionMetadata:
    """Trim each page after Sphinx has read it."""
    app.connect("doctree-read", trim)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
