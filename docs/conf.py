"""The site of these pages and of those beside README.md: ``make docs`` builds it, and every warning is an error.

Its sidebar is docs/index.md: a part for each heading, with the pages that are linked below it.
"""

import re

from sphinx.application import Sphinx

project = "distill"
copyright = "Apache-2.0"
extensions = ["myst_parser"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md"]
exclude_patterns = [".*", "build", "distill", "recipes", "runs", "students", "teacher", "tests"]
exclude_patterns += ["docs/_build", "docs/bench"]
templates_path = ["_templates"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "distill"
html_copy_source = False
html_additional_pages = {"index": "to_docs.html"}  # the address of the site itself
pygments_style = "friendly"
highlight_language = "text"  # of blocks without a language, which show commands and output
smartquotes = False  # options begin with two hyphens


def _with_sidebar(_: Sphinx, name: str, source: list[str]) -> None:
    """Adds hidden tables of contents to the index: one for each heading, of the pages below it."""
    if name != root_doc:
        return
    title, *parts = re.split(r"^## (.+)$", source[0], flags=re.MULTILINE)
    text = [title]
    for heading, part in zip(parts[::2], parts[1::2], strict=True):
        pages = re.findall(r"\]\(([^)#]+)\.md\)", part)
        pages = [f"/{page[3:]}" if page.startswith("../") else page for page in pages]
        listed = "\n".join(pages)
        text.append(
            f"## {heading}{part}\n```{{toctree}}\n:hidden:\n:caption: {heading}\n\n{listed}\n```\n\n"
        )
    source[0] = "".join(text)


def setup(app: Sphinx) -> None:
    """Registers what is done to the text of a page before it is read."""
    app.connect("source-read", _with_sidebar)
