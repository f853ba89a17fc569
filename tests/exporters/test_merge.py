"""Merged weights against PEFT's merge, shards, files beside the weights, and writes that are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import save_tokenizer
from transformers import AutoModelForCausalLM

from solotune.errors import InputError
from solotune.exporters import merge as merging
from solotune.exporters.base_tensors import BaseTensors
from solotune.exporters.merge import DEQUANTIZED, ORIGINAL, REQUANTIZED, Merge, write_merged
from solotune.exporters.source import ExportSource, open_source
from solotune.hub.safetensors_header import read_header
from solotune.model.frozen_linear import FrozenLinear
from solotune.run import fs_ops
from solotune.run.atomic_io import whole_folder
from solotune.run.manifest import check_folder

IDS = torch.arange(3, 60)[None]


def written(
    source: ExportSource, target: Path, into: str = ORIGINAL, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Merge into a folder; its tensors."""
    tensors = BaseTensors.of(source.base, source.config)
    tensors.check(source.adapter, "the adapter")
    with whole_folder(target) as folder:
        write_merged(source, tensors, folder, Merge.of(source, into, dtype), lambda *_: None)
    return {name: tensor for path in sorted(target.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def adapter_on(base: Path, folder: Path, **settings: Any) -> Any:
    """A PEFT model with random A and B, saved in `folder`."""
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(str(folder))
    return model


@pytest.fixture
def with_tokenizer(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """family -> a copy of its model with a tokenizer beside it."""

    def copy(family: str) -> Path:
        shutil.copytree(model_folder(family), tmp_path / family)
        save_tokenizer(tmp_path / family)
        return tmp_path / family

    return copy


@pytest.mark.parametrize("family", ["llama_tied", "gemma3", "phi", "phi3", "gpt2", "neox", "mixtral", "opt", "falcon"])
def test_merged_weights_are_those_that_peft_merges(
    family: str, with_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    base = with_tokenizer(family)
    targets = ["q_proj", "o_proj"] if family == "mixtral" else "all-linear"  # PEFT's all-linear adapts experts too
    theirs = adapter_on(base, tmp_path / "theirs", use_rslora=True, target_modules=targets)
    found = written(open_source(tmp_path / "theirs", base=str(base)), tmp_path / "merged")
    assert found.keys() == {name for path in base.glob("*.safetensors") for name in load_file(path)}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    expected = theirs.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name].bfloat16().float(), rtol=0.008, atol=1e-6)  # one rounding


def test_dequantized_is_what_was_trained_and_the_others_are_not(run: Path, tmp_path: Path) -> None:
    source = open_source(run)
    trained = source.load().module.eval()
    with torch.no_grad():
        expected = trained(IDS).logits
    far = {}
    for into in (ORIGINAL, DEQUANTIZED, REQUANTIZED):
        written(source, tmp_path / into, into)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / into, dtype=torch.float32)
        with torch.no_grad():
            far[into] = (merged(IDS).logits - expected).abs().max().item()
    assert far[DEQUANTIZED] < 0.02 < 5 * far[DEQUANTIZED] < min(far[ORIGINAL], far[REQUANTIZED])
    q = "model.layers.0.self_attn.q_proj"
    codes = trained.get_submodule(q).base
    assert isinstance(codes, FrozenLinear)
    W = codes.storage.dense(torch.float32) + source.adapter.delta(q)
    found = load_file(tmp_path / DEQUANTIZED / "model.safetensors")[f"{q}.weight"]
    assert torch.equal(found, W.bfloat16())


def test_threads_and_rows_at_a_time_change_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, before = open_source(run), torch.get_num_threads()
    one = {into: written(source, tmp_path / into, into) for into in (ORIGINAL, DEQUANTIZED)}
    monkeypatch.setattr(merging, "numbers_at_once", lambda: 300)  # four rows of 64
    torch.set_num_threads(3)
    try:
        for into, expected in one.items():
            found = written(source, tmp_path / f"{into}-3", into)
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    finally:
        torch.set_num_threads(before)


def test_the_shards_are_the_base_s_and_a_large_one_is_split(
    run: Path, export_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(open_source(run), tmp_path / "whole")
    monkeypatch.setattr(merging, "SHARD_BYTES", 60_000)
    parts = written(open_source(run), tmp_path / "parts")
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    for name, file in index["weight_map"].items():
        assert name in read_header(tmp_path / "parts" / file)
    assert all((tmp_path / "parts" / file).stat().st_size < 62_000 for file in files) and len(files) > 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "parts")

    # of a base that has shards
    monkeypatch.undo()
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(export_base).save_pretrained(sharded, max_shard_size="70KB")
    save_tokenizer(sharded)
    source = open_source(run / "adapter", base=str(sharded), base_precision="bf16")
    again = written(source, tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").glob("*.safetensors")) == sorted(
        path.name for path in sharded.glob("*.safetensors")
    )
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_the_folder_is_complete_and_names_no_machine(run: Path, export_base: Path, tmp_path: Path) -> None:
    source = open_source(run)
    raw = {**source.base.config, "_name_or_path": str(export_base), "torch_dtype": "float32"}
    source.base.__dict__["config"] = raw
    source.base.__dict__["generation_config"] = {"temperature": 0.6, "do_sample": True, "eos_token_id": [2, 7]}
    source.__dict__.pop("stop_ids", None)
    written(source, tmp_path / "merged")
    config = json.loads((tmp_path / "merged/config.json").read_text())
    assert config["dtype"] == "bfloat16" and not {"torch_dtype", "quantization_config", "_name_or_path"} & config.keys()
    generation = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 7] and generation["temperature"] == 0.6
    assert generation["pad_token_id"] == source.tokenizer.pad_token_id
    assert (tmp_path / "merged/chat_template.jinja").read_text() == source.tokenizer.chat_template
    for path in (tmp_path / "merged").iterdir():
        content = path.read_bytes()
        assert str(export_base).encode() not in content and b"user-name" not in content, path.name
    assert {path.suffix for path in (tmp_path / "merged").iterdir()} == {".json", ".jinja", ".safetensors"}


