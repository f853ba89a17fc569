"""Settings of Sphinx for the documentation site: docs/, the measurements in bench/results/, SECURITY.md, CHANGELOG.md.

    sh scripts/docs

The source folder is the repository, so links between pages are the same files on the site and in a checkout. The lists
of links on the pages of NAVIGATION are the site's navigation too, and the only place where it is written down.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

project = "solotune"
author = "the solotune authors"
copyright = "the solotune authors, Apache-2.0"

root_doc = "docs/index"
include_patterns = ["docs/**.md", "bench/results/**.md", "SECURITY.md", "CHANGELOG.md"]
exclude_patterns = [
    ".*",
    "src",
    "tests",
    "scripts",
    "runs",
    "site",
    "build",
    "dist",
    "bench/diagnose",
    "docs/migrate",
    "**/__pycache__",
]
extensions = ["myst_parser"]
myst_heading_anchors = 3
nitpicky = True

html_theme = "furo"
html_title = "solotune"
html_static_path = ["_static"]
html_css_files = ["solotune.css"]
html_copy_source = html_show_sourcelink = html_use_index = False
html_additional_pages = {"index": "redirect.html"}
templates_path = ["_templates"]
pygments_style = "friendly"
pygments_dark_style = "monokai"

NAVIGATION = ("docs/index", "docs/commands/index", "docs/benchmarks")
LINK = re.compile(r"^- \[([^\]]+)\]\(([^)#:]+)\.md\)", re.MULTILINE)


def add_navigation(_app: Any, docname: str, source: list[str]) -> None:
    """Add a hidden toctree for each list of links; the headings of the home page become the sections of the sidebar."""
    if docname not in NAVIGATION:
        return
    parts = re.split(r"^## (.+)$", source[0], flags=re.MULTILINE)
    trees = []
    for caption, text in zip(["", *parts[1::2]], parts[::2], strict=True):
        options = f":caption: {caption}\n" if caption and docname == root_doc else ""
        if pages := [f"{title} <{page}>" for title, page in LINK.findall(text)]:
            trees.append(f"```{{toctree}}\n:hidden:\n{options}\n" + "\n".join(pages) + "\n```\n")
    source[0] += "\n\n" + "\n".join(trees)


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", add_navigation)
    return {"version": Path(__file__).name, "parallel_read_safe": True}
