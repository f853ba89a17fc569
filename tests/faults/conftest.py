"""One small run for all fault tests, warm in this process; each test forks it."""

from __future__ import annotations

import os

import pytest

from bench.faults_run import Workload
from tests.faults.damaged_models import at_door, sharded  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def workload(tmp_path_factory):
    """The run of the campaign, measured."""
    before = os.environ.get("XDG_CACHE_HOME")
    work = Workload(tmp_path_factory.mktemp("faults").resolve())
    work.measure()
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before
    return work


@pytest.fixture
def work(workload):
    """The same, with nothing of an earlier test left."""
    workload.clear()
    workload.forget()
    return workload