def test_head_and_embedding_that_differ_are_not_tied_again(
    with_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    base = with_tokenizer("llama_tied")
    held = load_file(base / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"] * 2
    save_file(held, base / "model.safetensors", {"format": "pt"})
    adapter_on(base, tmp_path / "theirs")
    found = written(open_source(tmp_path / "theirs", base=str(base)), tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["tie_word_embeddings"] is False
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert torch.equal(merged.lm_head.weight, found["lm_head.weight"])


# --- bad input


def edited(base: Path, name: str, value: float) -> None:
    held = load_file(base / "model.safetensors")
    held[name].view(-1)[:1].fill_(value)
    save_file(held, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize(
    ("value", "words", "change"),
    [(1e6, "too large for float16", "--dtype bf16"), (torch.inf, "is not finite", "download the folder again")],
)
def test_numbers_that_float16_does_not_hold_are_refused(
    name: str, value: float, words: str, change: str, with_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    base = with_tokenizer("llama")
    adapter_on(base, tmp_path / "theirs")
    edited(base, name, value)
    source = open_source(tmp_path / "theirs", base=str(base))
    with pytest.raises(InputError, match=words) as caught:
        written(source, tmp_path / "merged", dtype=torch.float16)
    assert change in str(caught.value.change)
    assert not list(tmp_path.glob(".merged*")) and not (tmp_path / "merged").exists()


def test_an_architecture_whose_linears_are_converted_has_no_dequantized_base(
    with_tokenizer: Callable[[str], Path], tmp_path: Path
) -> None:
    base = with_tokenizer("mixtral")
    adapter_on(base, tmp_path / "theirs", target_modules=["q_proj"])
    source = open_source(tmp_path / "theirs", base=str(base), base_precision="nf4")
    tensors = BaseTensors.of(source.base, source.config)
    assert tensors.has_every_linear  # its attention; experts are no linear layers, and are not quantised
    fewer = BaseTensors([one for one in tensors.all if one.layer is None], tensors.linears, False)
    with pytest.raises(InputError, match="cannot be written for this architecture"):
        fewer.check_quantised()
    with pytest.raises(InputError, match="q_proj in another form"):
        fewer.check(source.adapter, "the adapter")


def killing_at(instant: int) -> Callable[..., None]:
    """A hook that kills this process at an operation."""
    left = iter(range(instant))

    def hook(*_: object) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def test_a_kill_at_any_operation_leaves_no_folder_that_passes_for_whole(run: Path, tmp_path: Path) -> None:
    source = open_source(run)
    operations: list[str] = []
    with fs_ops.watched(lambda kind, *_: operations.append(kind)):
        written(source, tmp_path / "counted")
    assert len(operations) > 20
    target = tmp_path / "merged"
    for instant in [*range(0, len(operations), 5), len(operations) - 1]:
        if os.fork() == 0:
            with fs_ops.watched(killing_at(instant)):
                written(source, target)
            os._exit(1)
        assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL
        if target.exists():  # only after the rename, when it is whole
            assert check_folder(target) == [] and instant == len(operations) - 1
    shutil.rmtree(target, ignore_errors=True)
    written(source, target)  # over what the killed ones left
    assert check_folder(target) == [] and not list(tmp_path.glob(".merged*"))
