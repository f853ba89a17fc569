"""A sample of the campaign: whatever stops a run, its resume comes to the same, to the last bit."""

from __future__ import annotations

import array
import errno
import fcntl
import json
import os
import stat
import termios

import pytest

from bench import faults
from bench.faults_run import Workload
from bench.faults_starts import contend
from solotune.errors import StorageError
from solotune.run import atomic_io, fs_ops
from solotune.run.run_dir import RunDirectory


def assert_all_well(result, at_least):
    assert result.failures == []
    assert result.injected >= at_least


def test_the_run_of_the_campaign_has_every_kind_of_operation(workload):
    kinds = {operation.kind for operation in workload.trace}
    assert kinds == {
        "open", "write", "fsync", "sync_folder", "rename", "unlink", "rmdir", "mkdir", "truncate", "lock",
    }  # fmt: skip
    saved = [operation for operation in workload.trace if b'"event": "save"' in operation.content]
    assert len(saved) == 4
    assert sum(operation.kind == "rmdir" for operation in workload.trace) == 2  # retention


def test_nothing_of_a_run_is_written_past_the_door(work):
    """Every file that is there at the end was opened through `storage`."""
    assert work.once(False).code == 0
    renamed = {op.path: os.fsdecode(op.content) for op in work.trace if op.kind == "rename"}
    opened = {op.path for op in work.trace if op.kind == "open"}
    there = set()
    for path in opened:
        parts = path.split("/")
        for i in range(len(parts), 0, -1):
            if (name := "/".join(parts[:i])) in renamed:
                new = os.path.relpath(renamed[name], work.folder)
                path = "/".join([new, *parts[i:]])
        there.add(path)
    files = {str(path.relative_to(work.folder)) for path in work.run.rglob("*") if path.is_file()}
    assert files <= there


def test_killed_at_an_operation(work):
    assert_all_well(faults.kills(work, every=101), 3)


def test_killed_in_a_resume(work):
    assert_all_well(faults.resumes(work, every=83), 3)


def test_killed_at_an_instant(work):
    assert_all_well(faults.instants(work, in_training=3, in_each=0), 3)


def test_power_cut(work):
    assert_all_well(faults.power(work, every=127), 10)


def test_power_cut_in_a_resume(work):
    assert_all_well(faults.power(work, every=151, resume=True), 5)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_the_disk_refuses(work, number):
    assert_all_well(faults.errors(work, every=110, errnos=(number,)), 6)


def test_one_of_many_starts_wins(work):
    assert contend(work, 10) is None


def test_two_that_win_before_the_first_is_heard_are_both_seen(work, monkeypatch):
    """On a machine with much else to do the parent may come to read when both have written."""
    read, parent, waiting = os.read, os.getpid(), array.array("i", [0])

    def late(handle, size):
        while os.getpid() == parent and waiting[0] < len("4194304\n") + 1:  # more than one process's line
            fcntl.ioctl(handle, termios.FIONREAD, waiting)
        return read(handle, size)

    monkeypatch.setattr(RunDirectory, "create", lambda config: None)
    monkeypatch.setattr(os, "read", late)
    assert " got it as well as " in (contend(work, 6) or "")


def test_an_error_of_the_disk_is_exit_8_and_names_the_file(work):
    number = next(n for n, done in enumerate(work.trace) if done.kind == "fsync" and "step-000004" in done.path)
    ended = work.once(False, faults.refusing(work, number, errno.EDQUOT, False))
    assert ended.code == 8
    assert "step-000004" in ended.said and "quota" in ended.said.lower()
    assert [path.name for path in (work.run / "checkpoints").iterdir()] == ["step-000002"]


def test_a_full_log_does_not_end_a_run(work):
    def refuse(kind, path, content):
        if path.name == "log.txt" and kind == "write":
            raise OSError(errno.ENOSPC, "No space left on device")

    assert work.once(False, refuse).code == 0
    assert (work.run / "log.txt").read_text() == ""


