"""An adapter without a model: its deltas against PEFT's merged weights, its file format, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from solotune.errors import InputError, IntegrityError
from solotune.model.adapter import CONFIG, TENSORS, Adapter, peft_config, tensor_key
from solotune.run.atomic_io import Folder

Q, V, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rsLoRA": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "ranks by pattern": (
        "llama",
        {"target_modules": "all-linear", "rank_pattern": {"v_proj": 2, r"layers\.0\.mlp\..*": 6, Q: 5}},
    ),
    "alphas by pattern": (
        "llama",
        {"target_modules": "all-linear", "alpha_pattern": {"^model.layers.1.*_proj": 3.0, "q_proj": 20},
         "rank_pattern": {"q_proj": 8}, "use_rslora": True},
    ),
    "transposed weights": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "a start that leaves the base": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
}  # fmt: skip


def saved_by_peft(base: Path, folder: Path, **settings: Any) -> PeftModel:
    """A PEFT model with random A and B, saved in `folder`."""
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(**{"r": 4, "lora_alpha": 10, "lora_dropout": 0.1, "task_type": "CAUSAL_LM", **settings}),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(str(folder))
    return model


@pytest.mark.parametrize("case", SETTINGS)
def test_deltas_are_what_peft_merges(case: str, model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    family, settings = SETTINGS[case]
    model = saved_by_peft(model_folder(family), tmp_path, **settings)
    adapter = Adapter.read(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float32).state_dict()
    after = model.merge_and_unload().state_dict()
    changed = {key.removesuffix(".weight") for key in before if not torch.equal(before[key], after[key])}
    assert set(adapter.modules) == changed and changed
    for module in adapter.modules:
        delta = adapter.delta(module)
        expected = after[f"{module}.weight"] - before[f"{module}.weight"]
        expected = expected.T if adapter.fan_in_fan_out else expected  # (out, in), whatever the base keeps
        assert delta.dtype == torch.float32
        torch.testing.assert_close(delta, expected, rtol=0, atol=2e-6)
        assert delta.abs().max() > 1e-2
    assert adapter.fan_in_fan_out is (family == "gpt2")
    with pytest.raises(KeyError):
        adapter.delta("model.layers.9.self_attn.q_proj")


def test_what_is_written_is_what_peft_and_we_read(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = saved_by_peft(model_folder("llama"), tmp_path / "theirs", target_modules=["q_proj"], use_rslora=True)
    adapter = Adapter.read(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    adapter.write(Folder(tmp_path / "ours"))
    again = Adapter.read(tmp_path / "ours")
    assert again.config == adapter.config and again.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in adapter.tensors.items())
    base = AutoModelForCausalLM.from_pretrained(model_folder("llama"), dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "ours").merge_and_unload().state_dict()
    expected = model.merge_and_unload().state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


def test_a_bfloat16_adapter_is_multiplied_in_float32() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(3, 8).bfloat16(), torch.randn(5, 3).bfloat16()
    adapter = Adapter({"r": 3, "lora_alpha": 6}, {tensor_key("m", "lora_A"): A, tensor_key("m", "lora_B"): B})
    assert torch.equal(adapter.delta("m"), 2.0 * (B.float() @ A.float()))


def test_a_config_of_names_alone() -> None:
    usual = {"base": "/a/folder", "revision": "main", "r": 4, "alpha": 8.0, "dropout": 0.0, "use_rslora": False}
    every = ["a.q_proj", "b.q_proj", "a.v_proj", "lm_head"]

    def targets(names: list[str]) -> list[str]:
        return peft_config(names, every, **usual, fan_in_fan_out=False)["target_modules"]

    assert targets(["a.q_proj", "b.q_proj", "a.v_proj"]) == ["q_proj", "v_proj"]
    assert targets(["b.q_proj", "a.v_proj"]) == ["a.v_proj", "b.q_proj"]  # q_proj would select a's too
    made = peft_config(every[:1], every, **{**usual, "base": "org/name"}, fan_in_fan_out=True)
    assert (made["base_model_name_or_path"], made["revision"], made["fan_in_fan_out"]) == ("org/name", "main", True)


# --- what is refused


@pytest.fixture(scope="module")
def plain(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    saved_by_peft(model_folder("llama"), folder, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora has a value that is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save has a value that is not supported"),
        ({"bias": "lora_only"}, "bias has a value that is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights has a value that is not supported"),
        ({"init_lora_weights": "olora"}, "init_lora_weights has a value that is not supported"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices has a value that is not supported"),
        ({"target_modules": ["embed_tokens"]}, "contains tensors that are not LoRA matrices"),
    ],
)
def test_what_peft_saves_of_other_methods_is_refused(
    settings: dict[str, Any], words: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    saved_by_peft(model_folder("llama"), tmp_path, **{"target_modules": ["q_proj"], **settings})
    with pytest.raises(InputError, match=words):
        Adapter.read(tmp_path)


def config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        held = load_file(folder / TENSORS)
        edit(held)
        save_file(held, folder / TENSORS)

    return change


A = tensor_key(Q, "lora_A")
DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another method": (config(peft_type="IA3"), "peft_type has a value"),
    "a key of tomorrow": (config(use_tomorrow=True), "use_tomorrow has a value"),
    "no rank": (config(r=None), "r has a value"),
    "rank true": (config(r=True), "r has a value"),
    "alpha NaN": (lambda folder: rewritten(folder, '"lora_alpha": 10', '"lora_alpha": NaN'), "NaN is not JSON"),
    "alpha text": (config(lora_alpha="8"), "lora_alpha has a value"),
    "another rank": (config(r=8), "the rank differs from adapter_config.json"),
    "another rank by a pattern": (config(rank_pattern={"q_proj": 2}), "the rank differs"),
    "rank 0 by a pattern": (config(rank_pattern={"q_proj": 0}), "rank_pattern has a value"),
    "no patterns": (config(alpha_pattern=[1]), "alpha_pattern has a value"),
    "a pattern that is none": (config(alpha_pattern={"(": 1}), "alpha_pattern has a value"),
    "a pattern without end": (config(alpha_pattern={"(a+)+b": 1}), "alpha_pattern has a value"),
    "rslora 2": (config(use_rslora=2), "use_rslora has a value"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "no adapter_config.json"),
    "half of a pair": (tensors(lambda held: held.pop(A)), f"{Q} has no lora_A"),
    "a vector": (tensors(lambda held: held.update({A: torch.zeros(4)})), "not LoRA matrices"),
    "whole numbers": (tensors(lambda held: held.update({A: held[A].to(torch.int8)})), "not LoRA matrices"),
    "NaN": (tensors(lambda held: held[A].fill_(float("nan"))), "not finite"),
    "a pickle": (lambda folder: (folder / TENSORS).rename(folder / "adapter_model.bin"), "can run code"),
    "a link": (lambda folder: linked(folder), "a link to a file outside the folder"),
    "nothing": (lambda folder: (folder / TENSORS).unlink(), "no such file"),
}


def rewritten(folder: Path, old: str, new: str) -> None:
    text = (folder / CONFIG).read_text()
    assert old in text
    (folder / CONFIG).write_text(text.replace(old, new))


def linked(folder: Path) -> None:
    (folder / TENSORS).rename(folder.parent / "elsewhere")
    (folder / TENSORS).symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_adapter_is_refused(case: str, plain: Path, tmp_path: Path) -> None:
    change, words = DAMAGED[case]
    shutil.copytree(plain, tmp_path / "adapter")
    Adapter.read(tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(InputError) as caught:
        Adapter.read(tmp_path / "adapter")
    assert words in str(caught.value)


def test_a_cut_file_is_damaged(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "adapter")
    path = tmp_path / "adapter" / TENSORS
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(IntegrityError, match="the file is damaged"):
        Adapter.read(tmp_path / "adapter")
