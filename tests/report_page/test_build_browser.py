"""Pages in headless Chromium: `sh scripts/test_browser` runs these, and installs what they need."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from solotune.report_page.build import build_comparison, build_page
from solotune.run.events import EvalEvent, Event, NonFiniteEvent
from tests.report_page.run_files import EVALUATION, events, start, step, write_run

pytestmark = pytest.mark.browser
STEPS = 200_000
TRACED = ["toplevel", "devtools.timeline", "disabled-by-default-devtools.timeline"]
WIDTHS = ((1280, "light"), (768, "dark"), (375, "light"), (375, "dark"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=os.environ["SOLOTUNE_CHROMIUM"], args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> the file of a page."""
    folder = tmp_path_factory.mktemp("pages")
    hostile = copy.deepcopy(EVALUATION)
    hostile["samples"][0] |= {
        "base": "<script>document.title='x'</script><img src=https://example.org/x>",
        "tuned": "שלום 👍",
    }
    nan: list[Event] = [start(), step(1), step(2, loss=math.nan), NonFiniteEvent(2, ["a:1"], "loss is NaN")]
    runs = {
        "whole": write_run(folder / "a-whole"),
        "hostile": write_run(folder / "b", evaluation=hostile),
        "nan": write_run(folder / "c", logged=nan, evaluation=None, diagnosis=None),
        "one step": write_run(folder / "d", logged=events()[:2], evaluation=None),
        "empty": write_run(
            folder / "e", logged=[], config="- no mapping", **dict.fromkeys(("data", "plan", "evaluation"))
        ),
    }
    made = {name: build_page(run) for name, run in runs.items()}
    made["comparison"] = build_comparison(runs["whole"], runs["nan"])
    for name, html in made.items():
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in made}


class Tab:
    """A page that is open, with what it said and asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light", **options: Any) -> None:
        size = {"width": width, "height": 900}
        self.context = browser.new_context(viewport=size, color_scheme=scheme, offline=True, **options)
        self.page = self.context.new_page()
        self.said, self.requests = list[str](), list[str]()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri(), wait_until="load")

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()

    def scroll_through(self) -> None:
        """So that every chart is drawn."""
        for top in range(0, self.page.evaluate("document.documentElement.scrollHeight"), 700):
            self.page.evaluate(f"scrollTo({{top: {top}, behavior: 'instant'}})")
            self.page.wait_for_timeout(50)
        self.page.evaluate("scrollTo({top: 0, behavior: 'instant'})")

    def violations(self) -> list[Any]:
        """What axe finds. It runs in a world of its own: the page's policy keeps foreign scripts out."""
        session = self.context.new_cdp_session(self.page)
        frame = session.send("Page.getFrameTree")["frameTree"]["frame"]["id"]
        world = session.send("Page.createIsolatedWorld", {"frameId": frame, "worldName": "axe"})
        where = {"contextId": world["executionContextId"]}
        axe = Path(os.environ["SOLOTUNE_AXE"]).read_text(encoding="utf-8")
        session.send("Runtime.evaluate", {"expression": axe, **where})
        scan = "axe.run(document).then(r => JSON.stringify([r.passes.length, r.violations.map(v => [v.impact, v.id, v.nodes.map(n => n.html.slice(0, 120))])]))"
        asked = {"expression": scan, "awaitPromise": True, "returnByValue": True, **where}
        passed, found = json.loads(session.send("Runtime.evaluate", asked)["result"]["value"])
        assert passed > 15  # it did scan
        return found


NAMES = ("whole", "hostile", "nan", "one step", "empty", "comparison")


@pytest.mark.parametrize("name", NAMES)
def test_a_page_says_nothing_and_asks_for_nothing(name: str, browser: Any, pages: dict[str, Path]) -> None:
    with Tab(browser, pages[name]) as tab:
        tab.scroll_through()
        assert (tab.said, tab.requests) == ([], [pages[name].as_uri()])
        assert tab.page.title() in ("a-whole", "b", "c", "d", "e", "a-whole against c")


