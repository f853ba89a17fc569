"""GGUF files: refusals before anything is written, the header, and what happens if a converter fails.

The converter here is a stand-in in a real child process; `pytest -m export` runs llama.cpp's own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from exporters.test_sentencepiece_model import tokenizer as pieces
from tiny import save_tokenizer
from transformers import AutoTokenizer

from solotune.errors import CheckError, InputError, StorageError
from solotune.exporters import gguf
from solotune.exporters.sentencepiece_model import sentencepiece_model
from solotune.exporters.tools import CONVERTER, QUANTIZER
from solotune.model.adapter import Adapter, peft_config, tensor_key
from solotune.run.atomic_io import whole_folder
from solotune.run.manifest import check_folder

GGUF = """
import json
class LlamaFileType: ALL_F32 = 0
class GGUFValueType: BOOL, UINT32, STRING = "bool", "uint32", "string"
class GGUFWriter:
    def __init__(self): self.kv_data = [{"tokenizer.ggml.add_bos_token": True, "general.architecture": "llama"}]
    def add_token_list(self, tokens): self.kv_data[0]["tokenizer.ggml.tokens"] = [bytes(t).decode() if isinstance(t, bytes) else t for t in tokens]
    def add_key_value(self, key, value, vtype): self.kv_data[0][key] = value
    def write_header_to_file(self, path=None):
        with open(path, "w") as file: json.dump(self.kv_data[0], file)
class Field:
    def __init__(self, value): self.value = value
    def contents(self): return self.value
class GGUFReader:
    def __init__(self, path): self.fields = {k: Field(v) for k, v in json.load(open(path)).items()}
"""
CONVERSION = """
import os
class ModelType: TEXT = 1
class ModelBase:
    load_hparams = staticmethod(lambda folder, mistral: __import__("json").load(open(folder / "config.json")))
def get_model_architecture(hparams, kind): return hparams["architectures"][0]
class Model:
    def __init__(self, folder, *_, **__): self.folder = folder
    def set_vocab(self):
        if "odd" in self.folder.name: raise NotImplementedError("BPE pre-tokenizer was not recognized - update it")
def get_model_class(name):
    if name == "Killed": os.kill(os.getpid(), 9)
    if name != "LlamaForCausalLM": raise NotImplementedError(name)
    return Model
"""
CONVERT = """
import sys, gguf
def main():
    if sys.argv[3] == "bf16": sys.exit("OSError: No space left on device")
    writer = gguf.GGUFWriter()
    writer.add_token_list(["a", "</s>", b"</s>"])
    writer.write_header_to_file(sys.argv[5])
