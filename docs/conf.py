"""How Sphinx makes a site of these pages and of the docstrings: ``make docs``, into build/docs.

Pages are the Markdown files as they are; what they link to outside of this folder must exist, and
is named in the site, not linked. A warning is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import edet_kernels

DOCS = Path(__file__).resolve().parent

project = "edet-kernels"
version = release = edet_kernels.__version__
copyright = "the authors of edet-kernels, Apache-2.0"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "index"
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
highlight_language = "none"  # of indented blocks; the others say theirs
myst_heading_anchors = 3

html_theme = "pydata_sphinx_theme"
html_title = project
html_show_sourcelink = False
html_theme_options = {"secondary_sidebar_items": ["page-toc"], "navigation_with_keys": False}

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style")]  # named, not documented once more

_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./[^)#]+)[^)]*\)")
_IMAGE = re.compile(r"!\[[^\]]*\]\((\.\./[^)]+)\)")


def name_files_outside(app: Any, page: str, source: list[str]) -> None:
    """Turns links to files outside of docs/ into their names.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def named(match: re.Match[str]) -> str:
        path = (DOCS / match[2]).resolve()
        if not path.exists():
            raise FileNotFoundError(f"{page} links to {match[2]}, which does not exist")
        return f"`{path.relative_to(DOCS.parent)}`"

    for match in _IMAGE.finditer(source[0]):
        if not (DOCS / match[1]).exists():
            raise FileNotFoundError(f"{page} shows {match[1]}, which does not exist")
    source[0] = _OUTSIDE.sub(named, source[0])


def setup(app: Any) -> None:
    """Registers what is done to a page before it is read."""
    app.connect("source-read", name_files_outside)
