"""Fixtures of the command line's tests."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest

main_module = importlib.import_module("solotune.cli.main")  # `cli.main` is the function


@pytest.fixture(autouse=True)
def libraries_stay_as_they_are(monkeypatch) -> None:
    """What `main` silences would stay silent in the tests that follow."""
    monkeypatch.setattr(main_module, "quieten", lambda: None)


@pytest.fixture
def verbs(monkeypatch) -> Any:
    """Each test gives it the functions to be called in the place of verbs: `verbs.runs = ...`."""

    class Stubs:
        def __setattr__(self, name: str, function: object) -> None:
            monkeypatch.setitem(sys.modules, f"solotune.api.{name}", SimpleNamespace(**{name: function}))

    return Stubs()
