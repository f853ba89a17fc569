"""The model's door: entries 74 to 89 of the corpus of bad input, as mutations of one tiny sharded Llama.

Each is refused by `solotune train` with exit 2 and the place named, before a run directory exists and, but for numbers
that are not finite, before a tensor is read. transformers alone loads nine of them without a word. This file is
long because each message stands whole beside the damage that causes it.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from inline_snapshot import snapshot
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, chat_rows, save_tokenizer

from solotune import cli
from solotune.errors import InputError
from solotune.hub.hf_config import read_config
from solotune.model import weights
from solotune.model.base_fingerprint import fingerprint_of
from tests.dataset.conftest import peak_kib
from tests.messages import error_in

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
Q = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


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


def test_the_folder_itself_is_good(at_door: AtDoor) -> None:
    at_door(code=0)
    assert Path("run/adapter/adapter_model.safetensors").is_file()


# --- ways to damage it; all in `model/`

Change = Callable[[Path], None]


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


MORE = {"weight_map": {}}
DAMAGED: list[tuple[int, str, Change, str]] = [
    (74, "missing shard", unlink(SECOND), snapshot("""\
model: a weight file is missing
  seen:    model-00002-of-00002.safetensors
  change:  download the folder again\
""")),
    (74, "dangling link", lambda f: (unlink(SECOND)(f), (f / SECOND).symlink_to("gone")), snapshot("""\
model: a weight file is missing
  seen:    model-00002-of-00002.safetensors
  change:  download the folder again\
""")),
    (75, "empty shard", text_of(SECOND, lambda raw: b""), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    0 bytes
  change:  download the file again\
""")),
    (76, "cut by a byte", text_of(SECOND, lambda raw: raw[:-1]), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    1 missing bytes at its end
  change:  download the file again\
""")),
    (76, "cut by half", text_of(SECOND, lambda raw: raw[: len(raw) // 2]), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    78,768 missing bytes at its end
  change:  download the file again\
""")),
    (76, "cut in the header", text_of(SECOND, lambda raw: raw[:100]), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    a header of 1,112 bytes in a file of 100
  change:  download the file again\
""")),
    (76, "a byte too many", text_of(SECOND, lambda raw: raw + b"\0"), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    1 extra bytes at its end
  change:  download the file again\
""")),
    (77, "header of 2^40", text_of(SECOND, lambda raw: struct.pack("<Q", 1 << 40) + raw[8:]), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    a header of 1,099,511,627,776 bytes in a file of 157,536
  change:  download the file again\
""")),
    (77, "header no JSON", header(lambda content: b"{]"), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    its header is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)
  change:  download the file again\
""")),
    (77, "header deep", header(lambda content: b"[" * 9000), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    its header is not valid JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string
  change:  download the file again\
""")),
    (77, "overlap", header(shifted(-4)), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    model.layers.1.input_layernorm.weight: overlaps the tensor before it
  change:  download the file again\
""")),
    (77, "hole", header(shifted(4)), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    model.layers.1.input_layernorm.weight: leaves a gap before it
  change:  download the file again\
""")),
    (77, "name twice", header(twice), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    its header is not valid JSON: the key 'lm_head.weight' appears twice
  change:  download the file again\
""")),
    (77, "shape against bytes", header(lambda c: first_of(c).update(shape=[1])), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    lm_head.weight: {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 32768]}
  change:  download the file again\
