"""Fixtures for the tests of rules on rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.dataset.conftest import Writer, _nothing_is_kept, smollm2, write  # noqa: F401 - fixtures
from tests.diagnosis.probed_models import tokenizer_at
from tests.diagnosis.rules.rows import Bench


@pytest.fixture
def bench(write: Writer, tmp_path: Path) -> Bench:  # noqa: F811 - the fixture
    folder = tmp_path / "model"
    folder.mkdir()
    return Bench(write, folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of batches made by hand (`batches`): the padding is another token than the end of turn."""
    found = copy.deepcopy(tokenizer_at(tmp_path_factory.getbasetemp() / "ward"))
    found.pad_token = "<|endoftext|>"
    return found
