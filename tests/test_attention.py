"""Which models may have their attention replaced. The kernel itself is tested in tests/gpu."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import FAMILIES

from solotune import attention


def reason(config, max_length=64, dtype=torch.bfloat16):
    with torch.device("meta"):
        return attention.why_not(transformers.AutoModelForCausalLM.from_config(config), max_length, dtype)


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "phi3", "cohere", "granite", "neox", "mixtral"]
)
def test_models_with_plain_causal_attention_go_by_lengths(family):
    assert reason(FAMILIES[family]()) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FAMILIES["falcon"](), "falcon has an attention of its own"),
        (transformers.MistralConfig(num_hidden_layers=1, sliding_window=32), "a sliding window of 32 tokens"),
        (FAMILIES["gemma2"](), "gemma2 changes the scores"),
        (transformers.LlamaConfig(num_hidden_layers=1, head_dim=260), "heads of size 260"),
        (transformers.LlamaConfig(num_hidden_layers=1, head_dim=20), "heads of size 20"),
    ],
)
def test_others_say_why_they_do_not(config, expected):
    assert (reason(config) or "").startswith(expected)


def test_a_window_longer_than_every_row_does_not_matter():
    config = transformers.MistralConfig(num_hidden_layers=1, sliding_window=32)
    assert reason(config, max_length=32) is None
    assert (reason(config, max_length=33) or "").startswith("a sliding window of 32 tokens is shorter than max_length")


def test_32_bit_models_keep_sdpa():
    assert reason(FAMILIES["llama"](), dtype=torch.float32) == "the flash kernel computes in 16 bits, not in float32"
