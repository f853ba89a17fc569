"""Head and embedding are tied only where the files hold one tensor, or two equal ones: the base that transformers loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, random_rows
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from solotune.dataset.collate import collate
from solotune.model import lora
from solotune.model.adapter import Adapter
from solotune.model.base_fingerprint import fingerprint_of
from solotune.model.loading import load_model
from solotune.model.loss import token_losses_reference
from solotune.planning.model_shape import model_shape
from solotune.run.atomic_io import Folder

CPU = torch.device("cpu")
EMBEDDING = {"llama_tied": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight",
             "gemma2": "model.embed_tokens.weight", "qwen2": "model.embed_tokens.weight"}  # fmt: skip


def with_head(folder: Path, to: Path, head: Any, *, without_embedding: str = "") -> Path:
    """A copy of a tied model whose file holds a head of its own: `head` of the embedding."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(to / "model.safetensors")
    embedding = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
    tensors["lm_head.weight"] = head(tensors[embedding]).contiguous()
    if without_embedding:
        del tensors[embedding]
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def another(embedding: torch.Tensor) -> torch.Tensor:
    return torch.randn(embedding.shape, generator=torch.Generator().manual_seed(5))


def losses_of(module: Any, rows: Any) -> torch.Tensor:
    batch = collate(rows, CPU)
    with torch.no_grad():
        return token_losses_reference(module(batch.input_ids_BT).logits, batch.input_ids_BT, batch.label_mask_BT)


def load(config: Any) -> Any:
    return load_model(config, CPU, torch.float32)


@pytest.mark.parametrize("family", EMBEDDING)
def test_another_head_in_the_files_is_the_head(family, tiny_config, model_folder, tmp_path):
    folder = with_head(model_folder(family), tmp_path / "model", another)
    model = load(tiny_config(family, model_name_or_path=str(folder)))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.module.eval()
    rows = [random_rows(1)[0]]  # alone: no padding
    ours = model.token_losses(collate(rows, CPU))[0].detach()
    torch.testing.assert_close(ours, losses_of(reference, rows), rtol=1e-5, atol=2e-6)
    tied = losses_of(AutoModelForCausalLM.from_pretrained(model_folder(family), dtype=torch.float32).eval(), rows)
    assert (ours - tied).abs().mean() > 0.5  # the head matters, so equality above means something
    assert model.num_parameters - model.num_trainable == reference.num_parameters()
    (choice,) = [choice for choice in model.choices if choice.key == "tie_word_embeddings"]
    assert choice.value is False and f"another lm_head.weight than {EMBEDDING[family]}" in choice.because


def test_an_adapter_on_such_a_base_is_pefts_too(tiny_config, model_folder, tmp_path):
    folder = with_head(model_folder("llama_tied"), tmp_path / "model", another)
    config = tiny_config("llama_tied", model_name_or_path=str(folder))
    model = load(config)
    for layer in model.lora_layers.values():
        layer.lora_B.data.normal_(0, 0.1)
    peft_config = lora.peft_config(config.lora, model.lora_layers, model.module, base=str(folder), revision="main")
    (tmp_path / "adapter").mkdir()
    Adapter(peft_config, lora.state_dict(model.lora_layers)).write(Folder(tmp_path / "adapter"))
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tmp_path / "adapter"
    )
    rows = [random_rows(1)[0]]
    model.module.eval()
    ours = model.token_losses(collate(rows, CPU))[0].detach()
    torch.testing.assert_close(ours, losses_of(theirs.eval(), rows), rtol=1e-5, atol=1e-5)
    assert fingerprint_of(folder) != fingerprint_of(model_folder("llama_tied"))  # the head is part of it


def test_equal_tensors_are_tied_and_a_head_alone_is_the_embedding(tiny_config, model_folder, tmp_path):
    rows = [random_rows(1)[0]]
    tied = AutoModelForCausalLM.from_pretrained(model_folder("llama_tied"), dtype=torch.float32).eval()
    for name, without in (("both", ""), ("head alone", "model.embed_tokens.weight")):
        folder = with_head(model_folder("llama_tied"), tmp_path / name, torch.clone, without_embedding=without)
        model = load(tiny_config("llama_tied", model_name_or_path=str(folder)))
        model.module.eval()
        assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
        assert [choice.key for choice in model.choices] == []
        ours = model.token_losses(collate(rows, CPU))[0].detach()
        torch.testing.assert_close(ours, losses_of(tied, rows), rtol=1e-5, atol=2e-6)


def test_equal_means_equal_in_the_dtype_that_is_loaded(tiny_config, model_folder, tmp_path):
    def nearly(embedding: torch.Tensor) -> torch.Tensor:
        return embedding * (1 + 1e-6)

    folder = with_head(model_folder("llama_tied"), tmp_path / "model", nearly)
    config = tiny_config("llama_tied", model_name_or_path=str(folder))
    for dtype, is_tied in ((torch.bfloat16, True), (torch.float32, False)):
        ours = load_model(config, CPU, dtype).module
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for module in (ours, theirs):
            assert (module.lm_head.weight is module.model.embed_tokens.weight) is is_tied


def test_a_config_inside_text_config_is_the_same(tiny_config, tmp_path):
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={**FAMILIES["gemma3"]().to_dict(), "num_hidden_layers": 2},
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )  # fmt: skip
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "tied")
    folder = with_head(tmp_path / "tied", tmp_path / "model", another)
    model = load(tiny_config(model_name_or_path=str(folder)))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.module.eval()
    rows = [random_rows(1)[0]]
    torch.testing.assert_close(
        model.token_losses(collate(rows, CPU))[0].detach(), losses_of(reference, rows), rtol=1e-5, atol=1e-5
    )
    assert not torch.equal(model.module.lm_head.weight, model.module.get_input_embeddings().weight)


def test_the_plan_counts_both(tiny_config, model_folder, tmp_path):
    folder = with_head(model_folder("llama_tied"), tmp_path / "model", another)
    one, two = (model_shape(tiny_config("llama_tied", model_name_or_path=str(path)))
                for path in (model_folder("llama_tied"), folder))  # fmt: skip
    assert two.other_parameters - one.other_parameters == 128 * 64
