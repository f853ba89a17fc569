"""The whole page: as it was read through once (gold files), and of every run that is damaged, hostile or unfinished."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from solotune.evaluation.task_scores import score_tasks
from solotune.report_page.build import build_comparison, build_page, run_page
from solotune.report_page.verdict_section import AT_ITS_END, NO_DIAGNOSIS
from solotune.run.events import DeviceFailedEvent, DiagnosedEvent, EndEvent, NonFiniteEvent, ResumeEvent
from tests.evaluation.task_files import logged
from tests.report_page import gold, run_files
from tests.report_page.run_files import DATA, DIAGNOSIS, EVALUATION, events, start, step, write_run

FILES = ("data", "plan", "evaluation", "diagnosis", "environment", "fingerprints", "export")
JSON_FILES = {name: getattr(run_files, name.upper()) for name in FILES}


class Tags(HTMLParser):
    """Counts tags, and keeps the visible text and what attributes refer to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.text, self.references = "", list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def gold_pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return gold.pages(tmp_path_factory.mktemp("gold"))


@pytest.mark.parametrize("name", ["run.html", "comparison.html"])
def test_a_page_is_as_it_was_read_last(name: str, gold_pages: dict[str, str]) -> None:
    """A change that is meant: read it, then `python -m tests.report_page.gold`."""
    assert gold_pages[name] == (gold.GOLD / name).read_text(encoding="utf-8")


def test_the_parts_stand_in_their_order(tmp_path: Path) -> None:
    page = run_page(write_run(tmp_path / "run"))
    names = "verdict evaluation samples curves resources data config environment export"
    assert [section.name for section in page.sections] == names.split()
    assert not any(section.missing for section in page.sections)
    first = page.sections[0].blocks[0]
    assert first.kind == "callout" and first.tone == "bad"  # the culprit, before the better loss


def missing(folder: Path) -> str:
    """What the page of a run says in words is missing or wrong."""
    page = run_page(folder)
    build_page(folder)
    lines = [line for section in page.sections for line in section.missing]
    lines += [b.headline for section in page.sections for b in section.blocks if b.kind == "callout"]
    return "\n".join(lines)


STATES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "without evaluation": ({"evaluation": None}, ["There is no evaluation.json that can be read."]),
    "one step": ({"logged": [start(), step(1), EndEvent(1, 5)]}, ["Held-out loss was not measured during the run."]),
    "killed": (
        {"logged": events()[:5], "evaluation": None, "diagnosis": None},
        ["The run has not reached its evaluation", "Unfinished: the run ended after 4 of 12 steps", "No diagnosis"],
    ),
    "killed before its first step": (
        {"logged": [start()], "evaluation": None},
        ["Unfinished: the run ended before its first step", "No step was logged"],
    ),
    "nan": (
        {"logged": [start(), step(1), step(2, loss=math.nan), NonFiniteEvent(2, ["a:1"], "loss is NaN")]},
        ["Stopped after 2 of 12 steps", "NaN or infinite values at step 2"],
    ),
    "nan alone": (
        {"logged": [start(), step(1, loss=math.nan, grad_norm=math.inf)]},
        ["NaN or infinite values at step 1"],
    ),
    "out of memory": ({"logged": [start(), DeviceFailedEvent("out of memory", "7 GiB")]}, ["Stopped after 0 steps"]),
    "resumed": ({"logged": [start(), step(1), ResumeEvent(1, True, [], []), step(2)]}, ["Resumed after step 1"]),
    "of an older version": (
        {"evaluation": {"rows": 8, "base": {"loss": 2.0}, "tuned": {"loss": 1.0}, "difference": {"loss": -1.0}}},
        ["Held-out loss is lower than that of the base"],
    ),
    "with nothing but a config": (
        {"logged": [], **dict.fromkeys(FILES)},
        ["no data.json", "no environment.json", "No step was logged", "Neither plan.json nor a step"],
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_any_run_has_a_page_that_says_what_is_missing(state: str, tmp_path: Path) -> None:
    changes, expected = STATES[state]
    said = missing(write_run(tmp_path / "run", **changes))
    assert [line for line in expected if line not in said] == [], said


def test_a_torn_last_line_and_a_config_that_is_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", logged=events()[:4], config="- a list\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 4, "lo')
    said = missing(run)
    assert "ended after 3 of 12 steps" in said and "There is no config.yaml that can be read." in said


def swapped(content: Any, value: Any) -> Any:
    """The same JSON with every leaf replaced."""
    if isinstance(content, dict):
        return {key: swapped(item, value) for key, item in content.items()}
    return [swapped(item, value) for item in content] if isinstance(content, list) else value


@pytest.mark.parametrize(
    "value", [None, "text", -1e308, True, [], {}, [[1]], 10**400], ids=lambda value: repr(value)[:9]
)
def test_values_of_another_type_count_as_missing(value: Any, tmp_path: Path) -> None:
    build_page(
        write_run(tmp_path / "leaves", **{name: swapped(content, value) for name, content in JSON_FILES.items()})
    )
    tops = {name: dict.fromkeys(content, value) for name, content in JSON_FILES.items()}
    first = write_run(tmp_path / "tops", **tops)
    build_page(first)
    build_comparison(first, write_run(tmp_path / "whole"))
    build_page(write_run(tmp_path / "files", **dict.fromkeys(FILES, value)))


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7 * 7 }}\"' ]]> -->"


