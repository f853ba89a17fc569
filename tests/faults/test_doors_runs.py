"""A run directory from elsewhere, damaged in every way: no reader blocks, crashes, or writes; `runs` lists the others."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import solotune
from solotune import cli
from solotune.errors import InputError
from solotune.run.manifest import MANIFEST, entry_at, manifest_text, read_manifest
from solotune.training.resume import check_given, recorded_day
from solotune.training.verify_run import verify


@pytest.fixture(scope="module")
def finished(workload: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workload.clear()
    assert workload.once(False).code == 0
    folder = tmp_path_factory.mktemp("runs")
    for name in ("bad", "good"):
        shutil.copytree(workload.run, folder / name)
    return folder


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs"


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: None,
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "empty": lambda path: path.write_bytes(b""),
    "list": lambda path: path.write_bytes(b"[]"),
    "deep": lambda path: path.write_bytes(b"[" * 5000 + b"]" * 5000),
    "no keys": lambda path: path.write_bytes(b'{"event": "step"}\n{"event": "end"}\n'),
    "wrong types": lambda path: path.write_bytes(json.dumps({key: [{"x": None}] for key in KEYS}).encode()),
    "no numbers": lambda path: path.write_bytes(json.dumps({key: {"loss": 1} for key in KEYS}).encode()),
    "sparse": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}  # fmt: skip
KEYS = ("base", "tuned", "scores", "sha256", "config", "software", "findings", "choices", "step", "metrics", "optimizer",
        "fingerprints", "files", "r", "event", "pid", "host", "rendered_on")  # fmt: skip
FILES = ["config.yaml", "metrics.jsonl", "evaluation.json", "environment.json", "fingerprints.json", "data.json", ".lock",
         MANIFEST, "adapter/adapter_config.json", "adapter/adapter_model.safetensors", f"adapter/{MANIFEST}",
         "checkpoints/step-000008/state.json"]  # fmt: skip


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = ((path, path.lstat()) for path in folder.rglob("*"))
    return {str(path): (status.st_mode, status.st_size, status.st_mtime_ns) for path, status in found}


@pytest.mark.parametrize("name", FILES)
def test_one_bad_run_breaks_no_list_and_verify_only_looks(name: str, runs: Path, capsys: Any) -> None:
    whole = (runs / "bad" / name).read_bytes() if (runs / "bad" / name).exists() else b""
    for kind, damage in DAMAGE.items():
        path = runs / "bad" / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        damage(path)
        before, started = tree(runs), time.monotonic()
        assert cli.main(["runs", "--root", str(runs)]) == 0, kind
        assert "good" in capsys.readouterr().out
        assert cli.main(["verify", str(runs / "bad")]) in (0, 2, 5), kind
        assert tree(runs) == before and time.monotonic() - started < 20, kind
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    path.write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
def test_evaluate_answers(name: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("solotune.training.trained_run.load_base", lambda *_: pytest.fail("the damage was not seen"))
    for kind in ("fifo", "folder", "list", "wrong types"):
        path = runs / "bad" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        DAMAGE[kind](path)
        if (
            name not in ("metrics.jsonl", "evaluation.json", "environment.json", ".lock", MANIFEST)
            and "state" not in name
        ):
            assert cli.main(["evaluate", str(runs / "bad")]) in (2, 5), kind


# --- what `verify` sees


def test_a_file_added_under_the_name_of_a_skipped_checkpoint_is_seen(runs: Path) -> None:
    run = runs / "good"
    assert verify(run).ok
    for name in ("evil.unused", "adapter.unused/x", "checkpoints/step-000099.unused/evil.py", "checkpoints/x.unused"):
        path = run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        assert any(
            problem.file.startswith(name.split("/x")[0].split("/evil")[0]) for problem in verify(run).problems
        ), name
        path.unlink()


def test_a_skipped_checkpoint_is_sealed_as_it_is(runs: Path) -> None:
    from solotune.run.run_dir import RunDirectory

    run, skipped = runs / "good", runs / "good" / "checkpoints" / "step-000008.unused"
    (run / "checkpoints" / "step-000008").rename(skipped)
    (skipped / "state.json").write_text("damaged, so it was skipped")
    RunDirectory(run).write_manifest()
    assert verify(run).ok
    (skipped / "state.json").write_text("changed since")
    assert [problem.file for problem in verify(run).problems] == ["checkpoints/step-000008.unused/state.json"]


@pytest.mark.parametrize("name", [MANIFEST, f"adapter/{MANIFEST}"])
def test_a_manifest_that_is_a_link_is_seen(name: str, runs: Path, tmp_path: Path) -> None:
    path = runs / "good" / name
    shutil.move(path, tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert any("link" in problem.problem or "regular" in problem.problem for problem in verify(runs / "good").problems)
    path.unlink()
    path.symlink_to("nowhere")
    assert not verify(runs / "good").ok


def test_a_manifest_lists_nothing_outside(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    path = runs / "good" / MANIFEST
    for name in ("../../secret", str(tmp_path / "secret"), "a/../../../secret", "./config.yaml", "a\0b"):
        path.write_text(manifest_text({name: entry_at(tmp_path / "secret")}))
        with pytest.raises(ValueError, match="outside its folder"):
            read_manifest(path)
    shutil.move(runs / "good" / "adapter", tmp_path / "adapter")
    (runs / "good" / "adapter").symlink_to(tmp_path / "adapter")
    assert not verify(runs / "good").ok


# --- a checkpoint by name


@pytest.mark.parametrize("name", ["step-000050", "bare", "/", "~nobody/x", ".", "..", "a/b", "x" * 3000])
def test_a_name_that_is_no_checkpoint_is_bad_input(name: str, chat_config: dict[str, Any]) -> None:
    recorded_day(name[:80], None)
    with pytest.raises(InputError, match="is not a checkpoint"):
        check_given(name[:200])
    with pytest.raises(InputError, match="is not a checkpoint"):
        solotune.train({**chat_config, "resume_from_checkpoint": name[:200]})
