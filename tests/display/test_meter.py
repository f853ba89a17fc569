"""Loss, speed and time left from single steps."""

from __future__ import annotations

import pytest

from solotune.display.meter import Meter
from tests.display.test_progress import metrics


def test_time_left_and_speed_ignore_the_slow_first_step():
    meter = Meter()
    meter.add(metrics(1, step_seconds=300.0))
    assert (meter.seconds_left, meter.tokens_per_second) == (None, None)
    meter.add(metrics(2))
    meter.add(metrics(3))
    assert meter.seconds_left == 2.0 * 97
    assert meter.tokens_per_second == 500


def test_after_a_resume_the_first_step_seen_is_the_slow_one():
    meter = Meter()
    meter.add(metrics(51, step_seconds=300.0))
    meter.add(metrics(52))
    assert meter.seconds_left == 2.0 * 48


def test_printed_loss_is_per_supervised_token_by_weight_since_the_last_line():
    meter = Meter()
    meter.add(metrics(1, loss=1.0, total_weight=300.0))
    meter.add(metrics(2, loss=5.0))
    assert meter.take_loss() == 2.0
    meter.add(metrics(3, loss=7.0))
    assert meter.take_loss() == 7.0


def test_the_loss_of_the_live_line_is_that_of_the_next_line():
    meter = Meter()
    meter.add(metrics(1, loss=4.0, total_weight=100.0))
    meter.add(metrics(2, loss=1.0, total_weight=100.0))
    assert meter.loss == pytest.approx(2.5)
    assert meter.take_loss() == meter.loss == pytest.approx(2.5)  # until the next step
    meter.add(metrics(3, loss=1.0, total_weight=100.0))
    assert meter.loss == 1.0
