"""Write the gold pages again after a change that is meant: python -m tests.report_page.gold

A gold page is the page of the run in `run_files`, without scripts and styles, and without version and date.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path

from solotune.report_page.build import comparison_page, run_page
from solotune.report_page.pages import Page
from solotune.report_page.render import render
from tests.report_page.run_files import CONFIG, EVALUATION, write_run

GOLD = Path(__file__).parent / "gold"


def pages(folder: Path) -> dict[str, str]:
    """Name -> the text of a page, made in an empty folder."""
    first = write_run(folder / "first")
    row_losses = {**EVALUATION["row_losses"], "tuned": [8.0] * 8}
    evaluation = {**EVALUATION, "tuned": {"loss": 0.8, "stderr": 0.04}, "row_losses": row_losses}
    config = CONFIG.replace("nf4  # run.yaml line 2", "bf16  # command line")
    second = write_run(folder / "second", config=config, evaluation=evaluation)
    return {"run.html": _text(run_page(first)), "comparison.html": _text(comparison_page(first, second))}


def _text(page: Page) -> str:
    html = render(dataclasses.replace(page, version="X.Y.Z", written="a day"))
    html = re.sub(r"<style>.*?</style>", "<style></style>", html, flags=re.DOTALL)
    html = re.sub(r"<script>.*?</script>", "<script></script>", html, flags=re.DOTALL)
    return re.sub(r"'sha256-[^']*'", "'sha256-X'", html)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        for name, text in pages(Path(folder)).items():
            (GOLD / name).write_text(text, encoding="utf-8")
