"""Sphinx: `make docs` builds these pages into build/docs and fails on a broken reference."""

project = "fused_rec"
author = "the fused_rec developers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = project
exclude_patterns = ["figures"]
nb_execution_mode = "off"  # notebooks are shown as they are stored; `make notebooks` runs them
autosummary_generate = True
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # shapes stand in the signatures
autodoc_preserve_defaults = True


def setup(app):
    """Docstrings are plain text: shown as they stand, and not read as reStructuredText."""
    app.connect("autodoc-process-docstring", _as_it_stands)


def _as_it_stands(app, what, name, obj, options, lines):
    lines[:] = ["::", "", *(f"   {line}" for line in lines), ""]
