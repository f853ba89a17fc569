"""Which models may have their attention replaced. The kernel itself is tested in tests/gpu."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from tiny import FAMILIES, random_rows

from solotune.dataset.collate import PaddedShape, collate, collate_packs
from solotune.model import packed_attention
from solotune.model.loading import load_model


def reason(config, max_length=64, dtype=torch.bfloat16):
    with torch.device("meta"):
        return packed_attention.unsupported_reason(
            transformers.AutoModelForCausalLM.from_config(config), max_length, dtype
        )


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "phi3", "cohere", "granite", "neox", "mixtral"]
)
def test_models_with_plain_causal_attention_go_by_lengths(family):
    assert reason(FAMILIES[family]()) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (FAMILIES["falcon"](), "falcon has its own attention code"),
        (transformers.MistralConfig(num_hidden_layers=1, sliding_window=32), "a sliding window of 32 tokens"),
        (FAMILIES["gemma2"](), "gemma2 changes the attention scores"),
        (transformers.LlamaConfig(num_hidden_layers=1, head_dim=260), "its heads have size 260"),
        (transformers.LlamaConfig(num_hidden_layers=1, head_dim=20), "its heads have size 20"),
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


def plain_flash(q_NHD, k_NHD, v_NHD, cu_seqlens_S, longest, scale):
    """What the kernel computes, row by row."""
    groups, starts, rows = q_NHD.shape[1] // k_NHD.shape[1], cu_seqlens_S.tolist(), []
    for start, end in itertools.pairwise(starts):
        if start < end:
            assert end - start <= longest
            q, k, v = (x[start:end].transpose(0, 1) for x in (q_NHD, k_NHD, v_NHD))
            k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
            future = torch.ones(end - start, end - start).triu(1).bool()
            scores = (q @ k.transpose(1, 2) * scale).masked_fill(future, -torch.inf)
            rows.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(rows)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "phi", "cohere", "neox"])
def test_a_model_with_it_keeps_packed_rows_apart(family, tiny_config, monkeypatch):
    """All but the kernel, for which a plain one stands in."""
    monkeypatch.setattr(packed_attention, "flash", plain_flash)
    cpu = torch.device("cpu")
    model = load_model(tiny_config(family), cpu, torch.float32)
    rows = random_rows(11)
    packs = [rows[:4], rows[4:7], rows[7:]]
    batch = collate_packs(packs, cpu, PaddedShape.of(packs, 4, 96))
    with torch.no_grad():
        alone = torch.cat([model.token_losses(collate([row], cpu))[0] for row in rows])
    packed_attention.install(model.module)
    model.uses_varlen_attention = True
    together, _ = model.token_losses(batch)
    torch.testing.assert_close(together.detach(), alone, rtol=1e-5, atol=1e-5)
    with torch.no_grad():  # evaluation goes by transformers' sdpa
        torch.testing.assert_close(model.token_losses(batch)[0], alone, rtol=1e-5, atol=1e-5)
    model.uses_varlen_attention = False  # without lengths nothing keeps them apart, which `isolation_error` finds
    assert (model.token_losses(batch)[0] - alone).abs().mean() > 0.01
