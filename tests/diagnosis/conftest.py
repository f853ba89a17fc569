"""Budgets of probes are spent by the processor's clock: what else runs on the machine must not decide what is asked."""

from __future__ import annotations

import time

import pytest

from tests.dataset.conftest import kept, write  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def clock_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probes ask `time.perf_counter`."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
