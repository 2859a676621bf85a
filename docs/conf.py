"""How Sphinx builds these pages: `make docs`."""

import re
import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from record_schema import schema_tables

project = "ddpm-lab"
author = copyright = "the ddpm-lab authors"
version = release = installed("ddpm-lab")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
extensions += ["sphinx-mathjax-offline"]  # formulas that can be read without a network
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"ddpm-lab {version}"
exclude_patterns = ["_build"]


def _offer_files(app, docname, source):
    """Links to files outside the documentation, which work in the repository, become downloads in the pages."""
    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./(?!README)[^)#]+)\)", r"{download}`\1 <\2>`", source[0])


def _insert_schema(app, docname, source):
    """The page of the score record shows the tables made from its types."""
    if docname == "record":
        source[0] = source[0].replace("<!-- schema -->", schema_tables())


def setup(app):
    app.connect("source-read", _offer_files)
    app.connect("source-read", _insert_schema)
