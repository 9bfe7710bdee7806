"""Sphinx configuration. The site is built with ``-W -n``, so a broken reference is an error."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extensions")]
os.environ["HF_HUB_OFFLINE"] = "1"
# Without this, the tutorials' output would contain progress bars.
os.environ["TQDM_DISABLE"] = "1"

from numpydoc.xref import DEFAULT_LINKS  # noqa: E402

from tucka import __version__  # noqa: E402

project = "tucka"
author = "The tucka developers"
copyright = "2026, the tucka developers"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "numpydoc",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "doctest_blocks",
    "figures",
    "mathml",
    "sources",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "lessons", "inventories", "sg_execution_times.rst"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

# Signatures show names and defaults; the docstrings give types with shapes.
autodoc_typehints = "none"
# Single backquotes of a docstring are links where they name an object, and code elsewhere. A name without a dot may be
# an argument or an attribute, which has no entry of its own.
default_role = "autolink"
nitpick_ignore_regex = [("py:obj", r"\w+")]
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
autosummary_generate = False  # summaries are tables on top of pages that are ordered by hand
python_maximum_signature_line_length = 88  # a longer one has a line for each argument

# Small text inventories list the names of other packages that pages and docstrings mention. Links are then the same
# everywhere, and a build needs no network. A name that no inventory lists fails the build: add a line for it.
intersphinx_mapping = {
    name: (site, f"inventories/{name}.txt")
    for name, site in {
        "python": "https://docs.python.org/3",
        "numpy": "https://numpy.org/doc/stable",
        "torch": "https://docs.pytorch.org/docs/stable",
        "tensorly": "https://tensorly.org/stable",
        "peft": "https://huggingface.co/docs/peft/main/en",
        "transformers": "https://huggingface.co/docs/transformers/main/en",
    }.items()
}
# The types in docstrings that become links.
numpydoc_xref_param_type = True
numpydoc_xref_ignore = "all"
numpydoc_xref_aliases = {
    **{name: name for name in DEFAULT_LINKS},  # `int` and the like stay as they are
    "Tensor": "torch.Tensor",
    "Parameter": "torch.nn.parameter.Parameter",
    "Module": "torch.nn.Module",
    "Path": "pathlib.Path",
    "numpy.ndarray": "numpy.ndarray",
    "TuckerSpec": "tucka.TuckerSpec",
    "TuckerExperts": "tucka.TuckerExperts",
    "TuckAConfig": "tucka.peft.TuckAConfig",
    **{
        name: f"tucka.{name}"
        for name in (
            "ArrayError",
            "CheckpointError",
            "ConfigError",
            "KeywordError",
            "RouteError",
            "ShapeError",
            "TuckaError",
        )
    },
}

sphinx_gallery_conf = {
    "examples_dirs": "lessons",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("lesson_figures.scrape",),
    "reset_modules": ("matplotlib", "lesson_figures.restyle"),
    "doc_module": ("tucka",),
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
    "thumbnail_size": (320, 224),
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True

html_theme = "furo"
html_title = f"tucka {version}"
html_static_path = ["_static"]
html_css_files = ["tucka.css"]
html_favicon = "_static/favicon.svg"
html_theme_options = {"navigation_with_keys": True}
