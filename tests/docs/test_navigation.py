"""The documentation can be found in: every page, every anchor, and the answers to twenty questions in two clicks."""

from __future__ import annotations

import re
import runpy

import pytest

from tests.docs.pages import DOCS, PAGES, ROOT, anchors, links

GENERATE = runpy.run_path(str(DOCS / "generate.py"))
HOME = DOCS / "index.md"
ONE_CLICK = links(HOME)
TWO_CLICKS = ONE_CLICK.union(*(links(page) for page in ONE_CLICK), {HOME})


def test_every_page_is_at_most_two_clicks_from_the_home_page():
    pages = {page for page in PAGES if page.parent != ROOT} | set((ROOT / "bench" / "results").glob("*.md"))
    assert len(pages) > 30
    assert pages - TWO_CLICKS == set()


def test_there_are_twenty_questions():
    questions = [one["question"] for one in GENERATE["questions"]()]
    assert len(set(questions)) == len(questions) == 20


@pytest.mark.parametrize("one", GENERATE["questions"](), ids=lambda one: one["question"])
def test_the_answer_to_a_question_is_two_clicks_from_the_home_page(one: dict[str, str]):
    page = (DOCS / one["page"]).resolve()
    assert page in TWO_CLICKS
    assert one["answer"]
    if one.get("anchor"):
        assert one["anchor"] in anchors(page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_anchors_of_links_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#:\s]*\.md|)#([^)]+)\)", text):
        linked = (page.parent / target).resolve() if target else page
        assert anchor in anchors(linked), (target, anchor)