def hostile(content: Any, text: str) -> Any:
    """The same JSON with `text` behind every text in it, keys too."""
    if isinstance(content, dict):
        return {key: hostile(item, text) for key, item in content.items()}
    if isinstance(content, list):
        return [hostile(item, text) for item in content]
    return content + text if isinstance(content, str) else content


def test_markup_in_rows_answers_and_names_stays_text(tmp_path: Path) -> None:
    usual = Tags(build_page(write_run(tmp_path / "usual")))
    config = run_files.CONFIG + f"note: {json.dumps(HOSTILE)}  # default\n"
    files = {name: hostile(content, HOSTILE) for name, content in JSON_FILES.items()}
    files["diagnosis"] = {**files["diagnosis"], "verdict": "fault"}
    page = build_page(write_run(tmp_path / "<script>alert(3)<", config=config, **files))
    found = Tags(page)
    assert found.tags["script"] == usual.tags["script"] == 3 and found.tags["img"] == 0
    assert found.text.count("<img src=x onerror=alert(2)>{{ 7 * 7 }}") > 30 and "49" not in found.text.split("{{")[1]
    assert "Hello there<|im_end|></script><script>alert(1)" in found.text


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    page = build_page(write_run(tmp_path / "run"))
    references = Tags(page).references
    assert references and all(one.startswith(("#", "data:")) for one in references)
    assert "@import" not in page and "url(" not in page
    assert "default-src 'none'" in page


def test_long_rows_are_cut_with_a_note(tmp_path: Path) -> None:
    data, evaluation = copy.deepcopy(DATA), copy.deepcopy(EVALUATION)
    data["examples"][0]["pieces"][1]["text"] = "é" * 1_100_000
    evaluation["samples"][0]["base"] = "no " * 350_000
    page = build_page(write_run(tmp_path / "run", data=data, evaluation=evaluation))
    assert len(page.encode()) < 300_000
    assert "the first 4,000 of 1,050,000 characters" in page
    assert re.search(r"the first 4,000 of 1,100,0\d\d characters", page)


def test_a_metric_of_the_users_own_is_shown_as_the_number_it_is(tmp_path: Path) -> None:
    """Shares in percent, other numbers as they are."""
    evaluation = copy.deepcopy(EVALUATION)
    evaluation["scores"]["length"] = {
        "base": 12.0,
        "tuned": 7.5,
        "stderr": {"base": 0.5, "tuned": 0.25},
        "p_value": 0.2,
    }
    evaluation["tasks"] = [one.to_json() for one in score_tasks(*logged())]
    evaluation["tasks"] += ["torn", {"task": "torn"}]
    evaluation["tasks"].append({**evaluation["tasks"][0], "task": "t" * 250})
    evaluation["tasks"].append({**evaluation["tasks"][0], "task": "gsm8k", "filter": "strict-match"})
    said = Tags(build_page(write_run(tmp_path / "run", evaluation=evaluation))).text
    for figure in (
        "answer exact_match",
        "gsm8k acc (strict-match)",
        "100.0% ± 0.0",
        "+100.0 points",
        "0.0039, better",
        "0.1702 ± 0.0343",
        "not tested",
    ):
        assert figure in said, figure
    assert "torn" not in said and "(none)" not in said
    assert "t" * 200 in said and "t" * 201 not in said
    assert "7.5000 ± 0.2500" in said and "-4.5" in said and "750.0%" not in said
    assert "50.0% ± 18.0" in said and "+50.0 points" in said


