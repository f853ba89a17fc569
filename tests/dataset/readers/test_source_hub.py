"""Names of the hub: what is in the cache works without a network; what is not is an error, soon and without a question.

The door runs in processes of its own, since huggingface_hub reads its settings when it is imported.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import datasets
import pytest

from tests.dataset.conftest import chat

ROWS = [{"messages": chat(f"What is {n}?", f"It is {n}.")} for n in range(10)]

# runs `solotune data` on each of some configs and prints what came of it: [exit code, stdout's object, seconds]; of the
# processor and asleep, since what else runs on this machine does not count
_EACH = """
import contextlib, io, json, sys, time
from pathlib import Path
from solotune import cli
cli.main(["data", "warm.yaml", "--json"])
found, asleep, sleep = [], [0.0], time.sleep
def noted(seconds):
    asleep[0] += seconds
    sleep(seconds)
time.sleep = noted
for config in json.load(open("configs.json")):
    Path("one.yaml").write_text(json.dumps(config))
    out, started = io.StringIO(), time.process_time() + asleep[0]
    with contextlib.redirect_stdout(out):
        code = cli.main(["data", "one.yaml", "--json"])
    found.append([code, json.loads(out.getvalue()), time.process_time() + asleep[0] - started])
Path("found.json").write_text(json.dumps(found))
"""

GATED = "one.yaml line 1, model_name_or_path: owner/gated is gated"
MISSING = "one.yaml line 1, model_name_or_path: no such model or folder: owner/gone"

Each = Callable[..., list[tuple[int, dict[str, Any], float]]]


class _Hub(BaseHTTPRequestHandler):
    """Refuses as the hub does; `/` answers."""

    def do_GET(self) -> None:
        error = "GatedRepo" if "gated" in self.path else "RepoNotFound"
        self.send_response(200 if self.path == "/" else 403 if error == "GatedRepo" else 404)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def nowhere() -> Iterator[str]:
    """An address at which nobody answers: held, so that nobody else can, and not listened at."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.fixture
def each(tmp_path: Path, model_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Each:
    """each(endpoint, config, ...) -> the answers, one for each config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    usual = {"model_name_or_path": str(model_folders / "chatml"), "dataset": "a.jsonl", "validation_size": 0}
    Path("warm.yaml").write_text(json.dumps(usual))

    def run(endpoint: str, *configs: dict[str, Any]) -> list[tuple[int, dict[str, Any], float]]:
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        Path("configs.json").write_text(json.dumps([{**usual, **config} for config in configs]))
        # a question would be answered by the end of the input, and show on stdout
        done = subprocess.run([sys.executable, "-c", _EACH], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return json.loads(Path("found.json").read_text())

    return run


def cache_a_dataset(name: str) -> None:
    """What `load_dataset(name)` leaves in the cache of `datasets`, made from a file."""
    datasets.load_dataset("json", data_files={"train_sft": "a.jsonl", "test_sft": "a.jsonl"}, cache_dir="made")
    (made,) = Path("made").glob("json/*/0.0.0/*/")
    folder = Path("home/datasets") / name.replace("/", "___") / "default" / "0.0.0" / ("0" * 40)
    short = name.split("/")[1]
    shutil.copytree(made, folder)
    for path in folder.glob("*.arrow"):
        path.rename(path.with_name(path.name.replace("json-", f"{short}-")))
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"builder_name": short, "dataset_name": short, "config_name": "default"}
    for split in info["splits"].values():
        split["dataset_name"] = short
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_95_what_the_hub_refuses(each: Each, hub: str) -> None:
    names = ("owner/gated", "owner/gone")
    keys = ("model_name_or_path", "dataset")
    found = each(hub, *({key: name} for key in keys for name in names))
    for (code, content, seconds), start, word in zip(
        found,
        [GATED, MISSING, *["dataset: the hub dataset owner/g"] * 2],
        ["gated", "gone", "gated", "doesn't exist"],
        strict=True,
    ):
        assert code == 2
        error = content["error"]
        assert error["problem"].startswith(start)
        assert word in (error["seen"] or error["problem"])
        assert "hf auth login" in error["change"]
        assert seconds < 10


def test_95_no_network(each: Each, nowhere: str) -> None:
    cache_a_dataset("owner/chats")
    cached = {"dataset": "owner/chats"}
    found = each(
        nowhere,
        {"model_name_or_path": "owner/gone"},
        {"dataset": "owner/gone"},
        {**cached, "dataset_split": "train_sft[:4]"},
        {**cached, "dataset_split": "test_sft[-30%:]"},
        {**cached, "dataset_split": "test"},
        {**cached, "dataset_split": "train_sft", "dataset_config": "other"},
    )
    codes, contents, seconds = zip(*found, strict=True)
    assert codes == (2, 2, 0, 0, 2, 2)
    assert max(seconds) < 10, "libraries' own retries took 30 s a file"
    assert "owner/gone is not in the cache" in contents[0]["error"]["problem"]
    assert "the hub cannot be reached" in contents[0]["error"]["seen"]
    assert "Couldn't reach 'owner/gone'" in contents[1]["error"]["seen"]
    assert [content["rows"]["kept"] for content in contents[2:4]] == [4, 3]
    assert "".join(piece for piece, _, _ in contents[3]["shown"][0]["pieces"]).count("What is 7?") == 1
    assert "['train_sft', 'test_sft']" in contents[4]["error"]["seen"]
    assert "'other'" in contents[5]["error"]["seen"]
