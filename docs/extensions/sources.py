"""Gives sphinx.ext.viewcode the places of classes and functions, and removes its links back.

Sphinx cannot read a module with ``**`` in the arguments of a decorator. Its links back lead nowhere for a name that is
documented under another module than the first name of the same file.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.util.typing import ExtensionMetadata

Tag = tuple[str, int, int]  # kind, first and last line
_BACK = re.compile(r'<a class="viewcode-back".*?</a>')


def places(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Tag]]:
    """Yield the name and the lines of each class and function, and of what is in a class."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            kind = "class" if isinstance(node, ast.ClassDef) else "def"
            yield prefix + node.name, (kind, first, node.end_lineno or first)
            if isinstance(node, ast.ClassDef):
                yield from places(node.body, f"{prefix}{node.name}.")


def find(_app: Sphinx, module: str) -> tuple[str, dict[str, Tag]]:
    """Return the text of a module and the places in it."""
    text = inspect.getsource(importlib.import_module(module))
    return text, dict(places(ast.parse(text).body))


def strip(_app: Sphinx, page: str, _template: str, context: dict[str, Any], _tree: Any) -> None:
    """Remove the links back from the page of a module."""
    if page.startswith("_modules/"):
        context["body"] = _BACK.sub("", context["body"])


def setup(app: Sphinx) -> ExtensionMetadata:
    """Answer viewcode's questions."""
    app.setup_extension("sphinx.ext.viewcode")  # its events
    app.connect("viewcode-find-source", find)
    app.connect("html-page-context", strip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
