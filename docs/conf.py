"""Sphinx: `make docs` builds these pages into build/docs and fails on a broken reference."""

import re

project = "fused_rec"
author = "the fused_rec developers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = project
exclude_patterns = ["figures"]
nb_execution_mode = "off"  # notebooks are shown as they are stored; `make notebooks` runs them
autosummary_generate = True
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"  # shapes and dtypes stand there
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of a NamedTuple are members too, and would be listed twice
# Names of dimensions in annotations are read as references, and some are fields of several classes.
suppress_warnings = ["ref.python"]
default_role = "code"  # docstrings write `name`, as Markdown does


_SECTION = re.compile(r"(Args|Attributes|Example|Examples|Note|Notes|Raises|References|Returns|Warns|Yields):\s*$")
_LIST_ITEM = re.compile(r"([-*]|\d+\.) ")


def setup(app):
    """Registers `_as_markup` before napoleon (priority 500) reads the sections."""
    app.connect("autodoc-process-docstring", _as_markup, priority=400)


def _as_markup(app, what, name, obj, options, lines):
    """Makes reStructuredText of docstrings: indented blocks outside of sections are literal, names are escaped."""
    converted, open_block, literal = [], True, False
    for line in lines:
        if line.strip() and not line.startswith(" "):
            starts_list = bool(_LIST_ITEM.match(line)) and open_block
            converted += [""] * (literal or starts_list)
            open_block, literal = not (_SECTION.match(line) or _LIST_ITEM.match(line)), False
        elif line.strip() and open_block and not literal:
            converted += ["", "::", ""]
            literal = True
        converted.append(line if literal else _escaped(line))
    if literal:
        converted.append("")
    lines[:] = converted


def _escaped(line):
    """Escapes what reStructuredText would read as markup outside of `code`: |x|, x_, *args, x*."""
    pieces = re.split(r"(``[^`]*``|`[^`]*`)", line)
    pieces[::2] = [re.sub(r"[|*]|(?<=\w)_(?!\w)", r"\\\g<0>", text) for text in pieces[::2]]
    return "".join(pieces)
