"""Writes formulas as MathML, which browsers draw without a script, a font or a network.

docutils translates the formulas. A wrong formula is a warning, and a warning stops the build.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata
    from sphinx.writers.html5 import HTML5Translator

_logger = logging.getLogger(__name__)
_UNBRACED = re.compile(r"frac\s*[0-9a-zA-Z]")


def _mathml(node: nodes.math | nodes.math_block, *, as_block: bool) -> str:
    latex = node.astext()
    if _UNBRACED.search(latex):  # docutils reads \frac12 as a fraction with the numerator 12
        _logger.warning("formula: expected braces around both parts of a fraction in %s", latex, location=node)
    try:
        return tex2mathml(latex, as_block=as_block)
    except MathError as error:
        _logger.warning("formula: %s in %s", error, latex, location=node)
        return f"<code>{latex}</code>"


def visit_inline(translator: HTML5Translator, node: nodes.math) -> None:
    """Write a formula inside a line of text."""
    translator.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def visit_block(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write a formula as a block of its own, with its number if it has one."""
    translator.body.append(translator.starttag(node, "div", "", CLASS="math"))
    if node["number"]:
        translator.body.append(f'<span class="eqno">({get_node_equation_number(translator, node)})')
        translator.add_permalink_ref(node, "Link to this equation")
        translator.body.append("</span>")
    translator.body.append(_mathml(node, as_block=True))
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> ExtensionMetadata:
    """Add the renderer ``mathml``."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
