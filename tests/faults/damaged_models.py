"""A tiny sharded Llama, ways to damage it, and `solotune train` on it."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, chat_rows, save_tokenizer

from solotune import cli
from tests.dataset.conftest import peak_kib

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers in two files, with a tokenizer."""
    folder = tmp_path_factory.mktemp("sharded")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"](), dtype=torch.float32)
    model.save_pretrained(folder, max_shard_size="160KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    half = len(shards) // 2
    weight_map = {}
    for name, part in ((FIRST, shards[:half]), (SECOND, shards[half:])):
        tensors = {key: tensor for path in part for key, tensor in load_file(path).items()}
        weight_map |= dict.fromkeys(tensors, name)
        for path in part:
            path.unlink()
        save_file(tensors, folder / f"new-{name}", {"format": "pt"})
    for name in (FIRST, SECOND):
        (folder / f"new-{name}").rename(folder / name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_tokenizer(folder)
    return folder


class AtDoor:
    """`solotune train` on a model folder `model`, held to what it promises for every input."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, code: int = 2, **keys: Any) -> str:
        config = {
            "model_name_or_path": "model", "dataset": "chats.jsonl", "validation_size": 2, "max_length": 64,
            "base_precision": "fp32", "use_cpu": True, "output_dir": "run", "lora_r": 4, "max_steps": 1,
            "num_samples": 0, "lora_target_modules": "all-linear", **keys,
        }  # fmt: skip
        Path("config.yaml").write_text(json.dumps(config))
        before, started, peak = sorted(Path().rglob("*")), time.process_time(), peak_kib(reset=True)
        found = cli.main(["train", "config.yaml", "--json"])
        taken, grown = time.process_time() - started, peak_kib() - peak
        out, shown = self._capsys.readouterr()
        assert found == code, shown
        assert "Traceback" not in shown
        if code:
            assert sorted(Path().rglob("*")) == before, "nothing is written"
            assert json.loads(out)["error"]["problem"]
        assert taken <= 10 and grown <= 1 << 20, (taken, grown)
        return shown


@pytest.fixture
def at_door(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> AtDoor:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sharded, "model")
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(8)))
    return AtDoor(capsys)


def header(change: Callable[[dict[str, Any]], object], name: str = SECOND) -> Change:
    """Edits the header of a file; its bytes stay."""

    def make(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        content = json.loads(raw[8 : 8 + length])
        changed = change(content)
        text = changed if isinstance(changed, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    return make


def first_of(content: dict[str, Any]) -> dict[str, Any]:
    """The entry of the tensor that lies first."""
    return min((e for n, e in content.items() if n != "__metadata__"), key=lambda entry: entry["data_offsets"])


def last_of(content: dict[str, Any]) -> dict[str, Any]:
    return max((e for n, e in content.items() if n != "__metadata__"), key=lambda entry: entry["data_offsets"])


def shifted(by: int) -> Callable[[dict[str, Any]], object]:
    """The places of the second tensor moved: a hole before it, or an overlap."""

    def change(content: dict[str, Any]) -> None:
        second = sorted((e for n, e in content.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])[1]
        second["data_offsets"] = [place + by for place in second["data_offsets"]]

    return change


def twice(content: dict[str, Any]) -> bytes:
    name, entry = next((n, e) for n, e in content.items() if n != "__metadata__")
    text = json.dumps(content)
    return (text[:-1] + f', "{name}": {json.dumps(entry)}}}').encode()


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Edits the tensors of whichever file has Q, and the index with them."""

    def make(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        name = index["weight_map"][Q]
        held = load_file(folder / name)
        change(held)
        save_file(held, folder / name, {"format": "pt"})
        others = {key: file for key, file in index["weight_map"].items() if file != name}
        index["weight_map"] = {**others, **dict.fromkeys(held, name)}
        (folder / INDEX).write_text(json.dumps(index))

    return make


def with_value(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[Q][3, 5] = value

    return change


def index(change: Callable[[dict[str, str]], object]) -> Change:
    def make(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return make


def config(**values: Any) -> Change:
    def make(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, **values}))

    return make


def text_of(name: str, change: Callable[[bytes], bytes]) -> Change:
    def make(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return make


def linked_out(folder: Path) -> None:
    (folder / SECOND).rename(folder.parent / "elsewhere.safetensors")
    (folder / SECOND).symlink_to("../elsewhere.safetensors")


def pickle_alone(folder: Path) -> None:
    for name in (FIRST, SECOND, INDEX):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def unlink(name: str) -> Change:
    return lambda folder: (folder / name).unlink()
