"""The run directory: whole files, one owner, lines that survive a torn end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from inline_snapshot import snapshot

from solotune.config.load import load_config
from solotune.config.write import to_yaml
from solotune.errors import DirectoryInUseError, InputError, StorageError
from solotune.run.atomic_io import whole_folder, write_whole
from solotune.run.events import NonFiniteEvent, SaveEvent
from solotune.run.record import RunRecord
from solotune.run.run_dir import RunDirectory, list_runs, read_json
from tests.messages import stable

KEYS = {"model_name_or_path": "m", "dataset": "d.jsonl"}


def config_in(folder):
    return load_config({**KEYS, "output_dir": str(folder)})


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_whole(path, "old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError) as caught:
        write_whole(path, "new")
    assert stable(caught.value) == snapshot("""\
<tmp>/a.json: cannot be written
  seen:    No space left on device\
""")
    assert caught.value.exit_code == 8
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "step-000001"

    def fail_half_way():
        with whole_folder(target) as folder:
            folder.write("one", "1")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert list(tmp_path.iterdir()) == []
    with whole_folder(target) as folder:
        folder.write("one", "1")
        assert not target.exists()
    assert (target / "one").read_text() == "1"


def test_a_directory_with_a_run_is_not_overwritten(tmp_path):
    run = RunDirectory.create(str(tmp_path / "r"))
    write_whole(run.path / "config.yaml", to_yaml(config_in(tmp_path / "r")))
    run.release()
    with pytest.raises(DirectoryInUseError) as caught:
        RunDirectory.create(str(tmp_path / "r"))
    assert stable(caught.value) == snapshot("""\
<tmp>/r already contains a run
  seen:    config.yaml
  change:  continue it with --resume, choose another output_dir, or remove the folder\
""")
    assert caught.value.exit_code == 4
    RunDirectory.create(str(tmp_path / "r"), resume=True).release()


def test_a_run_that_came_and_went_while_the_lock_was_waited_for_is_not_overwritten(tmp_path, monkeypatch):
    config, take = config_in(tmp_path / "r"), RunDirectory._take_lock

    def late(run):
        monkeypatch.undo()
        other = RunDirectory.create(config.output_dir)
        write_whole(other.path / "config.yaml", to_yaml(config))
        other.release()
        take(run)

    monkeypatch.setattr(RunDirectory, "_take_lock", late)
    with pytest.raises(DirectoryInUseError) as caught:
        RunDirectory.create(config.output_dir)
    assert stable(caught.value) == snapshot("""\
<tmp>/r already contains a run
  seen:    config.yaml
  change:  continue it with --resume, choose another output_dir, or remove the folder\
""")
    assert not RunDirectory(tmp_path / "r").is_locked()


def test_two_processes_cannot_hold_one_directory_and_a_dead_owner_does_not_block(tmp_path):
    run = RunDirectory.create(str(tmp_path / "r"))
    code = (
        "import sys\nfrom solotune.config.load import load_config\nfrom solotune.run.run_dir import RunDirectory\n"
        f"c = load_config({{**{KEYS!r}, 'output_dir': {str(tmp_path / 'r')!r}}})\n"
        "try:\n    RunDirectory.create(c.output_dir, resume=True)\n"
        "except Exception as e:\n    print(e); sys.exit(e.exit_code)\n"
    )
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert second.returncode == 4
    assert f"process {os.getpid()}" in second.stdout
    assert run.is_locked()
    run.release()
    assert not run.is_locked()
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_torn_last_line_is_passed_over(tmp_path):
    run = RunDirectory.create(str(tmp_path / "r"))
    run.log(SaveEvent(1, "step-000001"))
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"event": "save", "st')
    assert RunRecord.read(run.path).events == (SaveEvent(1, "step-000001"),)


def test_a_line_may_hold_any_character_and_be_torn_within_one(tmp_path):
    run = RunDirectory.create(str(tmp_path / "r"))
    event = NonFiniteEvent(1, rows=["a\u2028b é"])
    run.log(event)
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'7\n{"event": "\xc3')
    assert RunRecord.read(run.path).events == (event,)


def test_metrics_are_cut_back_to_a_mark_and_another_file_is_not(tmp_path):
    run = RunDirectory.create(str(tmp_path / "r"))
    for step in range(1, 6):
        run.log(SaveEvent(step, "x"))
        if step == 3:
            mark = run.metrics_offset()
    assert run.metrics_mismatch(mark) is None
    run.truncate_metrics(mark)
    assert RunRecord.read(run.path).events == tuple(SaveEvent(step, "x") for step in (1, 2, 3))
    lines = (run.path / "metrics.jsonl").read_text()
    (run.path / "metrics.jsonl").write_text(lines.replace("2", "7"))
    assert "has changed since the checkpoint was saved" in run.metrics_mismatch(mark)
    (run.path / "metrics.jsonl").write_text(lines[:-1])
    assert "bytes" in run.metrics_mismatch(mark)
    run.truncate_metrics(None)
    assert RunRecord.read(run.path).events == ()


def test_opening_what_is_no_run(tmp_path):
    with pytest.raises(InputError) as caught:
        RunDirectory.open(tmp_path / "nothing")
    assert stable(caught.value) == snapshot("""\
<tmp>/nothing: run not found
  allowed: a run directory\
""")
    with pytest.raises(InputError) as caught:
        RunDirectory.open(tmp_path)
    assert stable(caught.value) == snapshot("""\
<tmp>: not a run directory
  seen:    no config.yaml in it
  allowed: a folder that `solotune train` wrote\
""")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError) as caught:
        read_json(tmp_path / "x.json")
    assert stable(caught.value) == snapshot("""\
<tmp>/x.json: not valid JSON
  seen:    Expecting property name enclosed in double quotes: line 1 column 2 (char 1)\
""")


def test_runs_are_named_after_their_config_and_listed_oldest_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("alpha", "beta", "alpha")):
        (tmp_path / f"{name}.yaml").write_text("model_name_or_path: m\ndataset: d\n")
        config = load_config(f"{name}.yaml")
        run = RunDirectory.create(config.output_dir, config.name)
        write_whole(run.path / "config.yaml", to_yaml(config))
        run.release()
        os.utime(run.path / "config.yaml", (1000 + i, 1000 + i))
    assert [run.path.name.split("-")[0] for run in list_runs()] == ["alpha", "beta", "alpha"]
