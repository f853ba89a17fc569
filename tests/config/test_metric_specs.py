"""The key `metrics`: what it takes, and what it says of an entry that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from solotune.config.load import load_config
from solotune.config.metric_specs import MetricSpec
from solotune.config.write import to_yaml
from solotune.errors import InputError

KEYS = {"model_name_or_path": "m", "dataset": "d.jsonl"}
ALL = ["exact_match", "json", "choice", {"choice": ["A", "B"]}, {"regex": r"Answer: (\d+)"}, {"python": "a/s.py:f"}]


def test_all_forms_are_read_and_written_again(tmp_path: Path) -> None:
    config = load_config({**KEYS, "metrics": ALL})
    kinds = ["exact_match", "json", "choice", "choice", "regex", "python"]
    assert [spec.kind for spec in config.evaluation.metrics] == kinds
    assert config.evaluation.metrics[-1] == MetricSpec("python", file="a/s.py", function="f")
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "c.yaml").metrics == ALL
    assert load_config(KEYS, ["metrics=[json, {regex: 'a.b'}]"]).metrics == ["json", {"regex": "a.b"}]


@pytest.mark.parametrize(
    "entry",
    [
        "accuracy",
        "regex",
        {"json": "yes"},
        {"choice": ["A"]},
        {"choice": ["A", "a"]},
        {"regex": "("},
        {"regex": "(a)(b)"},
        {"python": "score.py"},
        {"python": "os:system"},
        {"json": "x", "regex": "y"},
        3,
    ],
)
def test_other_entries_are_refused(entry: Any) -> None:
    with pytest.raises(InputError) as caught:
        load_config({**KEYS, "metrics": [entry]})
    assert caught.value.problem.startswith("python, metrics: ") and "{python: FILE.py:FUNCTION}" in caught.value.problem


def test_a_file_of_the_configs_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/score.py").touch()
    (tmp_path / "there/run.yaml").write_text("model_name_or_path: m\ndataset: d\nmetrics: [{python: score.py:f}]\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("there/run.yaml").metrics == [{"python": "there/score.py:f"}]


def test_patience_needs_evaluations() -> None:
    with pytest.raises(InputError, match="early_stopping_patience needs evaluations during training"):
        load_config({**KEYS, "early_stopping_patience": 2, "eval_strategy": "no"})
    assert load_config({**KEYS, "early_stopping_patience": 2}).evaluation.tracks_best