"""


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for llama.cpp's converter, where the real one would be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    CONVERTER.path.mkdir(parents=True)
    for name, source in (("gguf", GGUF), ("conversion", CONVERSION), ("convert_hf_to_gguf", CONVERT)):
        (CONVERTER.path / f"{name}.py").write_text(source)
    return CONVERTER.path


def model(folder: Path, architecture: str = "LlamaForCausalLM", *, ends: object = 2) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    save_tokenizer(folder)
    return folder


def adapter_on(*modules: str, fan_in_fan_out: bool = False, **changes: object) -> Adapter:
    config = peft_config(
        modules, modules, base=None, revision=None, r=2, alpha=8, dropout=0, use_rslora=False,
        fan_in_fan_out=fan_in_fan_out,
    )  # fmt: skip
    torch.manual_seed(0)
    tensors = {}
    for module in modules:
        tensors[tensor_key(module, "lora_A")] = torch.randn(2, 6)
        tensors[tensor_key(module, "lora_B")] = torch.randn(4, 2)
    return Adapter({**config, **changes}, tensors)


LAYER = "model.layers.0.self_attn.q_proj"


# --- refused before anything is merged


@pytest.mark.parametrize("name", ["iq2_xs", "int4"])
def test_a_quantisation_that_is_not_made_here_is_refused_with_the_command(name: str) -> None:
    with pytest.raises(InputError) as caught:
        gguf.check_quantization(name)
    assert f"llama-quantize model-f16.gguf model-{name}.gguf {name.upper()}" in str(caught.value)
    assert "q4_k_m" in str(caught.value.allowed)


def test_convertible(converter: Path, tmp_path: Path) -> None:
    gguf.check_convertible(model(tmp_path / "base"), adapter_on(LAYER, "lm_head"))


def test_an_architecture_that_the_converter_does_not_know(converter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        gguf.check_convertible(model(tmp_path / "base", "NewForCausalLM"), adapter_on(LAYER))
    assert "does not know this architecture" in str(caught.value) and caught.value.seen == "NewForCausalLM"
    assert "--to merged" in str(caught.value.change)


def test_a_tokenizer_that_it_does_not_recognise(converter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not recognise this tokenizer") as caught:
        gguf.check_convertible(model(tmp_path / "odd"), adapter_on(LAYER))
    assert str(caught.value.seen).startswith("BPE pre-tokenizer was not recognized")


def test_a_converter_that_is_killed(converter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="converter fails") as caught:
        gguf.check_convertible(model(tmp_path / "base", "Killed"), adapter_on(LAYER))
    assert caught.value.seen == "exit code -9"


def test_a_converter_that_hangs_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no result within 0 s"):
        gguf._run(["sleep", "30"], 0.05, {"PATH": "/usr/bin:/bin"})


@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens", "transformer.wte"])
def test_an_adapter_on_head_or_embedding_is_no_file_of_its_own(module: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="head or embedding") as caught:
        gguf.check_convertible(tmp_path, adapter_on(LAYER, module), is_merged=False)
    assert caught.value.seen == module and "--to merged,gguf" in str(caught.value.change)


def test_nor_is_one_of_transposed_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fan_in_fan_out"):
        gguf.check_convertible(tmp_path, adapter_on(LAYER, fan_in_fan_out=True), is_merged=False)


# --- a merged folder


def test_the_header_says_what_was_trained(converter: Path, tmp_path: Path) -> None:
    merged = model(tmp_path / "merged", ends=[2, 0, 1])
    with whole_folder(tmp_path / "out") as target:
        path = gguf.write_gguf(merged, target, "f16")
    header = json.loads((tmp_path / "out" / path.name).read_text())
    prefix = "tokenizer.ggml."
    ends = [header[f"{prefix}{kind}_token_id"] for kind in ("eos", "eot", "eom")]
    assert (path.name, ends) == ("model-f16.gguf", [2, 0, 1])
    assert header[f"{prefix}add_bos_token"] is False and header[f"{prefix}add_eos_token"] is False
    assert "<|im_start|>" in header["tokenizer.chat_template"]
    assert check_folder(tmp_path / "out") == []


def test_tokens_that_llama_cpp_would_take_for_ends_get_other_texts(
    converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf, "renamed_tokens", lambda _: {1: "</s_>", 2: "</s__>"})
    with whole_folder(tmp_path / "out") as target:
        path = gguf.write_gguf(model(tmp_path / "merged"), target, "f16", name="base")
    assert path.name == "base-f16.gguf"
    written = json.loads((tmp_path / "out" / path.name).read_text())["tokenizer.ggml.tokens"]
    assert written == ["a", "</s_>", "</s__>"]


def test_a_run_on_text_has_no_template(converter: Path, tmp_path: Path) -> None:
    assert "tokenizer.chat_template" not in gguf.header_of(model(tmp_path / "merged"), "text")


def test_a_header_that_is_not_what_was_trained_fails(
    converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget = (converter / "gguf.py").read_text().replace("self.kv_data[0][key] = value", "pass")
    (converter / "gguf.py").write_text(forget)
    with pytest.raises(CheckError, match="not what was trained") as caught, whole_folder(tmp_path / "out") as target:
        gguf.write_gguf(model(tmp_path / "merged"), target, "f16")
    assert "eos_token_id is 'None' instead of '2'" in str(caught.value.seen)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said(converter: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"), whole_folder(tmp_path / "out") as target:
        gguf.write_gguf(model(tmp_path / "merged"), target, "bf16")


def test_k_quants_are_made_from_sixteen_bits(converter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$3" = Q4_K_M ] && cp "$1" "$2" || { echo "unknown type $3" >&2; exit 1; }\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    merged = model(tmp_path / "merged")
    with whole_folder(tmp_path / "out") as target:
        gguf.write_gguf(merged, target, "q4_k_m")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "model-q4_k_m.gguf"]
    with pytest.raises(InputError, match="llama-quantize fails") as caught, whole_folder(tmp_path / "other") as target:
        gguf.write_gguf(merged, target, "q6_k")
    assert caught.value.seen == "unknown type Q6_K"


def test_the_pinned_quantizer_is_used_where_path_has_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = QUANTIZER.path / QUANTIZER.keep[0]
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho made >"$2"\n')
    program.chmod(0o755)
    gguf._quantize(tmp_path / "a", tmp_path / "b", "q4_k_m", 10)
    assert (tmp_path / "b").read_text() == "made\n"


# --- an adapter


def test_other_scales_than_alpha_over_r_go_into_b() -> None:
    """llama.cpp knows alpha and the tensors' rank only."""
    for changes in ({"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}):
        adapter = adapter_on(LAYER, "model.layers.0.self_attn.k_proj", **changes)
        plain = gguf.plainly_scaled(adapter)
        for module in adapter.modules:
            A, B = (plain.tensors[tensor_key(module, part)] for part in ("lora_A", "lora_B"))
            assert torch.allclose(8 / 2 * (B @ A), adapter.delta(module))
            assert torch.allclose(plain.delta(module), adapter.delta(module))


def test_a_plain_adapter_stays_as_it_is() -> None:
    adapter = adapter_on(LAYER)
    assert all(tensor is adapter.tensors[key] for key, tensor in gguf.plainly_scaled(adapter).tensors.items())


def test_a_space_after_control_tokens_is_as_in_training(tmp_path: Path) -> None:
    model(tmp_path / "chatml")
    assert "tokenizer.ggml.add_space_prefix" not in gguf.header_of(tmp_path / "chatml", "chat")
    folder = model(tmp_path / "metaspace")
    own = pieces()
    own.chat_template = AutoTokenizer.from_pretrained(tmp_path / "chatml").chat_template
    own.save_pretrained(folder)
    assert gguf.header_of(folder, "chat")["tokenizer.ggml.add_space_prefix"] is False
    assert gguf.header_of(folder, "text")["tokenizer.ggml.add_space_prefix"] is True


def test_the_converter_sees_the_tokenizer_of_the_training(tmp_path: Path) -> None:
    folder = model(tmp_path / "merged")
    pieces().save_pretrained(folder)
    (folder / "tokenizer.model").write_text("another")
    with gguf._for_converter(folder) as seen:
        assert (seen / "tokenizer.model").read_bytes() == sentencepiece_model(pieces())
        assert (seen / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert (folder / "tokenizer.model").read_text() == "another" and not seen.exists()
