"""Build the page of a run, or of two, from the files of the run directory.

    build_page("runs/demo")                       the HTML of one run
    build_comparison("runs/demo", "runs/other")   of two

Any run gives a page: finished, running, killed, of another version, with damaged files. A part that cannot be made says
what is missing.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from solotune.report_page.comparison import comparison_sections
from solotune.report_page.curves import read_run
from solotune.report_page.curves_section import curves_section
from solotune.report_page.data_section import data_section
from solotune.report_page.evaluation_section import evaluation_section, samples_section
from solotune.report_page.json_values import in_words
from solotune.report_page.pages import Page, Section
from solotune.report_page.render import render
from solotune.report_page.resources_section import resources_section
from solotune.report_page.settings_sections import config_section, environment_section, export_section
from solotune.report_page.verdict_section import verdict_section
from solotune.run.record import RunRecord
from solotune.run.run_dir import RunDirectory
from solotune.version import __version__


def build_page(run_dir: str | Path) -> str:
    """The HTML of `report.html` for the run in a folder."""
    return render(run_page(Path(run_dir)))


def build_comparison(first: str | Path, second: str | Path) -> str:
    """The HTML of a page that compares two runs."""
    return render(comparison_page(Path(first), Path(second)))


def run_page(path: Path) -> Page:
    """The page of one run, without HTML."""
    record, found = read_run(path)
    is_running = not record.is_finished and RunDirectory(path).is_locked()
    export = export_section(record)
    sections: list[Section] = [
        verdict_section(record, is_running),
        evaluation_section(record),
        samples_section(record),
        curves_section(record, found),
        resources_section(record, found),
        data_section(record),
        config_section(record),
        environment_section(record),
        *([export] if export else []),
    ]
    return _page(_name(path), _subtitle(record), sections, [found])


def comparison_page(first: Path, second: Path) -> Page:
    """The page of two runs, without HTML."""
    (record, found), (other, other_found) = read_run(first), read_run(second)
    names = [_name(first), _name(second)]
    if names[0] == names[1]:
        names = [str(first), str(second)]
    sections = comparison_sections((record, other), (found, other_found), (names[0], names[1]))
    return _page(f"{names[0]} against {names[1]}", "two runs compared", sections, [found, other_found])


def _page(title: str, subtitle: str, sections: list[Section], found: list[dict[str, object]]) -> Page:
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return Page(title, subtitle, tuple(sections), __version__, written, tuple(found))


def _name(path: Path) -> str:
    return path.resolve().name or str(path)


def _subtitle(record: RunRecord) -> str:
    """Base model and data, as far as config.yaml says."""
    named = ("model_name_or_path", ""), ("dataset", "on "), ("base_precision", "base in ")
    config = record.config or {}
    return " · ".join(f"{before}{in_words(config[key])}" for key, before in named if config.get(key) is not None)
