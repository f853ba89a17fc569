"""Stock PEFT on what is written, for every family that is supported: resized vocabularies, head tied to it and not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM
from tiny import FAMILIES, VOCAB

from solotune.config.run_config import RunConfig
from solotune.model import lora
from solotune.model.adapter import Adapter
from solotune.model.loading import load_model
from solotune.run.atomic_io import Folder

NEW_TOKENS = 5
IDS = torch.cat([torch.arange(3, 20), torch.arange(VOCAB, VOCAB + NEW_TOKENS)])[None]
CASES = [  # every other one only in `sh scripts/test_export`, to save time
    pytest.param(family, is_tied, marks=pytest.mark.export if (number + is_tied) % 2 else (),
                 id=f"{family}-{'tied' if is_tied else 'untied'}")
    for number, family in enumerate(FAMILIES) for is_tied in (True, False)
]  # fmt: skip


def resized(family: str, is_tied: bool, folder: Path) -> None:
    """A random model whose embedding, and head, got rows for new tokens."""
    torch.manual_seed(0)
    architecture = FAMILIES[family]()
    architecture.tie_word_embeddings = is_tied
    model: Any = transformers.AutoModelForCausalLM.from_config(architecture)
    model.resize_token_embeddings(VOCAB + NEW_TOKENS, mean_resizing=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)


@pytest.mark.parametrize(("family", "is_tied"), CASES)
def test_stock_peft_gives_the_same_logits(
    family: str, is_tied: bool, tiny_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    resized(family, is_tied, tmp_path / "base")
    config = tiny_config("llama").replaced("test", model_name_or_path=str(tmp_path / "base"))
    model = load_model(config, torch.device("cpu"), torch.float32)
    for layer in model.lora_layers.values():
        layer.lora_B.data.normal_(0, 0.1)
    written = lora.peft_config(
        config.lora, model.lora_layers, model.module, base=config.model_name_or_path, revision=None
    )
    (tmp_path / "adapter").mkdir()
    Adapter(written, lora.state_dict(model.lora_layers)).write(Folder(tmp_path / "adapter"))
    theirs = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    adapted = {name for name, part in theirs.named_modules() if hasattr(part, "lora_A")}
    assert {name.removeprefix("base_model.model.") for name in adapted} == set(model.lora_layers)
    with torch.no_grad():
        expected = model.module.eval()(IDS).logits
        assert expected.shape[-1] == VOCAB + NEW_TOKENS
        torch.testing.assert_close(theirs(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        with lora.adapters_off(model.module):
            assert not torch.allclose(model.module(IDS).logits, expected, atol=1e-3)
