"""Fixtures of the dataset tests, for held-out rows that are prepared from a file."""

from tests.dataset.conftest import write

__all__ = ["write"]
