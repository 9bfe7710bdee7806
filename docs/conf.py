"""Sphinx configuration: built with ``-W -n``, so a broken reference is an error."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tucka import __version__

project = "tucka"
author = "The tucka developers"
copyright = "2026, the tucka developers"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3

# Signatures show names and defaults; the docstrings give types with shapes.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
autosummary_generate = False  # numpydoc loads autosummary; the reference is ordered by hand

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True

html_theme = "furo"
html_title = f"tucka {version}"
html_static_path = ["_static"]
html_theme_options = {"navigation_with_keys": True}
