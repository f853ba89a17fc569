"""A page as one HTML file: nothing in it is loaded from elsewhere, and no text out of data becomes markup.

Three things keep data from becoming code. Jinja2 escapes every value (autoescape), characters that hide or reorder text
become visible signs first, and the page's own policy (Content-Security-Policy) lets only the two scripts run whose
hashes it names, and lets nothing be loaded or sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from solotune.report_page.pages import Page
from solotune.units import escape_terminal

UPLOT = "vendor/uplot"


def render(page: Page) -> str:
    """The HTML of a page."""
    scripts = {"uplot_js": packaged(f"{UPLOT}/uPlot.iife.min.js"), "charts_js": packaged("templates/charts.js")}
    return _environment().get_template("page.html").render(
        page=page,
        page_css=Markup(packaged("templates/page.css")),
        uplot_css=Markup(packaged(f"{UPLOT}/uPlot.min.css")),
        uplot_licence=Markup(packaged(f"{UPLOT}/uPlot.LICENSE")),
        uplot_version=json.loads(packaged(f"{UPLOT}/SOURCE.json"))["version"],
        script_hashes=Markup(" ".join(policy_hash(script) for script in scripts.values())),
        **{name: Markup(script) for name, script in scripts.items()},
    )  # fmt: skip


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: packaged(f"templates/{name}")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _visible(value: Any) -> Any:
    """Text without characters that hide or reorder others; what is HTML already stays."""
    return escape_terminal(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def packaged(name: str) -> str:
    return resources.files("solotune.report_page").joinpath(name).read_text(encoding="utf-8")


def policy_hash(script: str) -> str:
    """As the policy names a script: the sha256 of its text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
