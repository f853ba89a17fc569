"""Configs as Python callers write them: keys as arguments, rows and datasets instead of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import solotune
from solotune.api.python_config import config_of
from solotune.errors import InputError

ROWS = [{"prompt": f"{n} + {n} =", "completion": f" {2 * n}"} for n in range(12)]
PLAIN = {"model_name_or_path": "m", "dataset": "d.jsonl"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_keys_win_over_overrides_and_the_config():
    config = config_of({**PLAIN, "lora_r": 4}, ["lora_r=8", "seed=1"], {"lora_r": 2})
    assert (config.lora_r, config.seed, config.source_of("lora_r")) == (2, 1, "python")
    assert config_of(PLAIN, {"lora_r": 8}).lora_r == 8
    assert config_of(config, keys={"lora_r": 3}).lora_r == 3
    with pytest.raises(InputError, match="lora_rr: unknown key"):
        config_of(PLAIN, keys={"lora_rr": 3})


def test_rows_become_one_file_per_content():
    first, second = (config_of({**PLAIN, "dataset": ROWS}).dataset for _ in range(2))
    assert isinstance(first, str) and first == second
    assert [json.loads(line) for line in Path(first).read_text().splitlines()] == ROWS
    other = config_of(PLAIN, keys={"dataset": ROWS[:-1], "eval_dataset": ROWS[-1:]})
    assert other.dataset != first and Path(str(other.eval_dataset)).is_file()
    assert len(list(Path(first).parent.iterdir())) == 3
    assert config_of({**PLAIN, "dataset": ["a.jsonl", "b.jsonl"]}).dataset == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "a", "completion": "b"}, ["no dict"]], "dataset: row 1 is no dict"),
        ([{"prompt": "a", "completion": object()}], "dataset: row 0 cannot be written as JSON"),
        ([{"prompt": "a", "score": float("nan")}], "dataset: row 0 cannot be written as JSON"),
        (5, "dataset"),
    ],
)
def test_rows_that_are_none_are_refused(rows, said):
    with pytest.raises(InputError, match=said):
        config_of({**PLAIN, "dataset": rows})


def test_rows_and_datasets_are_read_as_from_a_file(chat_config, tmp_path):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    from_file = solotune.data(chat_config, dataset="rows.jsonl").report
    for rows in (ROWS, datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS).to_pandas()):
        report = solotune.data(chat_config, dataset=rows, seed=0).report
        assert (report.train_sha256, report.num_read) == (from_file.train_sha256, 12)
