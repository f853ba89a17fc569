"""Fixtures for the tests of rules on rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dataset.conftest import Writer, _nothing_is_kept, smollm2, write  # noqa: F401 - fixtures
from tests.diagnosis.rules.rows import Bench


@pytest.fixture
def bench(write: Writer, tmp_path: Path) -> Bench:  # noqa: F811 - the fixture
    folder = tmp_path / "model"
    folder.mkdir()
    return Bench(write, folder)