@pytest.mark.parametrize(
    ("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700)]
)
def test_modes_follow_the_umask(work, mask, file, folder):
    before = os.umask(mask)
    try:
        assert work.once(False).code == 0
    finally:
        os.umask(before)
    for path in work.run.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (folder if path.is_dir() else file), path
        assert not path.is_symlink()


def test_an_adapter_names_its_base_and_neither_machine_nor_user(work, monkeypatch):
    """Of a base in a folder its path, for AutoPeftModel on this machine; an exported adapter, which people pass on, has
    none (tests/api/test_export.py)."""
    import platform

    for name in ("LOGNAME", "USER"):  # which a container may not have
        monkeypatch.setenv(name, "user-of-this-test")
    assert work.once(False).code == 0
    for path in (work.run / "adapter").rglob("*"):
        content = path.read_bytes()
        if path.name == "adapter_config.json":
            config = json.loads(content)
            assert os.path.isdir(config.pop("base_model_name_or_path"))
            content = json.dumps(config).encode()
        for word in (str(work.folder), str(work.folder.parent), os.path.expanduser("~"), platform.node()):
            assert len(word) < 5 or word.encode() not in content, (path.name, word)  # `/`, `gpu` are in any file
        assert b"user-of-this-test" not in content
    assert (work.run / ".lock").read_bytes() == b""  # which names host and process while they hold it


# --- the door itself


def test_a_hook_hears_each_operation_before_it_is_done(tmp_path):
    heard = []

    def hear(kind, path, content):
        heard.append((kind, path.name, content if kind == "write" else b"", (tmp_path / "a").exists()))

    with fs_ops.watched(hear):
        atomic_io.write_whole(tmp_path / "a", "text")
    assert heard == [
        ("open", ".a.partial", b"", False),
        ("write", ".a.partial", b"text", False),
        ("fsync", ".a.partial", b"", False),
        ("rename", ".a.partial", b"", False),
        ("sync_folder", tmp_path.name, b"", True),
    ]
    atomic_io.write_whole(tmp_path / "b", "text")
    assert len(heard) == 5


def test_a_symbolic_link_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    for name in ("metrics.jsonl", ".a.json.partial"):
        (tmp_path / name).symlink_to("victim")
    with pytest.raises(StorageError):
        atomic_io.append_line(tmp_path / "metrics.jsonl", "line\n")
    with pytest.raises(StorageError):
        atomic_io.write_whole(tmp_path / "a.json", "text")
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_write_of_several_pieces(tmp_path, monkeypatch):
    """The kernel takes less than it is given, and a text comes in pieces larger than one write."""
    take = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: take(handle, data[:3]))
    monkeypatch.setattr(atomic_io, "WRITE_BYTES", 8)
    atomic_io.write_whole(tmp_path / "a", iter(["some ", "text that is ", "longer than a write"]))
    atomic_io.write_whole(tmp_path / "b", b"bytes longer than a write")
    assert (tmp_path / "a").read_text() == "some text that is longer than a write"
    assert (tmp_path / "b").read_bytes() == b"bytes longer than a write"


def test_a_lock_that_was_replaced_while_it_was_waited_for(tmp_path, monkeypatch):
    """Locking a file whose name leads elsewhere by then would let two processes in."""
    lock = tmp_path / ".lock"
    flock, calls = atomic_io.fcntl.flock, []

    def replaced(handle, how):
        flock(handle, how)
        if not calls:
            lock.unlink()
        calls.append(how)

    monkeypatch.setattr(atomic_io.fcntl, "flock", replaced)
    handle = atomic_io.take_lock(lock, "me")
    assert len(calls) == 2 and lock.read_text() == "me"
    atomic_io.drop_lock(lock, handle)


def test_packing_and_accumulation_resume_bit_equal_too(tmp_path):
    """Another run: packed rows, one micro-batch more, an evaluation and a save at odd steps, mid-epoch."""
    work = Workload(
        tmp_path.resolve(), packing=True, max_length=128, per_device_train_batch_size=1, gradient_accumulation_steps=3,
        save_steps=3, eval_steps=2, max_steps=7, lora_dropout=0.3,
    )  # fmt: skip
    work.measure()
    faults.until_step(work, 5)
    assert work.what_is_wrong(3) is None
