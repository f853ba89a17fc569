"""A run is found by its path, its name, or as the latest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import solotune
from solotune.errors import InputError
from solotune.training.trained_run import TunedRun

ROWS = [{"prompt": f"twice {i} is", "completion": f" {2 * i}"} for i in range(20)]


def test_a_run_is_found_by_its_name_or_as_the_latest(chat_config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name in ("first", "second"):
        solotune.train({**chat_config, "dataset": "rows.jsonl", "max_steps": 1, "output_dir": f"runs/{name}"})
    for given, name in (("first", "first"), ("latest", "second"), ("runs/first", "first")):
        assert TunedRun.open(given).directory.path == Path("runs") / name
        assert solotune.verify(given).path == Path("runs") / name
    with pytest.raises(InputError, match="third: run not found"):
        TunedRun.open("third")