def test_it_opens_offline_within_a_second(browser: Any, pages: dict[str, Path]) -> None:
    def milliseconds() -> float:
        with Tab(browser, pages["whole"]) as tab:
            return tab.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")

    assert min(milliseconds() for _ in range(3)) < 1000


@pytest.mark.parametrize(("width", "scheme"), WIDTHS)
@pytest.mark.parametrize("name", ["whole", "comparison"])
def test_axe_finds_no_issue_and_nothing_is_wider_than_the_window(
    name: str, width: int, scheme: str, browser: Any, pages: dict[str, Path]
) -> None:
    with Tab(browser, pages[name], width, scheme) as tab:
        tab.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        tab.scroll_through()
        if folder := os.environ.get("SOLOTUNE_SCREENSHOTS"):
            tab.page.screenshot(path=Path(folder) / f"{name}-{width}-{scheme}.png", full_page=True)
        assert tab.violations() == []
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width


def test_zoom_by_mouse_keys_and_buttons_moves_all_charts_and_hovering_tells_the_value(
    browser: Any, pages: dict[str, Path]
) -> None:
    with Tab(browser, pages["whole"]) as tab:
        chart = tab.page.locator("#chart-loss")
        chart.scroll_into_view_if_needed()
        other = tab.page.locator("#chart-learning_rate canvas")
        other.wait_for()
        drawn: Callable[[], str] = lambda: other.evaluate("canvas => canvas.toDataURL()")  # noqa: E731
        seen = [drawn()]

        def changed() -> bool:
            tab.page.wait_for_timeout(150)
            seen.append(drawn())
            return seen[-1] != seen[-2]

        chart.focus()
        tab.page.keyboard.press("+")
        assert changed()
        tab.page.keyboard.press("ArrowRight")
        assert changed()
        tab.page.keyboard.press("0")
        assert changed() and seen[-1] == seen[0]
        tab.page.click("[data-for=loss] [data-do=in]")
        assert changed()
        tab.page.click("[data-for=loss] [data-do=all]")
        assert changed() and seen[-1] == seen[0]
        box = chart.locator(".u-over").bounding_box()
        middle = box["y"] + box["height"] / 2
        tab.page.mouse.move(box["x"] + box["width"] * 0.2, middle)
        tab.page.mouse.down()
        tab.page.mouse.move(box["x"] + box["width"] * 0.6, middle, steps=4)
        tab.page.mouse.up()
        assert changed()
        tab.page.mouse.dblclick(box["x"] + 50, middle)
        assert changed() and seen[-1] == seen[0]
        tab.page.mouse.move(box["x"] + box["width"] * 0.5, middle)
        legend = chart.locator(".u-value").all_inner_texts()
        assert legend[0] == "6" and legend[1] == f"{1 + math.exp(-6 / 4):.4g}"
        assert tab.said == []


def test_without_scripts_and_on_paper_the_figures_are_there(browser: Any, pages: dict[str, Path]) -> None:
    with Tab(browser, pages["whole"], java_script_enabled=False) as tab:
        assert "The drawing needs JavaScript" in tab.page.inner_text("#curves")
        assert tab.page.locator("#curves table").count() == 3
    with Tab(browser, pages["whole"], scheme="dark") as tab:
        assert len(tab.page.pdf()) > 20_000 and tab.said == []


