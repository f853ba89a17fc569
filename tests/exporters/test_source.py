"""What is exported: a run, or an adapter of another trainer; each bad input is refused with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CHATML
from transformers import AutoModelForCausalLM, AutoTokenizer

from solotune.dataset import Example
from solotune.errors import InputError, IntegrityError
from solotune.exporters.base_tensors import BaseTensors
from solotune.exporters.source import MAX_ROWS, MAX_TOKENS, bounded, open_source
from solotune.training.trained_run import TunedRun

IDS = torch.arange(3, 40)[None]


@pytest.fixture
def theirs(export_base: Path, tmp_path: Path) -> Path:
    """An adapter that PEFT saved, with ranks that differ between layers."""
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(export_base, dtype=torch.float32),
        LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 6},
                   task_type="CAUSAL_LM"),
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(str(tmp_path / "theirs"))
    return tmp_path / "theirs"


def change_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    held = load_file(folder / "adapter_model.safetensors")
    edit(held)
    save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})


def test_a_run_brings_what_its_training_knew(run: Path, export_base: Path) -> None:
    source = open_source(run)
    assert source.base.folder == export_base and source.run is not None
    assert (source.prompt_format, source.system_prompt) == ("chat", "Be exact.")
    assert source.tokenizer.chat_template == CHATML
    assert source.stop_ids == [2]  # <|im_end|>, the end of every row, and the base's
    assert len(source.rows) == 8 and [choice.key for choice in source.choices] == ["rows compared"]
    expected = TunedRun.open(run).load()
    with torch.no_grad():
        assert torch.equal(source.load().module.eval()(IDS).logits, expected.module.eval()(IDS).logits)


def test_rows_are_few_and_short_and_have_something_to_predict() -> None:
    mask = np.arange(2000) >= 600  # its answer begins behind what is kept
    rows = [Example(np.arange(2000, dtype=np.int32), np.ones(2000, bool), str(i), []) for i in range(100)]
    rows[0] = Example(rows[0].input_ids, mask, "late", [])
    kept = bounded(rows)
    assert len(kept) == MAX_ROWS and {len(row.input_ids) for row in kept} == {MAX_TOKENS}
    assert "late" not in {row.where for row in kept}


def test_without_its_data_a_run_is_exported_without_rows(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run/config.yaml"
    config.write_text(config.read_text().replace("chats.jsonl", "gone.jsonl"))
    source = open_source(tmp_path / "run")
    assert list(source.rows) == [] and "cannot be read" in source.choices[-1].because


def test_an_adapter_of_peft_is_loaded_as_peft_loads_it(theirs: Path, export_base: Path) -> None:
    source = open_source(theirs, base=str(export_base), base_precision="bf16")
    assert source.run is None and source.prompt_format == "chat"
    base = AutoModelForCausalLM.from_pretrained(export_base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(theirs)).eval()
    with torch.no_grad():
        torch.testing.assert_close(source.load().module.eval()(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)


def test_rows_of_dataset_say_how_such_an_adapter_is_asked(theirs: Path, export_base: Path, run: Path) -> None:
    data = run.parent / "chats.jsonl"
    source = open_source(theirs, base=str(export_base), dataset=str(data), base_precision="nf4")
    assert len(source.rows) == MAX_ROWS and source.system_prompt == "Be exact."
    assert source.config.base_precision == "nf4"
    tokenizer = AutoTokenizer.from_pretrained(export_base)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(theirs)  # its own tokenizer wins over the base's
    assert open_source(theirs, base=str(export_base)).tokenizer.chat_template == "{{ messages[0]['content'] }}"


def test_a_base_in_4_bits_says_how_the_adapter_was_trained(theirs: Path, export_base: Path) -> None:
    path = theirs / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "unsloth/llama-bnb-4bit"}))
    source = open_source(theirs, base=str(export_base))
    assert source.config.base_precision == "nf4" and "llama-bnb-4bit" in source.choices[0].because


# --- bad input


def test_an_adapter_folder_needs_a_base(theirs: Path, export_base: Path) -> None:
    with pytest.raises(InputError, match="the base model of this adapter must be given") as caught:
        open_source(theirs)
    assert str(export_base) in str(caught.value.change)
    with pytest.raises(InputError, match="no such folder"):
        open_source(theirs, base=str(export_base / "nowhere"))


def test_another_base_than_the_run_s_is_refused(run: Path, export_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(export_base, other)
    held = load_file(other / "model.safetensors")
    held["model.layers.0.mlp.up_proj.weight"] *= 2
    save_file(held, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="trained on another base model"):
        open_source(run, base=str(other))
    shutil.copytree(export_base, tmp_path / "moved")
    assert open_source(run, base=str(tmp_path / "moved")).base.folder == tmp_path / "moved"


def test_options_for_other_adapters_are_refused_for_a_run(run: Path) -> None:
    with pytest.raises(InputError, match="--dataset is only for adapters that others trained"):
        open_source(run, dataset="rows.jsonl")
    with pytest.raises(InputError, match="--base-precision is only for"):
        open_source(run, base_precision="nf4")


def test_an_untrained_adapter_is_refused(theirs: Path, export_base: Path) -> None:
    change_tensors(theirs, lambda held: [tensor.zero_() for name, tensor in held.items() if "lora_B" in name])
    with pytest.raises(InputError, match="the adapter is untrained"):
        open_source(theirs, base=str(export_base))


def test_numbers_that_are_not_finite_are_refused(theirs: Path, export_base: Path) -> None:
    change_tensors(theirs, lambda held: next(iter(held.values())).view(-1)[:1].fill_(torch.nan))
    with pytest.raises(InputError, match="not finite"):
        open_source(theirs, base=str(export_base))


def test_a_tokenizer_with_more_tokens_than_the_base_is_refused(theirs: Path, export_base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(export_base)
    tokenizer.add_tokens([f"<new{i}>" for i in range(60)])
    tokenizer.save_pretrained(theirs)
    with pytest.raises(InputError, match="tokens that the base has no embedding for") as caught:
        open_source(theirs, base=str(export_base))
    assert "128 rows" in str(caught.value.seen)


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(held: dict[str, torch.Tensor]) -> None:
        for name in [name for name in held if old in name]:
            held[name.replace(old, new)] = held.pop(name)

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (rename("layers.0.self_attn", "layers.7.self_attn"), "layers that are not linear layers of this base"),
        (rename("model.layers.0.self_attn.q_proj", "lm_head"), "layers that are not linear layers of this base"),
        (lambda held: held.update({name: torch.ones(4, 9) for name in held if "0.self_attn.q_proj.lora_A" in name}),
         "does not fit this base"),
    ],
)  # fmt: skip
def test_layers_that_the_base_does_not_have_are_refused(
    edit: Callable[..., Any], words: str, theirs: Path, export_base: Path
) -> None:
    change_tensors(theirs, edit)
    source = open_source(theirs, base=str(export_base))
    with pytest.raises(InputError, match=words):
        BaseTensors.of(source.base, source.config).check(source.adapter, str(theirs))