def test_any_script_and_direction_is_shown_and_nothing_is_hidden(tmp_path: Path) -> None:
    evaluation = copy.deepcopy(EVALUATION)
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    evaluation["samples"][0] |= {"prompt": f"שלום {family}", "base": "a\u202eb\x00c", "tuned": "مرحبا"}
    page = build_page(write_run(tmp_path / "run", evaluation=evaluation))
    page.encode("utf-8")
    assert f'<div class="text" dir="auto">שלום {family}</div>' in page
    assert "مرحبا" in page and "a\ufffdb␀c<" in page


def test_a_run_that_is_being_written_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = [
        *events()[:5],
        DiagnosedEvent("F65", "invariant", "the rate <rises>"),
        DiagnosedEvent("F99", "remark", "new"),
    ]
    run = write_run(tmp_path / "run", logged=logged, diagnosis=None)
    monkeypatch.setattr("solotune.run.run_dir.RunDirectory.is_locked", lambda self: True)
    said = missing(run)
    assert "Running: 4 of 12 steps so far" in said and AT_ITS_END in said and NO_DIAGNOSIS not in said
    page = build_page(run)
    assert "F65 warmup-too-long: the rate &lt;rises&gt;" in page and ">new<" in page
    assert "Found while it trained" not in build_page(write_run(tmp_path / "over", logged=logged))


def test_a_run_of_several_ranks_says_so(tmp_path: Path) -> None:
    several = dataclasses.replace(start(), world_size=2)
    run = write_run(tmp_path / "run", logged=[several, *events()[1:]])
    assert "12 steps on 2 ranks" in build_page(run)
    tables = {block.caption: block.rows for section in run_page(run).sections for block in section.blocks
              if block.kind == "table"}  # fmt: skip
    assert {("Ranks", "2"), ("Memory", "16.0 GiB for each rank")} <= set(tables["Machine"])
    names = [row[0] for row in tables["Planned and measured"]]
    assert "Peak memory of rank 0" in names and "Tokens per second of all ranks, median" in names
    resumed = write_run(tmp_path / "resumed", logged=[several, ResumeEvent(6, False, [], []), *events()[1:]])
    assert "2, then 1 from step 7 on" in build_page(resumed) and "steps on" not in build_page(resumed)
    assert "ranks" not in build_page(write_run(tmp_path / "one")).lower()


def test_one_group_is_no_groups(tmp_path: Path) -> None:
    page = build_page(write_run(tmp_path / "run", evaluation={**EVALUATION, "groups": 1}))
    assert " in 1 group, the same" in page


VERDICTS: list[tuple[Callable[[dict[str, Any]], None], str, str]] = [
    (lambda found: found.update(verdict="healthy", culprits=[]), "good", "Diagnosis: no fault found"),
    (
        lambda found: found.update(verdict="healthy", culprits=[], not_checked=["x"]),
        "good",
        "Diagnosis: no fault found as far as was checked",
    ),
    (lambda found: found.update(verdict="undecided"), "warn", "Diagnosis: undecided; possible causes"),
    (lambda found: found.update(verdict="undecided", culprits=[]), "warn", "Diagnosis: undecided"),
]


@pytest.mark.parametrize(("change", "tone", "headline"), VERDICTS)
def test_the_diagnosis_is_said_as_it_is(change: Any, tone: str, headline: str, tmp_path: Path) -> None:
    diagnosis = copy.deepcopy(DIAGNOSIS)
    change(diagnosis)
    blocks = run_page(write_run(tmp_path / "run", diagnosis=diagnosis)).sections[0].blocks
    assert (tone, headline) in [(block.tone, block.headline) for block in blocks if block.kind == "callout"]