@pytest.fixture(scope="module")
def long_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 200,000 steps."""
    folder = tmp_path_factory.mktemp("long")
    logged: list[Event] = [start()]
    for number in range(1, STEPS + 1):
        noise = math.sin(number * 12.9898) * 43758.5453 % 1
        logged.append(
            step(
                number,
                total_steps=STEPS,
                loss=1 + math.exp(-number / 2e4) + noise,
                grad_norm=noise,
                step_seconds=1 + noise,
            )
        )
        if number % 1000 == 0:
            logged.append(EvalEvent(number, 0.5, 1.5 + math.exp(-number / 2e4), 0.02, 80))
    page = build_page(write_run(folder / "run", logged=logged))
    (folder / "long.html").write_text(page, encoding="utf-8")
    return folder / "long.html"


def test_of_a_run_of_200_000_steps_no_more_corners_are_drawn_than_a_chart_has_pixels(
    browser: Any, long_page: Path
) -> None:
    """Without this the next test passes on a fast machine: corners are what a frame takes its time for."""
    with Tab(browser, long_page) as tab:
        tab.page.locator("#chart-loss").scroll_into_view_if_needed()
        tab.page.click("[data-for=loss] [data-do=in]")
        tab.page.wait_for_timeout(300)
        count = """async () => {
          const isSeen = ({ top, bottom }) => bottom > -50 && top < innerHeight + 50;
          const seen = [...document.querySelectorAll(".plot")].filter((one) => isSeen(one.getBoundingClientRect()));
          const lineTo = Path2D.prototype.lineTo;
          let corners = 0, pixels = 0;
          for (const one of seen) pixels += one.clientWidth * JSON.parse(one.dataset.chart).lines.length;
          Path2D.prototype.lineTo = function (...at) { corners++; return lineTo.apply(this, at); };
          const how = { deltaY: 20, shiftKey: true, bubbles: true, cancelable: true };
          document.querySelector("#chart-loss").dispatchEvent(new WheelEvent("wheel", how));
          for (let i = 0; i < 5; i++) await new Promise(requestAnimationFrame);
          return [corners, pixels, seen.length];
        }"""
        corners, pixels, charts = tab.page.evaluate(count)
        print(f"{corners:,} corners in {charts} charts, whose lines have {pixels:,} pixels across")
        assert charts and pixels / 4 < corners <= pixels


def seconds_of_work(browser: Any) -> dict[str, float]:
    """Of the tracing that ends here: the processors' seconds for scripts, for the rest of the page's thread (styles,
    painting), and for drawing in other threads and processes. What they waited for a processor does not count."""
    traced = json.loads(browser.stop_tracing())["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in traced if e["name"] == "thread_name"}
    spent: dict[str, float] = {"scripts": 0.0, "page": 0.0, "drawing": 0.0}
    for event in traced:
        seconds = event.get("tdur", 0) / 1e6
        is_page = names.get((event["pid"], event["tid"])) == "CrRendererMain"
        if event["name"] in ("RunTask", "ThreadPool_RunTask"):
            spent["page" if is_page else "drawing"] += seconds
        elif event["name"] == "FireAnimationFrame":
            spent["scripts"] += seconds
    spent["page"] -= spent["scripts"]
    return spent


def test_a_run_of_200_000_steps_is_small_and_pans_at_30_frames_a_second(browser: Any, long_page: Path) -> None:
    """By the work for a frame, as if one processor did it all: that other programs keep it waiting does not count."""
    assert long_page.stat().st_size < 5_000_000
    frames = 90
    with Tab(browser, long_page) as tab:
        tab.page.locator("#chart-loss").scroll_into_view_if_needed()
        tab.page.click("[data-for=loss] [data-do=in]")
        tab.page.wait_for_timeout(300)
        pan = """async ([frames, pixels]) => {
          const chart = document.querySelector("#chart-loss"), begin = performance.now();
          for (let i = 0; i < frames; i++) {
            const how = { deltaY: i % 30 < 15 ? pixels : -pixels, shiftKey: true, bubbles: true, cancelable: true };
            if (pixels) chart.dispatchEvent(new WheelEvent("wheel", how));
            await new Promise(requestAnimationFrame);
          }
          return (1000 * frames) / (performance.now() - begin);
        }"""
        at_rest = tab.page.evaluate(pan, [frames, 0])
        browser.start_tracing(page=tab.page, categories=TRACED)
        rate = tab.page.evaluate(pan, [frames, 20])
        a_frame = {what: seconds / frames for what, seconds in seconds_of_work(browser).items()}
        said = ", ".join(f"{what} {1000 * seconds:.1f}" for what, seconds in a_frame.items())
        print(
            f"{long_page.stat().st_size:,} bytes; ms a frame: {said}; {rate:.0f} frames a second, {at_rest:.0f} at rest"
        )
        assert min(a_frame.values()) > 0 and sum(a_frame.values()) < 1 / 30 and tab.said == []
