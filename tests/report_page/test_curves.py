"""Curves that are small, true and whole: extremes stay, gaps stay, and a page that is open gets only what is new."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from solotune.report_page.curves import MAX_BUCKETS, bucket_extremes, curves, of_events, smoothed
from solotune.run.events import DiagnosedEvent, to_line
from tests.report_page.run_files import events, start, step, write_run


def test_a_long_curve_keeps_its_extremes_its_ends_and_its_gaps() -> None:
    values = np.random.default_rng(0).normal(size=200_000)
    values[123_456], values[77_777] = 50.0, np.nan
    kept = bucket_extremes(values)
    assert len(kept) <= 2 * MAX_BUCKETS + 3 and (np.diff(kept) > 0).all()
    assert {0, 199_999, 123_456, 77_777} <= set(kept.tolist())
    for bucket in np.array_split(np.arange(200_000), 200):  # coarser ones have the extremes of their buckets
        inside = kept[(kept >= bucket[0]) & (kept <= bucket[-1])]
        assert np.nanmax(values[inside]) >= np.nanpercentile(values[bucket], 98)
    assert bucket_extremes(values[:100]).tolist() == list(range(100))
    assert bucket_extremes(np.full(50_000, np.nan)).size <= MAX_BUCKETS + 2


def test_curves_of_200_000_steps_stay_below_two_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one column as large as columns get; a run has ten."""
    values = np.random.default_rng(0).normal(size=200_000)
    kept = bucket_extremes(values)
    text = json.dumps({"steps": (kept + 1).tolist(), "values": [float(f"{value:.6g}") for value in values[kept]]})
    assert 10 * len(text) < 4_000_000


def test_every_point_is_a_step_that_was_logged() -> None:
    found = of_events(events())
    assert found["last_step"] == 12 and found["series"]["loss"]["steps"] == list(range(1, 13))
    assert found["series"]["loss"]["values"][0] == float(f"{1 + math.exp(-0.25):.6g}")
    assert found["series"]["held_out"] == {"steps": [6, 12], "values": [1.3, 1.0], "stderr": [0.06, 0.05]}
    assert json.dumps(found, allow_nan=False)


def test_what_is_not_finite_is_a_gap() -> None:
    found = of_events([step(1), step(2, loss=math.nan, grad_norm=math.inf, peak_bytes=0), step(3)])
    assert found["series"]["loss"]["values"][1] is None and found["series"]["grad_norm"]["values"][1] is None
    assert found["series"]["peak_bytes"]["values"] == [2147480000.0, None, 2147480000.0]
    assert found["series"]["smoothed_loss"]["values"][1] is None and found["non_finite"] == [2]
    assert of_events([step(1, token_accuracy=math.nan)])["series"].keys().isdisjoint({"token_accuracy"})


def test_a_step_that_was_logged_twice_counts_as_logged_last() -> None:
    found = of_events([step(2), step(1), step(2, loss=7.0)])
    assert found["series"]["loss"]["steps"] == [1, 2] and found["series"]["loss"]["values"][1] == 7.0


def test_the_average_starts_unbiased_and_follows() -> None:
    averaged = smoothed(np.array([4.0] * 50 + [2.0] * 50))
    assert averaged[0] == averaged[49] == pytest.approx(4.0) and averaged[99] == pytest.approx(2.0, abs=1e-3)
    assert 2.5 < averaged[51] < 4


def test_a_page_that_is_open_gets_what_is_new(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", logged=[start(), step(1)])
    first = curves(run)
    assert first["series"]["loss"]["steps"] == [1] and not first["restarted"]
    assert curves(run, first["next"])["series"] == {}
    line = to_line(step(2))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line[:30])
    torn = curves(run, first["next"])
    assert torn["series"] == {} and torn["next"] == first["next"]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line[30:])
    assert curves(run, torn["next"])["series"]["loss"]["steps"] == [2]


def test_a_log_that_was_cut_back_is_read_from_its_beginning(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    whole = curves(run)
    (run / "metrics.jsonl").write_text(to_line(start()) + to_line(step(1)))
    again = curves(run, whole["next"])
    assert again["restarted"] and again["series"]["loss"]["steps"] == [1]
    assert curves(tmp_path / "nothing")["series"] == {}


def test_findings_since_a_byte_are_counted(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(to_line(step(1)) + to_line(DiagnosedEvent("F65", "invariant", "x")))
    found = curves(tmp_path)
    assert (found["findings"], curves(tmp_path, found["next"])["findings"]) == (1, 0)
