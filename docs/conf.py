"""Sphinx's settings. `docs/build.py` copies this file to where it gathers the pages, and builds them strictly."""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import lightning_prune

project = "lightning_prune"
author = "the authors of lightning_prune"
version = release = lightning_prune.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
needs_sphinx = "8.0"

# pages
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = (
    "off"  # notebooks carry their outputs; `notebooks/execute.py` makes them, a test runs them
)
nb_merge_streams = True
copybutton_prompt_text = ">>> |$ "
copybutton_prompt_is_regexp = False

# the reference
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autoclass_content = "class"
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Shapes", "returns_style")]

# looks: nothing is fetched when a page is read
html_theme = "furo"
html_title = "lightning_prune"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "sidebar_hide_name": False,
    "light_css_variables": {"color-brand-primary": "#14746f", "color-brand-content": "#14746f"},
    "dark_css_variables": {"color-brand-primary": "#5fc9b8", "color-brand-content": "#5fc9b8"},
}
pygments_style = "a11y-light"
pygments_dark_style = "a11y-dark"

SPECIAL = re.compile(r"(?<!\\)([|*])")
TRAILING = re.compile(r"(?<=\w)_(?!\w)")
CODE = re.compile(r"`([^`]+)`")
EXAMPLE = re.compile(r"^\s*(Example|Examples):$")
LABEL = re.compile(r"^(Cost|When): ")


def as_rst(line: str) -> str:
    """Return a line of a docstring, which is plain text with code in single backticks, as reStructuredText."""
    pieces = CODE.split(line)
    texts = [TRAILING.sub(r"\\_", SPECIAL.sub(r"\\\1", text)) for text in pieces[::2]]
    codes = [_as_code(code) for code in pieces[1::2]] + [""]
    joined = "".join(text + code for text, code in zip(texts, codes, strict=True))
    return LABEL.sub(r"**\1:** ", joined)


def _as_code(code: str) -> str:
    return f":py:obj:`~lightning_prune.{code}`" if code in lightning_prune.__all__ else f"``{code}``"


def process_docstring(app, what, name, obj, options, lines):
    """Let Sphinx read the docstrings as they are written; napoleon sees them afterwards."""
    in_example = in_label = False
    for at, line in enumerate(lines):
        if EXAMPLE.match(line):
            in_example = True
        elif line and not line.startswith(" "):
            in_example = False
        in_label = bool(line) and (in_label or bool(LABEL.match(line)))
        if not in_example:
            lines[at] = as_rst(line.lstrip() if in_label else line)  # "When:" is a paragraph, indented or not


def setup(app):
    app.connect("autodoc-process-docstring", process_docstring, priority=100)  # before napoleon, at 500
