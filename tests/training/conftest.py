"""The fault campaign's run, for the tests of resume and verify."""

from tests.faults.conftest import work, workload

__all__ = ["work", "workload"]
