"""Which run `--resume` continues: that of the config, by what it recorded, whatever its folder is called."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

import solotune
from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.config.write import to_yaml
from solotune.errors import IntegrityError
from solotune.run.atomic_io import write_whole
from solotune.run.run_dir import RunDirectory
from solotune.training.find_run import run_of_config
from solotune.training.resume import run_to_continue, which_run
from tests.messages import stable

KEYS = {"model_name_or_path": "m", "dataset": "d.jsonl"}
NUMBER = iter(range(1000, 9999))


def config(name: str, **keys: Any) -> RunConfig:
    checked = load_config({**KEYS, **keys})
    checked._name = name
    return checked


def recorded(folder: str, started: RunConfig, name: str | None = "", choices: tuple[str, ...] = ()) -> Path:
    """A run of a config with a recorded name (that of the config, or None for a run of an older version)."""
    run = RunDirectory.create(folder)
    write_whole(run.path / "config.yaml", to_yaml(started))
    made = {"choices": [{"key": key} for key in choices]}
    run.write_json("environment.json", made if name is None else {**made, "config_name": name or started.name})
    run.release()
    time = next(NUMBER)
    os.utime(run.path / "config.yaml", (time, time))
    return run.path


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def found(wanted: RunConfig) -> str | None:
    run = run_of_config(wanted)
    return run.path.name if run else None


def test_a_name_that_begins_alike_is_another_run() -> None:
    mine, other = config("demo"), config("demo-eval")
    recorded("runs/demo-1", mine)
    recorded("runs/demo-eval-2", other)
    assert found(mine) == "demo-1" and found(other) == "demo-eval-2"
    assert found(config("dem")) is None and found(config("demo-")) is None


def test_the_folders_name_counts_for_nothing() -> None:
    recorded("runs/demo-9", config("other"))
    recorded("runs/somewhere", config("demo"))
    assert found(config("demo")) == "somewhere"
    shutil.move("runs/somewhere", "runs/other-1")
    assert found(config("demo")) == "other-1" and found(config("other")) == "demo-9"


def test_two_configs_of_one_name_are_told_apart_by_their_values() -> None:
    """As two mappings in Python, which are all called `run`, or demo.yaml in two folders."""
    recorded("runs/a", config("run", learning_rate=1e-4))
    recorded("runs/b", config("run", dataset="other.jsonl"))
    assert found(config("run", learning_rate=1e-4)) == "a" and found(config("run", dataset="other.jsonl")) == "b"
    with pytest.raises(IntegrityError) as caught:
        run_of_config(config("run", learning_rate=3e-4))
    assert stable(caught.value) == snapshot("""\
--resume: the newest run of run, runs/b, has another config than this
  seen:    dataset: other.jsonl there, d.jsonl here; learning_rate: 0.0002 there, 0.0003 here
  change:  set it back, continue that run on purpose with output_dir=runs/b, or train without --resume\
""")


def test_what_may_change_and_what_was_chosen_for_the_machine_does_not_matter() -> None:
    recorded("runs/a", config("demo", optim="adamw_torch"), choices=("optim",))
    free = {"num_samples": 1, "save_steps": 5, "gradient_checkpointing": False, "memory_budget": "9GiB"}
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 16}
    assert found(config("demo", **free)) == "a" and found(config("demo", **split)) == "a"
    with pytest.raises(IntegrityError, match="per_device_train_batch_size"):
        run_of_config(config("demo", per_device_train_batch_size=2))


def test_a_run_that_recorded_no_name_has_to_be_equal_in_everything() -> None:
    recorded("runs/demo-old", config("demo"), name=None)
    assert found(config("anything")) == "demo-old"
    assert found(config("demo", num_samples=1)) is None


@pytest.mark.parametrize(
    "damage", ["{}", "[]", '{"config_name": 7}', '{"config_name": ["demo"], "choices": 3}', "\0", ""]
)
def test_a_damaged_record_is_no_match_and_no_crash(damage: str) -> None:
    path = recorded("runs/demo-1", config("demo", learning_rate=1e-4))
    (path / "environment.json").write_text(damage)
    assert found(config("demo")) is None
    (path / "config.yaml").write_text("\0")
    assert found(config("demo")) is None
    (path / "config.yaml").unlink()
    os.mkfifo(path / "config.yaml")
    assert found(config("demo")) is None


def test_which_run_goes_on_is_said() -> None:
    recorded("runs/demo-1", config("demo"))
    assert which_run(run_to_continue(config("demo"))) == "--resume: continuing the run runs/demo-1"
    assert "no run of this config (new)" in which_run(run_to_continue(config("new", seed=7)))
    assert "there is no run in runs/x" in which_run(config("demo", output_dir="runs/x"))


def test_another_configs_run_is_not_touched(chat_config: dict[str, Any], tmp_path: Path) -> None:
    """The real thing: demo-eval was trained, demo is resumed."""
    keys = {**chat_config, "output_dir": None, "max_steps": 2, "num_samples": 0, "save_steps": 1}
    for name, size in (("demo-eval", 20), ("demo", 10)):
        Path(f"{name}.yaml").write_text(json.dumps({**keys, "validation_size": size}))
    other = solotune.train("demo-eval.yaml").run_dir
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    mine = solotune.train("demo.yaml", resume=True).run_dir
    assert mine.resolve() != other.resolve()
    assert before == {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    again = solotune.train("demo.yaml", resume=True).run_dir
    assert again.resolve() == mine.resolve()
    assert json.loads((mine / "environment.json").read_text())["config_name"] == "demo"


def test_a_run_without_checkpoint_is_not_begun_anew_for_another_config(chat_config: dict[str, Any]) -> None:
    path = recorded("run", load_config({**chat_config, "learning_rate": 1e-4}))
    with pytest.raises(IntegrityError, match="another config and no checkpoint"):
        solotune.train(chat_config, resume=True)
    assert sorted(p.name for p in path.iterdir() if p.is_file()) == [".lock", "config.yaml", "environment.json"]
