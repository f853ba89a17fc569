"""The model's door: entries 74 to 89 of the corpus of bad input, as mutations of one tiny sharded Llama.

Each is refused by `solotune train` with exit 2 and the place named, before a run directory exists and, but for numbers
that are not finite, before a tensor is read. transformers alone loads nine of them without a word.
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
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, chat_rows, save_tokenizer

from solotune import cli, weights
from solotune.architecture import read_config
from solotune.errors import InputError
from solotune.fingerprint import fingerprint_of
from tests.dataset.conftest import peak_kib

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
DAMAGED: list[tuple[int, str, Change, tuple[str, ...]]] = [
    (74, "missing shard", unlink(SECOND), ("a weight file is missing", SECOND)),
    (74, "dangling link", lambda f: (unlink(SECOND)(f), (f / SECOND).symlink_to("gone")), ("missing", SECOND)),
    (75, "empty shard", text_of(SECOND, lambda raw: b""), (SECOND, "0 bytes")),
    (76, "cut by a byte", text_of(SECOND, lambda raw: raw[:-1]), (SECOND, "1 bytes are missing")),
    (76, "cut by half", text_of(SECOND, lambda raw: raw[: len(raw) // 2]), (SECOND, "bytes are missing")),
    (76, "cut in the header", text_of(SECOND, lambda raw: raw[:100]), (SECOND, "a header of")),
    (76, "a byte too many", text_of(SECOND, lambda raw: raw + b"\0"), (SECOND, "1 bytes too many")),
    (77, "header of 2^40", text_of(SECOND, lambda raw: struct.pack("<Q", 1 << 40) + raw[8:]), ("1,099,511,627,776",)),
    (77, "header no JSON", header(lambda content: b"{]"), (SECOND, "not valid JSON")),
    (77, "header deep", header(lambda content: b"[" * 9000), (SECOND, "not valid JSON")),
    (77, "overlap", header(shifted(-4)), (SECOND, "overlaps what is before it")),
    (77, "hole", header(shifted(4)), (SECOND, "leaves a hole before it")),
    (77, "name twice", header(twice), (SECOND, "stands there twice")),
    (77, "shape against bytes", header(lambda c: first_of(c).update(shape=[1])), (SECOND, "not a readable saf")),
    (77, "shape below 0", header(lambda c: first_of(c).update(shape=[-64, -64])), (SECOND, "not a readable saf")),
    (77, "shape of 2^62", header(lambda c: first_of(c).update(shape=[1 << 62, 4])), (SECOND, "not a readable saf")),
    (77, "places as texts", header(lambda c: first_of(c).update(data_offsets=["0", "4"])), (SECOND, "not a read")),
    (77, "no dtype", header(lambda c: first_of(c).pop("dtype")), (SECOND, "not a readable safetensors file")),
    (77, "dtype a list", header(lambda c: first_of(c).update(dtype=["F32"])), (SECOND, "not a readable saf")),
    (77, "past the end", header(lambda c: last_of(c).update(data_offsets=[0, 1 << 50])), (SECOND, "not a readable")),
    (79, "NaN", tensors(with_value(float("nan"))), (f"tensor {Q} is not finite", "1 of 4,096 numbers")),
    (79, "infinity", tensors(with_value(float("inf"))), (f"tensor {Q} is not finite", "1 of 4,096 numbers")),
    (79, "both", tensors(lambda h: h.update({Q: h[Q] / 0 - h[Q] / 0})), (f"tensor {Q} is not finite", "4,096 of")),
    (80, "index names a tensor too many", index(lambda m: m.update({"model.x": FIRST})), ("model.x: ", "in no file")),
    (80, "index lacks a tensor", index(lambda m: m.pop(Q)), (INDEX, f"{Q}: nowhere in the index")),
    (80, "index names another file", index(lambda m: m.update({EMBEDDING: SECOND, Q: FIRST})), (INDEX, "do not agree")),
    (80, "index empty", text_of(INDEX, lambda raw: json.dumps(MORE).encode()), (INDEX, "not a safetensors index")),
    (80, "index no JSON", text_of(INDEX, lambda raw: b"{"), (INDEX, "line 1: not valid JSON")),
    (80, "index a list", text_of(INDEX, lambda raw: b"[]"), (INDEX, "not a JSON object")),
    (80, "index with numbers", index(lambda m: m.update({Q: 3})), (INDEX, "names a file outside", "3")),
    (80, "tensor gone from file and index", tensors(lambda h: h.pop(Q)), ("the checkpoint lacks 1 tensors", Q)),
    (80, "tensor in two files", header(lambda c: c.update({EMBEDDING: c.pop(min(c.keys() - {"__metadata__"}))})),
     ("holds a tensor that", EMBEDDING)),
    (81, "extra tensor", tensors(lambda h: h.update({"model.evil": torch.zeros(2)})), ("does not know", "model.evil")),
    (82, "another shape", tensors(lambda h: h.update({Q: torch.zeros(3, 64)})), (Q, "does not fit", "(3, 64)")),
    (82, "transposed", tensors(lambda h: h.update({Q: torch.zeros(64, 64, 1)})), (f"tensor {Q} does not fit",)),
    (82, "vocabulary", config(vocab_size=256), (f"tensor {EMBEDDING} does not fit", "(256, 64)")),
    (83, "fewer layers in config", config(num_hidden_layers=1), ("does not know, 9 tensors", "model.layers.1.")),
    (83, "more layers in config", config(num_hidden_layers=3), ("lacks 9 tensors", "model.layers.2.")),
    (83, "another architecture", config(model_type="gpt2"), ("the checkpoint lacks", "h.0.")),
    (83, "experts in config", config(model_type="mixtral", num_local_experts=4), ("the checkpoint lacks", "expert")),
    (84, "int8", tensors(lambda h: h.update({Q: h[Q].to(torch.int8)})), (f"tensor {Q} does not fit", "I8 (64, 64)")),
    (84, "fp8", tensors(lambda h: h.update({Q: h[Q].to(torch.float8_e4m3fn)})), (f"tensor {Q} does not", "F8_E4M3")),
    (85, "GPTQ", config(quantization_config={"quant_method": "gptq"}), ("already quantised", "gptq")),
    (85, "unknown method", config(quantization_config={"quant_method": "evil"}), ("already quantised", "evil")),
    (85, "no method", config(quantization_config="yes"), ("already quantised", "yes")),
    (86, "a pickle alone", pickle_alone, ("no weights in safetensors", "pytorch_model.bin", "can run code")),
    (87, "../", index(lambda m: m.update({Q: "../elsewhere.safetensors"})), ("outside the folder", "../elsewhere")),
    (87, "absolute", index(lambda m: m.update({Q: "/etc/passwd"})), ("outside the folder", "/etc/passwd")),
    (87, "home", index(lambda m: m.update({Q: "~/a.safetensors"})), ("outside the folder", "~/a.safetensors")),
    (87, "a pickle", index(lambda m: m.update({Q: "pytorch_model.bin"})), ("outside the folder", "pytorch_model")),
    (87, "NUL", index(lambda m: m.update({Q: "a\0.safetensors"})), ("a weight file is missing", "a␀.safetensors")),
    (87, "link out", linked_out, ("a link that leads out of the folder", "elsewhere.safetensors")),
    (87, "link out, config", lambda f: ((f / "config.json").rename(f.parent / "c.json"),
     (f / "config.json").symlink_to("../c.json")), ("config.json: a link that leads out of the folder",)),
    (87, "FIFO", lambda f: (unlink(SECOND)(f), os.mkfifo(f / SECOND)), (SECOND, "not a regular file")),
    (87, "folder", lambda f: (unlink(SECOND)(f), (f / SECOND).mkdir()), (SECOND, "not a regular file")),
    (87, "device", lambda f: (unlink("config.json")(f), (f / "config.json").symlink_to("/dev/zero")), ("not a reg",)),
    (88, "auto_map", config(auto_map={"AutoModelForCausalLM": "evil.Evil"}), ("auto_map can make a loader run code",)),
    (88, "auto_map elsewhere", config(auto_map={"AutoConfig": "org/evil--e.E"}), ("auto_map", "org/evil")),
    (88, "trust_remote_code", config(trust_remote_code=True), ("trust_remote_code can make",)),
    (88, "attention kernel", config(attn_implementation="org/kernel"), ("attn_implementation", "org/kernel")),
    (88, "_attention kernel", config(_attn_implementation="org/k"), ("_attn_implementation", "org/k")),
    (88, "internal", config(_attn_implementation_internal="org/k"), ("_attn_implementation_internal", "org/k")),
    (88, "experts kernel", config(experts_implementation="org/k"), ("experts_implementation", "org/k")),
    (88, "deep inside", config(text_config={"attn_implementation": {"": "org/k"}}), ("text_config.attn_impl",)),
    (88, "kernel_config", config(kernel_config={"RMSNorm": "org/k:x"}), ("kernel_config can make",)),
    (88, "use_kernels", config(use_kernels=True), ("use_kernels can make",)),
    (88, "_target_", config(rope_scaling={"_target_": "os.system"}), ("rope_scaling._target_ can make",)),
    (88, "custom pipelines", config(custom_pipelines={"x": {"impl": "evil.P"}}), ("custom_pipelines can make",)),
    (88, "line break in model_type", config(model_type="llama\nimport os"), ("config.json", "llama\\nimport os")),
    (88, "model_type a path", config(model_type="../evil"), ("config.json: transformers cannot read it", "../evil")),
    (88, "model_type a list", config(model_type=["llama"]), ("config.json: transformers cannot read it",)),
    (88, "a method replaced", config(to_dict="x"), ("to_dict is no setting of this architecture",)),
    (88, "an attribute map", config(attribute_map={"a": "b"}), ("attribute_map is no setting",)),
    (89, "cut", text_of("config.json", lambda raw: raw[:200]), ("config.json, line", "not valid JSON")),
    (89, "empty", text_of("config.json", lambda raw: b""), ("config.json, line 1: not valid JSON",)),
    (89, "UTF-16", text_of("config.json", lambda raw: raw.decode().encode("utf-16")), ("config.json: not valid JSON",)),
    (89, "a list", text_of("config.json", lambda raw: b"[]"), ("config.json: not a JSON object", "list")),
    (89, "key twice", text_of("config.json", lambda raw: raw.rstrip()[:-1] + b', "hidden_size": 8}'), ("hidden_size",)),
    (89, "NaN", config(initializer_range=float("nan")), ("config.json: not valid JSON", "NaN is not JSON")),
    (89, "a text for a number", config(hidden_size="64"), ("config.json", "hidden_size")),
    (89, "a list for a number", config(num_attention_heads=[4]), ("config.json", "num_attention_heads")),
    (89, "no number", config(num_hidden_layers=None), ("config.json", "num_hidden_layers")),
    (89, "10^9 layers", config(num_hidden_layers=10**9), ("num_hidden_layers is out of all proportion", "2,000")),
    (89, "10^9 wide", config(hidden_size=10**9), ("hidden_size is out of all proportion", "1000000000")),
    (89, "10^12 words", config(vocab_size=10**12), ("vocab_size is out of all proportion",)),
    (89, "0 heads", config(num_attention_heads=0), ("config.json",)),
    (89, "layers below 0", config(num_hidden_layers=-1), ("checkpoint", "does not know")),
    (89, "dtype a module", config(torch_dtype="hub"), ("torch_dtype is no float type", "hub")),
    (89, "no model_type", config(model_type=None), ("config.json: transformers cannot read it", "None")),
    (89, "2 MiB", config(padding="x" * (2 << 20)), ("config.json: too large",)),
    (89, "missing", unlink("config.json"), ("no config.json, so this is not a model folder",)),
    (89, "generation config", lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'),
     ("generation_config.json: eos_token_id is no token id",)),
]  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: f"{case[0]} {case[1]}")
def test_damaged_models_are_refused(case: tuple[int, str, Change, tuple[str, ...]], at_door: AtDoor) -> None:
    number, what, change, words = case
    change(Path("model"))
    shown = at_door()
    for word in words:
        assert word in shown, shown
    if number != 79 and what != "generation config":  # these two are seen as the model loads
        assert "reading data" not in shown, "refused before anything is spent"


@pytest.mark.parametrize(
    "keys", [{"attn_implementation": "org/k"}, {"auto_map": {}}, {"text_config": {"use_kernels": 1}}]
)
def test_88_the_reader_of_config_json_refuses_code_itself(keys: dict[str, Any], at_door: AtDoor) -> None:
    """The tokenizer's door, through which `train` comes as well, is not the only one."""
    config(**keys)(Path("model"))
    with pytest.raises(InputError, match="can make a loader run code"):
        read_config(Path("model"))


def test_60_a_rank_above_the_models_sizes(at_door: AtDoor) -> None:
    assert "config.yaml line 1, lora_r: above the size of model.layers.0.self_attn.q_proj" in at_door(lora_r=65)


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
    snapshot, blobs = Path("hub/models--a--b/snapshots/abc"), Path("hub/models--a--b/blobs")
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    at_door(code=0, model_name_or_path=str(snapshot))
    shutil.rmtree("run")
    Path("secret.json").write_bytes((snapshot / "config.json").read_bytes())
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../../secret.json")
    assert "a link that leads out of the folder" in at_door(model_name_or_path=str(snapshot))


def test_a_large_finite_weight_is_no_false_alarm() -> None:
    tensor = torch.full((64, 64), 3e38)
    weights.check_finite("m", "w", tensor)
    weights.check_finite("m", "w", torch.tensor([65504.0] * 5000, dtype=torch.float16))
    weights.check_finite("m", "w", torch.tensor([3e38, -3e38, 0.0], dtype=torch.bfloat16))
    weights.check_finite("m", "w", torch.zeros(0))