""")),
    (77, "shape below 0", header(lambda c: first_of(c).update(shape=[-64, -64])), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    lm_head.weight: {'dtype': 'F32', 'shape': [-64, -64], 'data_offsets': [0, 32768]}
  change:  download the file again\
""")),
    (77, "shape of 2^62", header(lambda c: first_of(c).update(shape=[1 << 62, 4])), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    lm_head.weight: {'dtype': 'F32', 'shape': [4611686018427387904, 4], 'data_offsets': [0, 32768]}
  change:  download the file again\
""")),
    (77, "places as texts", header(lambda c: first_of(c).update(data_offsets=["0", "4"])), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    lm_head.weight: {'dtype': 'F32', 'shape': [128, 64], 'data_offsets': ['0', '4']}
  change:  download the file again\
""")),
    (77, "no dtype", header(lambda c: first_of(c).pop("dtype")), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    lm_head.weight: {'shape': [128, 64], 'data_offsets': [0, 32768]}
  change:  download the file again\
""")),
    (77, "dtype a list", header(lambda c: first_of(c).update(dtype=["F32"])), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    lm_head.weight: {'dtype': ['F32'], 'shape': [128, 64], 'data_offsets': [0, 32768]}
  change:  download the file again\
""")),
    (77, "past the end", header(lambda c: last_of(c).update(data_offsets=[0, 1 << 50])), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    model.norm.weight: {'dtype': 'F32', 'shape': [64], 'data_offsets': [0, 1125899906842624]}
  change:  download the file again\
""")),
    (79, "NaN", tensors(with_value(float("nan"))), snapshot("""\
model: tensor model.layers.0.self_attn.q_proj.weight is not finite
  seen:    1 of 4,096 numbers are NaN or infinite
  change:  download the folder again, or use another model\
""")),
    (79, "infinity", tensors(with_value(float("inf"))), snapshot("""\
model: tensor model.layers.0.self_attn.q_proj.weight is not finite
  seen:    1 of 4,096 numbers are NaN or infinite
  change:  download the folder again, or use another model\
""")),
    (79, "both", tensors(lambda h: h.update({Q: h[Q] / 0 - h[Q] / 0})), snapshot("""\
model: tensor model.layers.0.self_attn.q_proj.weight is not finite
  seen:    4,096 of 4,096 numbers are NaN or infinite
  change:  download the folder again, or use another model\
""")),
    (80, "index names a tensor too many", index(lambda m: m.update({"model.x": FIRST})), snapshot("""\
model/model.safetensors.index.json: index and files differ for 1 tensors
  seen:    model.x: in model-00001-of-00002.safetensors according to the index, found in no file
  change:  download the folder again\
""")),
    (80, "index lacks a tensor", index(lambda m: m.pop(Q)), snapshot("""\
model/model.safetensors.index.json: index and files differ for 1 tensors
  seen:    model.layers.0.self_attn.q_proj.weight: not in the index, found in model-00001-of-00002.safetensors
  change:  download the folder again\
""")),
    (80, "index names another file", index(lambda m: m.update({EMBEDDING: SECOND, Q: FIRST})), snapshot("""\
model/model.safetensors.index.json: index and files differ for 1 tensors
  seen:    model.embed_tokens.weight: in model-00002-of-00002.safetensors according to the index, found in model-00001-of-00002.safetensors
  change:  download the folder again\
""")),
    (80, "index empty", text_of(INDEX, lambda raw: json.dumps(MORE).encode()), snapshot('model/model.safetensors.index.json: not a safetensors index (weight_map: tensor -> file)')),
    (80, "index no JSON", text_of(INDEX, lambda raw: b"{"), snapshot("""\
model/model.safetensors.index.json, line 1: not valid JSON
  seen:    Expecting property name enclosed in double quotes\
""")),
    (80, "index a list", text_of(INDEX, lambda raw: b"[]"), snapshot("""\
model/model.safetensors.index.json: not a JSON object
  seen:    list\
""")),
    (80, "index with numbers", index(lambda m: m.update({Q: 3})), snapshot("""\
model/model.safetensors.index.json: refers to a file outside the folder
  seen:    3
  allowed: names such as a.safetensors\
""")),
    (80, "tensor gone from file and index", tensors(lambda h: h.pop(Q)), snapshot("""\
model: the checkpoint lacks 1 tensors
  seen:    model.layers.0.self_attn.q_proj.weight
  change:  check that config.json belongs to these weights, or download the folder again\
""")),
    (80, "tensor in two files", header(lambda c: c.update({EMBEDDING: c.pop(min(c.keys() - {"__metadata__"}))})),
     snapshot("""\
model/model-00002-of-00002.safetensors: contains a tensor that is also in model-00001-of-00002.safetensors
  seen:    model.embed_tokens.weight\
""")),
    (81, "extra tensor", tensors(lambda h: h.update({"model.evil": torch.zeros(2)})), snapshot("""\
model: the checkpoint has 1 tensors that the architecture does not have
  seen:    model.evil
  change:  check that config.json belongs to these weights, or download the folder again\
""")),
    (82, "another shape", tensors(lambda h: h.update({Q: torch.zeros(3, 64)})), snapshot("""\
model/model-00001-of-00002.safetensors: tensor model.layers.0.self_attn.q_proj.weight does not fit the architecture in config.json
  seen:    F32 (3, 64)
  allowed: floating point (64, 64)\
""")),
    (82, "transposed", tensors(lambda h: h.update({Q: torch.zeros(64, 64, 1)})), snapshot("""\
model/model-00001-of-00002.safetensors: tensor model.layers.0.self_attn.q_proj.weight does not fit the architecture in config.json
  seen:    F32 (64, 64, 1)
  allowed: floating point (64, 64)\
""")),
    (82, "vocabulary", config(vocab_size=256), snapshot("""\
model/model-00001-of-00002.safetensors: tensor model.embed_tokens.weight does not fit the architecture in config.json
  seen:    F32 (128, 64)
  allowed: floating point (256, 64)\
""")),
    (83, "fewer layers in config", config(num_hidden_layers=1), snapshot("""\
model: the checkpoint has 9 tensors that the architecture does not have
  seen:    model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight
  change:  check that config.json belongs to these weights, or download the folder again\
""")),
    (83, "more layers in config", config(num_hidden_layers=3), snapshot("""\
model: the checkpoint lacks 9 tensors
  seen:    model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, model.layers.2.mlp.gate_proj.weight
  change:  check that config.json belongs to these weights, or download the folder again\
""")),
    (83, "another architecture", config(model_type="gpt2"), snapshot("""\
model: the checkpoint lacks 28 tensors
  seen:    transformer.h.0.attn.c_attn.bias, transformer.h.0.attn.c_attn.weight, transformer.h.0.attn.c_proj.bias
  change:  check that config.json belongs to these weights, or download the folder again\
""")),
    (83, "experts in config", config(model_type="mixtral", num_local_experts=4), snapshot("""\
model: the checkpoint lacks 6 tensors
  seen:    model.layers.0.mlp.experts.down_proj, model.layers.0.mlp.experts.gate_up_proj, model.layers.0.mlp.gate.weight
  change:  check that config.json belongs to these weights, or download the folder again\
""")),
    (84, "int8", tensors(lambda h: h.update({Q: h[Q].to(torch.int8)})), snapshot("""\
model/model-00001-of-00002.safetensors: tensor model.layers.0.self_attn.q_proj.weight does not fit the architecture in config.json
  seen:    I8 (64, 64)
  allowed: floating point of 16 bits or more: F32, F16, BF16, F64\
""")),
    (84, "fp8", tensors(lambda h: h.update({Q: h[Q].to(torch.float8_e4m3fn)})), snapshot("""\
model/model-00001-of-00002.safetensors: tensor model.layers.0.self_attn.q_proj.weight does not fit the architecture in config.json
  seen:    F8_E4M3 (64, 64)
  allowed: floating point of 16 bits or more: F32, F16, BF16, F64\
""")),
    (85, "GPTQ", config(quantization_config={"quant_method": "gptq"}), snapshot("""\
model/config.json: the checkpoint is already quantised
  seen:    quantization_config: gptq
  allowed: 16- or 32-bit weights, which solotune quantises itself
  change:  use the original model, which is not quantised\
""")),
    (85, "unknown method", config(quantization_config={"quant_method": "evil"}), snapshot("""\
model/config.json: the checkpoint is already quantised
  seen:    quantization_config: evil
  allowed: 16- or 32-bit weights, which solotune quantises itself
  change:  use the original model, which is not quantised\
""")),
    (85, "no method", config(quantization_config="yes"), snapshot("""\
model/config.json: the checkpoint is already quantised
  seen:    quantization_config: yes
  allowed: 16- or 32-bit weights, which solotune quantises itself
  change:  use the original model, which is not quantised\
""")),
    (86, "a pickle alone", pickle_alone, snapshot("""\
model: no weights in safetensors
  seen:    pytorch_model.bin
  allowed: *.safetensors; formats that can run code are not read\
""")),
    (87, "../", index(lambda m: m.update({Q: "../elsewhere.safetensors"})), snapshot("""\
model/model.safetensors.index.json: refers to a file outside the folder
  seen:    ../elsewhere.safetensors
  allowed: names such as a.safetensors\
""")),
    (87, "absolute", index(lambda m: m.update({Q: "/etc/passwd"})), snapshot("""\
model/model.safetensors.index.json: refers to a file outside the folder
  seen:    /etc/passwd
  allowed: names such as a.safetensors\
""")),
    (87, "home", index(lambda m: m.update({Q: "~/a.safetensors"})), snapshot("""\
model/model.safetensors.index.json: refers to a file outside the folder
  seen:    ~/a.safetensors
  allowed: names such as a.safetensors\
""")),
    (87, "a pickle", index(lambda m: m.update({Q: "pytorch_model.bin"})), snapshot("""\
model/model.safetensors.index.json: refers to a file outside the folder
  seen:    pytorch_model.bin
  allowed: names such as a.safetensors\
""")),
    (87, "NUL", index(lambda m: m.update({Q: "a\0.safetensors"})), snapshot("""\
model: a weight file is missing
  seen:    a␀.safetensors
  change:  download the folder again\
""")),
    (87, "link out", linked_out, snapshot("""\
model/model-00002-of-00002.safetensors: a link to a file outside the folder
  seen:    <tmp>/elsewhere.safetensors
  allowed: files in the folder itself, and links of the hub's cache
  change:  copy the file into the folder\
""")),
    (87, "link out, config", lambda f: ((f / "config.json").rename(f.parent / "c.json"),
     (f / "config.json").symlink_to("../c.json")), snapshot("""\
model/config.json: a link to a file outside the folder
  seen:    <tmp>/c.json
  allowed: files in the folder itself, and links of the hub's cache
  change:  copy the file into the folder\
""")),
    (87, "FIFO", lambda f: (unlink(SECOND)(f), os.mkfifo(f / SECOND)), snapshot('model/model-00002-of-00002.safetensors: not a regular file')),
    (87, "folder", lambda f: (unlink(SECOND)(f), (f / SECOND).mkdir()), snapshot('model/model-00002-of-00002.safetensors: not a regular file')),
    (87, "device", lambda f: (unlink("config.json")(f), (f / "config.json").symlink_to("/dev/zero")), snapshot('model/config.json: not a regular file')),
    (88, "auto_map", config(auto_map={"AutoModelForCausalLM": "evil.Evil"}), snapshot("""\
model/config.json: auto_map can make a loader run code from the model folder or from elsewhere
  seen:    auto_map: {'AutoModelForCausalLM': 'evil.Evil'}
  allowed: architectures of the installed transformers
  change:  remove auto_map if the model has such an architecture; otherwise use another model\
""")),
    (88, "auto_map elsewhere", config(auto_map={"AutoConfig": "org/evil--e.E"}), snapshot("""\
model/config.json: auto_map can make a loader run code from the model folder or from elsewhere
  seen:    auto_map: {'AutoConfig': 'org/evil--e.E'}
  allowed: architectures of the installed transformers
  change:  remove auto_map if the model has such an architecture; otherwise use another model\
""")),
    (88, "trust_remote_code", config(trust_remote_code=True), snapshot("""\
model/config.json: trust_remote_code can make a loader run code from the model folder or from elsewhere
  seen:    trust_remote_code: True
  allowed: architectures of the installed transformers
  change:  remove trust_remote_code if the model has such an architecture; otherwise use another model\
""")),
    (88, "attention kernel", config(attn_implementation="org/kernel"), snapshot("""\
model/config.json: attn_implementation can make a loader run code from the model folder or from elsewhere
  seen:    attn_implementation: 'org/kernel'
  allowed: architectures of the installed transformers
  change:  remove attn_implementation if the model has such an architecture; otherwise use another model\
""")),
    (88, "_attention kernel", config(_attn_implementation="org/k"), snapshot("""\
model/config.json: _attn_implementation can make a loader run code from the model folder or from elsewhere
  seen:    _attn_implementation: 'org/k'
  allowed: architectures of the installed transformers
  change:  remove _attn_implementation if the model has such an architecture; otherwise use another model\
""")),
    (88, "internal", config(_attn_implementation_internal="org/k"), snapshot("""\
model/config.json: _attn_implementation_internal can make a loader run code from the model folder or from elsewhere
  seen:    _attn_implementation_internal: 'org/k'
  allowed: architectures of the installed transformers
  change:  remove _attn_implementation_internal if the model has such an architecture; otherwise use another model\
""")),
    (88, "experts kernel", config(experts_implementation="org/k"), snapshot("""\
model/config.json: experts_implementation can make a loader run code from the model folder or from elsewhere
  seen:    experts_implementation: 'org/k'
  allowed: architectures of the installed transformers
  change:  remove experts_implementation if the model has such an architecture; otherwise use another model\
""")),
    (88, "deep inside", config(text_config={"attn_implementation": {"": "org/k"}}), snapshot("""\
model/config.json: text_config.attn_implementation can make a loader run code from the model folder or from elsewhere
  seen:    text_config.attn_implementation: {'': 'org/k'}
  allowed: architectures of the installed transformers
  change:  remove text_config.attn_implementation if the model has such an architecture; otherwise use another model\
""")),
    (88, "kernel_config", config(kernel_config={"RMSNorm": "org/k:x"}), snapshot("""\
model/config.json: kernel_config can make a loader run code from the model folder or from elsewhere
  seen:    kernel_config: {'RMSNorm': 'org/k:x'}
  allowed: architectures of the installed transformers
  change:  remove kernel_config if the model has such an architecture; otherwise use another model\
""")),
    (88, "use_kernels", config(use_kernels=True), snapshot("""\
model/config.json: use_kernels can make a loader run code from the model folder or from elsewhere
  seen:    use_kernels: True
  allowed: architectures of the installed transformers
  change:  remove use_kernels if the model has such an architecture; otherwise use another model\
""")),
    (88, "_target_", config(rope_scaling={"_target_": "os.system"}), snapshot("""\
model/config.json: rope_scaling._target_ can make a loader run code from the model folder or from elsewhere
  seen:    rope_scaling._target_: 'os.system'
  allowed: architectures of the installed transformers
  change:  remove rope_scaling._target_ if the model has such an architecture; otherwise use another model\
""")),
    (88, "custom pipelines", config(custom_pipelines={"x": {"impl": "evil.P"}}), snapshot("""\
model/config.json: custom_pipelines can make a loader run code from the model folder or from elsewhere
  seen:    custom_pipelines: {'x': {'impl': 'evil.P'}}
  allowed: architectures of the installed transformers
  change:  remove custom_pipelines if the model has such an architecture; otherwise use another model\
""")),
    (88, "line break in model_type", config(model_type="llama\nimport os"), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    model_type: 'llama\\nimport os'
  allowed: an architecture of the installed transformers; code from a model folder never runs\
""")),
    (88, "model_type a path", config(model_type="../evil"), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    model_type: '../evil'
  allowed: an architecture of the installed transformers; code from a model folder never runs\
""")),
    (88, "model_type a list", config(model_type=["llama"]), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    model_type: ['llama']
  allowed: an architecture of the installed transformers; code from a model folder never runs\
""")),
    (88, "a method replaced", config(to_dict="x"), snapshot("""\
model/config.json: to_dict is not a setting of this architecture
  seen:    to_dict: 'x'
  change:  remove to_dict\
""")),
    (88, "an attribute map", config(attribute_map={"a": "b"}), snapshot("""\
model/config.json: attribute_map is not a setting of this architecture
  seen:    attribute_map: {'a': 'b'}
  change:  remove attribute_map\
""")),
    (89, "cut", text_of("config.json", lambda raw: raw[:200]), snapshot("""\
model/config.json, line 11: not valid JSON
  seen:    Unterminated string starting at\
""")),
    (89, "empty", text_of("config.json", lambda raw: b""), snapshot("""\
model/config.json, line 1: not valid JSON
  seen:    Expecting value\
""")),
    (89, "UTF-16", text_of("config.json", lambda raw: raw.decode().encode("utf-16")), snapshot("""\
model/config.json: not valid JSON
  seen:    'utf-8' codec can't decode byte 0xff in position 0: invalid start byte\
""")),
    (89, "a list", text_of("config.json", lambda raw: b"[]"), snapshot("""\
model/config.json: not a JSON object
  seen:    list\
""")),
    (89, "key twice", text_of("config.json", lambda raw: raw.rstrip()[:-1] + b', "hidden_size": 8}'), snapshot("""\
model/config.json: not valid JSON
  seen:    the key 'hidden_size' appears twice\
""")),
    (89, "NaN", config(initializer_range=float("nan")), snapshot("""\
model/config.json: not valid JSON
  seen:    NaN is not JSON\
""")),
    (89, "a text for a number", config(hidden_size="64"), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str (value: '64')\
""")),
    (89, "a list for a number", config(num_attention_heads=[4]), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    Validation error for field 'num_attention_heads': TypeError: Field 'num_attention_heads' expected int, got list (value: [4])\
""")),
    (89, "no number", config(num_hidden_layers=None), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    Validation error for field 'num_hidden_layers': TypeError: Field 'num_hidden_layers' expected int, got NoneType (value: None)\
""")),
    (89, "10^9 layers", config(num_hidden_layers=10**9), snapshot("""\
model/config.json: num_hidden_layers is too large
  seen:    1000000000
  allowed: at most 2,000\
""")),
    (89, "10^9 wide", config(hidden_size=10**9), snapshot("""\
model/config.json: hidden_size is too large
  seen:    1000000000
  allowed: at most 33,554,432\
""")),
    (89, "10^12 words", config(vocab_size=10**12), snapshot("""\
model/config.json: vocab_size is too large
  seen:    1000000000000
  allowed: at most 33,554,432\
""")),
    (89, "0 heads", config(num_attention_heads=0), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    integer modulo by zero\
""")),
    (89, "layers below 0", config(num_hidden_layers=-1), snapshot("""\
model: the checkpoint has 18 tensors that the architecture does not have
  seen:    model.layers.0.input_layernorm.weight, model.layers.0.mlp.down_proj.weight, model.layers.0.mlp.gate_proj.weight
  change:  check that config.json belongs to these weights, or download the folder again\
""")),
    (89, "dtype a module", config(torch_dtype="hub"), snapshot("""\
model/config.json: torch_dtype is not a floating-point type
  seen:    'hub'
  allowed: float32, float16, bfloat16, float64\
""")),
    (89, "no model_type", config(model_type=None), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    model_type: None
  allowed: an architecture of the installed transformers; code from a model folder never runs\
""")),
    (89, "2 MiB", config(padding="x" * (2 << 20)), snapshot("""\
model/config.json: too large
  seen:    2,097,807 bytes
  allowed: at most 1,048,576 bytes\
""")),
    (89, "missing", unlink("config.json"), snapshot("""\
model: no config.json, so this is not a model folder
  allowed: a Hugging Face model folder\
""")),
    (89, "generation config", lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'),
     snapshot("""\
model/generation_config.json: eos_token_id is not a token id
  seen:    'x'\
""")),
]  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: f"{case[0]} {case[1]}")
def test_damaged_models_are_refused(case: tuple[int, str, Change, str], at_door: AtDoor) -> None:
    number, what, change, message = case
    change(Path("model"))
    shown = at_door()
    assert error_in(shown) == message
    if number != 79 and what != "generation config":  # these two are seen as the model loads
        assert "reading data" not in shown, "refused before anything is spent"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"attn_implementation": "org/k"},
            snapshot("""\
model/config.json: attn_implementation can make a loader run code from the model folder or from elsewhere
  seen:    attn_implementation: 'org/k'
  allowed: architectures of the installed transformers
  change:  remove attn_implementation if the model has such an architecture; otherwise use another model\
"""),
        ),
        (
            {"auto_map": {}},
            snapshot("""\
model/config.json: auto_map can make a loader run code from the model folder or from elsewhere
  seen:    auto_map: {}
  allowed: architectures of the installed transformers
  change:  remove auto_map if the model has such an architecture; otherwise use another model\
"""),
        ),
        (
            {"text_config": {"use_kernels": 1}},
            snapshot("""\
model/config.json: text_config.use_kernels can make a loader run code from the model folder or from elsewhere
  seen:    text_config.use_kernels: 1
  allowed: architectures of the installed transformers
  change:  remove text_config.use_kernels if the model has such an architecture; otherwise use another model\
"""),
        ),
    ],
    ids=["kernel", "auto_map", "deep inside"],
)
def test_88_the_reader_of_config_json_refuses_code_itself(keys: dict[str, Any], message: str, at_door: AtDoor) -> None:
    """The tokenizer's door, through which `train` comes as well, is not the only one."""
    config(**keys)(Path("model"))
    with pytest.raises(InputError) as caught:
        read_config(Path("model"))
    assert str(caught.value) == message


def test_60_a_rank_above_the_models_sizes(at_door: AtDoor) -> None:
    assert error_in(at_door(lora_r=65)) == snapshot("""\
config.yaml line 1, lora_r: larger than the layer model.layers.0.self_attn.q_proj
  seen:    lora_r: 65
  allowed: at most 64: the layer is 64 x 64
  change:  use a smaller lora_r, or remove the layer from lora_target_modules\
""")


def test_78_a_flipped_bit_is_told_where_a_fingerprint_reaches(at_door: AtDoor) -> None:
    """safetensors has no checksum: a bit inside a tensor changes nothing that is known; other weights do."""
    before = fingerprint_of(Path("model"))
    assert before == fingerprint_of(Path("model"))
    for change in (config(rms_norm_eps=1e-3), tensors(lambda h: h.update({Q: h[Q] * 1.001}))):
        shutil.copytree("model", "other")
        change(Path("other"))
        assert fingerprint_of(Path("other")) != before
        shutil.rmtree("other")


def test_links_of_the_hubs_cache_are_followed_and_no_others(at_door: AtDoor, sharded: Path) -> None:
    shutil.rmtree("model")
    inside, blobs = Path("hub/models--a--b/snapshots/abc"), Path("hub/models--a--b/blobs")
    inside.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        shutil.copy(path, blobs / str(number))
        (inside / path.name).symlink_to(f"../../blobs/{number}")
    at_door(code=0, model_name_or_path=str(inside))
    shutil.rmtree("run")
    Path("secret.json").write_bytes((inside / "config.json").read_bytes())
    (inside / "config.json").unlink()
    (inside / "config.json").symlink_to("../../../../secret.json")
    assert error_in(at_door(model_name_or_path=str(inside))) == snapshot("""\
hub/models--a--b/snapshots/abc/config.json: a link to a file outside the folder
  seen:    <tmp>/secret.json
  allowed: files in the folder itself, and links of the hub's cache
  change:  copy the file into the folder\
""")


def test_a_large_finite_weight_is_no_false_alarm() -> None:
    tensor = torch.full((64, 64), 3e38)
    weights.check_finite("m", "w", tensor)
    weights.check_finite("m", "w", torch.tensor([65504.0] * 5000, dtype=torch.float16))
    weights.check_finite("m", "w", torch.tensor([3e38, -3e38, 0.0], dtype=torch.bfloat16))
    weights.check_finite("m", "w", torch.zeros(0))
