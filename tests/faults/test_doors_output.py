"""Where a run is written: entries 70 to 72 of the corpus, and links planted where files will be made. (E4)

Nothing that was there before may be changed, whatever it is: a foreign folder, another run, the base model, a link.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import chat_rows

from solotune import cli


def train(output_dir: str, **keys: Any) -> int:
    config = {
        "model_name_or_path": "model", "dataset": "chats.jsonl", "validation_size": 2, "max_length": 64,
        "base_precision": "fp32", "use_cpu": True, "output_dir": output_dir, "lora_r": 4, "max_steps": 1,
        "num_samples": 0, "lora_target_modules": ["q_proj"], **keys,
    }  # fmt: skip
    Path("config.yaml").write_text(json.dumps(config))
    return cli.main(["train", "config.yaml"])


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file below a folder with its content's hash, links as links."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: Path) -> Path:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    shutil.copytree(sharded, "model")
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(8)))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "victim").write_text("untouched")
    return tmp_path


def read_only() -> None:
    Path("run").mkdir()
    Path("run").chmod(0o555)


PLACES: dict[str, tuple[str, Callable[[], Any], tuple[int, ...]]] = {
    "70 name too long": ("x" * 300, lambda: None, (2, 8)),
    "70 path too long": ("x/" * 2100, lambda: None, (2,)),
    "71 FIFO": ("run", lambda: os.mkfifo("run"), (2, 3, 8)),
    "71 device": ("/dev/null", lambda: None, (2, 3, 8)),
    "71 below a file": ("chats.jsonl/run", lambda: None, (2, 3, 8)),
    "71 no file system for it": ("/proc/run", lambda: None, (2, 3, 8)),
    "72 a file": ("chats.jsonl", lambda: None, (2,)),
    "72 the base model": ("model", lambda: None, (2, 4)),
    "72 below the base model": ("model/run", lambda: None, (2, 4)),
    "72 the data's folder": (".", lambda: None, (2, 4)),
    "72 somebody's folder": ("../outside", lambda: None, (2, 4)),
    "72 a dangling link": ("run", lambda: Path("run").symlink_to("../gone"), (2, 4)),
    "72 another run": ("run", lambda: (Path("run").mkdir(), Path("run/config.yaml").write_text("")), (4,)),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_places_that_are_refused(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output_dir, prepare, codes = PLACES[name]
    prepare()
    Path("config.yaml").write_text("")
    before = fingerprint(here)
    code = train(output_dir)
    shown = capsys.readouterr().err
    Path("config.yaml").write_text("")
    assert code in codes and "Traceback" not in shown, shown
    assert fingerprint(here) == before


FILES = ("config.yaml", "metrics.jsonl", "environment.json", "plan.json", "data.json", "split.json", "log.txt", ".lock",
         "evaluation.json", "adapter", "checkpoints")  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_links_planted_for_files_of_the_run(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run").mkdir()
    target = "../../outside" if name in ("adapter", "checkpoints") else "../../outside/victim"
    Path("run", name).symlink_to(target)
    before = fingerprint(here / "outside")
    code = train("run")
    assert code == 2 and "link" in capsys.readouterr().err
    assert fingerprint(here / "outside") == before
