"""Names of the hub: what is in the cache works without a network; what is not is an error, soon and without a question.

The door runs in a process of its own (`hub_calls`), since huggingface_hub reads its settings when it is imported.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.dataset.conftest import chat

ROWS = [{"messages": chat(f"What is {n}?", f"It is {n}.")} for n in range(10)]

GATED = "one.yaml line 1, model_name_or_path: owner/gated is gated"
MISSING = "one.yaml line 1, model_name_or_path: no such model or folder: owner/gone"

Answers = list[tuple[int, dict[str, Any], float]]
"""Exit code, the object on stdout, seconds."""

CACHED = {"dataset": "owner/chats"}
NOWHERE = [
    {"model_name_or_path": "owner/gone"},
    {"dataset": "owner/gone"},
    {**CACHED, "dataset_split": "train_sft[:4]"},
    {**CACHED, "dataset_split": "test_sft[-30%:]"},
    {**CACHED, "dataset_split": "test"},
    {**CACHED, "dataset_split": "train_sft", "dataset_config": "other"},
]
REFUSED = [{key: name} for key in ("model_name_or_path", "dataset") for name in ("owner/gated", "owner/gone")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, model_folders: Path) -> dict[str, Answers]:
    """What came of NOWHERE while nobody answered at the hub's address, then of REFUSED by a hub that refuses."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HOME", str(folder / "home"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "home"))
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN"):
            patch.delenv(name, raising=False)
        Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        cache_a_dataset("owner/chats")
        usual = {"model_name_or_path": str(model_folders / "chatml"), "dataset": "a.jsonl", "validation_size": 0}
        Path("warm.yaml").write_text(json.dumps(usual))
        for name, configs in (("nowhere", NOWHERE), ("refused", REFUSED)):
            Path(f"{name}.json").write_text(json.dumps([{**usual, **config} for config in configs]))
        # a question would be answered by the end of the input, and show on stdout
        command = [sys.executable, "-P", str(Path(__file__).with_name("hub_calls.py"))]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads((folder / "found.json").read_text())


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


def test_95_what_the_hub_refuses(found: dict[str, Answers]) -> None:
    for (code, content, seconds), start, word in zip(
        found["refused"],
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


def test_95_no_network(found: dict[str, Answers]) -> None:
    codes, contents, seconds = zip(*found["nowhere"], strict=True)
    assert codes == (2, 2, 0, 0, 2, 2)
    assert max(seconds) < 10, "libraries' own retries took 30 s a file"
    assert "owner/gone is not in the cache" in contents[0]["error"]["problem"]
    assert "the hub cannot be reached" in contents[0]["error"]["seen"]
    assert "Couldn't reach 'owner/gone'" in contents[1]["error"]["seen"]
    assert [content["rows"]["kept"] for content in contents[2:4]] == [4, 3]
    assert "".join(piece for piece, _, _ in contents[3]["shown"][0]["pieces"]).count("What is 7?") == 1
    assert "['train_sft', 'test_sft']" in contents[4]["error"]["seen"]
    assert "'other'" in contents[5]["error"]["seen"]
