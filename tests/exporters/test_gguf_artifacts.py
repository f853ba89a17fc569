"""GGUF and Ollama folders of an export: what is written where, and what is passed on; engines are in their own tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import solotune
from solotune.errors import InputError
from solotune.exporters import adapter_gguf, export_plan, gguf, gguf_artifacts, parity, write_artifacts
from solotune.exporters.artifact import Parity
from solotune.exporters.gguf import gguf_bytes
from solotune.model.adapter import Adapter
from solotune.run.atomic_io import Folder
from solotune.run.manifest import check_folder


@pytest.fixture
def copied(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run; converter and engines answer at once."""
    equal = Parity("transformers", token_ids_equal=True, conversations=1)
    monkeypatch.setattr(write_artifacts, "folder_parity", lambda *_: (equal, []))
    monkeypatch.setattr(parity, "find_spec", lambda name: None)
    monkeypatch.setattr(export_plan.gguf, "check_convertible", lambda *_, **__: None)

    def write_gguf(merged: Path, target: Folder, quantization: str, *, name: str = "model", **_: Any) -> Path:
        assert (merged / "config.json").is_file()
        target.write(file := f"{name}-{quantization}.gguf", f"GGUF {quantization}")
        return target.path / file

    def gguf_parity(path: Path, quantization: str, *arguments: Any, **_: Any) -> Any:
        (ids, logits), *_ = arguments[2]
        assert logits.shape == (len(ids), 128) and path.is_file()
        problems = ["mean KL is 0.2"] if quantization == "q8_0" else []
        return Parity("llama.cpp", token_ids_equal=True, mean_kl=1e-5, top1_agreement=1.0), problems, ["a note"]

    monkeypatch.setattr(gguf_artifacts, "write_gguf", write_gguf)
    monkeypatch.setattr(gguf_artifacts, "gguf_parity", gguf_parity)
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_gguf_and_ollama_are_made_of_the_merged_model(copied: Path) -> None:
    result = solotune.export(copied, "ollama,gguf", quantization="f16,f32")
    assert [one.kind for one in result.artifacts] == ["merged", "gguf", "ollama"]
    assert {choice.key: choice.value for choice in result.choices}["merged"] == "written too"
    root = copied / "export"
    assert {path.name for path in (root / "gguf").glob("*.gguf")} == {"model-f16.gguf", "model-f32.gguf"}
    assert (root / "ollama/model-f16.gguf").samefile(root / "gguf/model-f16.gguf")  # one file on the disk
    lines = (root / "ollama/Modelfile").read_text()
    assert lines.startswith("FROM ./model-f16.gguf") and 'SYSTEM """Be exact."""' in lines
    assert 'PARAMETER stop """<|im_end|>"""' in lines
    assert all(check_folder(root / kind) == [] for kind in ("merged", "gguf", "ollama"))
    assert result.artifacts[2].next_commands == [f"ollama create run -f {root / 'ollama/Modelfile'}"]
    assert result.artifacts[1].notes == ["f16: a note", "f32: a note"]
    assert solotune.verify(copied).ok


def test_an_adapter_as_gguf_lies_beside_the_base_of_its_training(
    copied: Path, export_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def write_lora_gguf(adapter: Path, base: Path, target: Folder) -> Path:
        seen["weights"] = load_file(base / "model.safetensors")
        target.write("adapter.gguf", "LoRA")
        return target.path / "adapter.gguf"

    def gguf_parity(path: Path, quantization: str, *arguments: Any, lora: Path, texts: Any, **_: Any) -> Any:
        seen.update(lora=lora.read_text(), rows=arguments[2], texts=list(texts))
        return Parity("llama.cpp", token_ids_equal=True, mean_kl=1e-5), [], ["a note"]

    monkeypatch.setattr(adapter_gguf, "write_lora_gguf", write_lora_gguf)
    monkeypatch.setattr(adapter_gguf, "gguf_parity", gguf_parity)
    monkeypatch.setattr(adapter_gguf, "write_gguf", gguf_artifacts.write_gguf)
    result = solotune.export(copied, "merged,adapter-gguf")
    folder = copied / "export/adapter-gguf"
    files = {path.name for path in folder.iterdir()}
    assert files >= {"base-f16.gguf", "adapter.gguf", "Modelfile", "README.md"} and "base" not in files
    assert check_folder(folder) == []
    assert (folder / "Modelfile").read_text().startswith("FROM ./base-f16.gguf\nADAPTER ./adapter.gguf\n")
    assert "--lora" in result.artifacts[1].next_commands[0] and seen["lora"] == "LoRA" and result.artifacts[1].notes
    assert len(seen["texts"]) == 40 and "Be exact." in seen["texts"][0]

    name = "model.layers.0.self_attn.q_proj"
    merged, adapter = load_file(copied / "export/merged/model.safetensors"), Adapter.read(copied / "adapter")
    W, original = (
        held[f"{name}.weight"].float() for held in (seen["weights"], load_file(export_base / "model.safetensors"))
    )
    assert torch.allclose(W + adapter.delta(name), merged[f"{name}.weight"].float(), atol=0.01)
    assert not torch.equal(W, original)  # 4 bits
    (ids, logits), *_ = seen["rows"]
    module = AutoModelForCausalLM.from_pretrained(copied / "export/merged", dtype=torch.float32)
    with torch.no_grad():
        given = module(torch.tensor([ids])).logits[0]
    assert (given.softmax(-1) - logits.softmax(-1)).abs().max() < 0.03


def test_an_adapter_on_the_head_is_refused_before_anything_is_written(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check_convertible(base: Path, adapter: Adapter, *, is_merged: bool = True) -> None:
        if not is_merged:
            raise InputError("refused")

    monkeypatch.setattr(export_plan.gguf, "check_convertible", check_convertible)
    with pytest.raises(InputError, match="refused"):
        solotune.export(copied, "adapter-gguf")
    assert not (copied / "export").exists()


def test_a_merged_model_that_is_there_is_used_if_nobody_changed_it(copied: Path) -> None:
    solotune.export(copied, "merged")
    before = (copied / "export/merged/manifest.json").stat().st_mtime_ns
    result = solotune.export(copied, "gguf", quantization="q8_0")
    assert (copied / "export/merged/manifest.json").stat().st_mtime_ns == before
    assert not result.ok and result.artifacts[0].problems == ["q8_0: mean KL is 0.2"]
    written = json.loads((copied / "export/export.json").read_text())
    assert written["merge"]["into"] == "dequantized"  # of the export before
    (copied / "export/merged/config.json").write_text("{}")
    with pytest.raises(InputError, match="have changed since the export"):
        solotune.export(copied, "ollama")


def test_the_converter_s_process_gets_paths_that_do_not_depend_on_its_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export_base: Path
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(gguf, "_converter", lambda request, _: asked.append(request) or {"refused": "x", "why": "x"})
    shutil.copytree(export_base, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    Path("made").mkdir()
    with pytest.raises(InputError):
        gguf.write_gguf(Path("model"), Folder(Path("made")), "f16")
    folder, _, _, _, file = asked[0]["convert"]
    assert (folder, file) == (str(tmp_path / "model"), str(tmp_path / "made/model-f16.gguf"))


def test_sizes_are_those_of_the_formats() -> None:
    assert gguf_bytes(1000, "f32") == 4000 and gguf_bytes(1000, "q8_0") == 1070
    assert gguf_bytes(1000, "q4_k_m") == 2830  # made from a 16-bit file beside it
