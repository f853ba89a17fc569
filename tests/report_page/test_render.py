"""What makes a page safe and self-contained: its policy, its scripts, and uPlot as it was published."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources
from pathlib import Path

from solotune.report_page.build import build_page
from tests.report_page.run_files import write_run

UPLOT = resources.files("solotune.report_page") / "vendor" / "uplot"


def test_uplot_is_what_npm_has() -> None:
    source = json.loads((UPLOT / "SOURCE.json").read_text())
    for name, sha256 in source["sha256"].items():
        assert hashlib.sha256((UPLOT / name).read_bytes()).hexdigest() == sha256, name
    assert f"(v{source['version']})" in (UPLOT / "uPlot.iife.min.js").read_text()[:200]


def test_the_policy_lets_these_scripts_run_and_no_other(tmp_path: Path) -> None:
    page = build_page(write_run(tmp_path / "run"))
    (allowed,) = re.findall(r"script-src ([^\"]*)\"", page)
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert allowed.split() == [f"'sha256-{one}'" for one in hashes] and len(scripts) == 2
    assert "onclick=" not in page and "javascript:" not in page


def test_the_licence_of_uplot_goes_with_the_page(tmp_path: Path) -> None:
    page = build_page(write_run(tmp_path / "run"))
    assert "Leon Sorokin" in page and "MIT" in page and "--" not in (UPLOT / "uPlot.LICENSE").read_text()
