"""Which parts have adapters: towers, hybrid layers, experts; the same in a plan, without weights, as in the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from inline_snapshot import snapshot
from tiny import _SHAPE as SHAPE
from tiny import random_rows

from solotune.dataset.collate import collate
from solotune.model import lora
from solotune.model.loading import load_model
from solotune.planning.model_shape import model_shape

CPU = torch.device("cpu")
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
          "linear_value_head_dim": 16}  # fmt: skip
HYBRID = {**SHAPE, **LINEAR, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def gemma3() -> transformers.PreTrainedModel:
    config = transformers.Gemma3Config(
        text_config={**SHAPE, "head_dim": 16}, vision_config=VISION, mm_tokens_per_image=4
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen3_5() -> transformers.PreTrainedModel:
    vision = {"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3_5Config(text_config=HYBRID, vision_config={**vision, "patch_size": 14})
    return transformers.Qwen3_5ForConditionalGeneration(config)


def qwen3_moe() -> transformers.PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SHAPE, head_dim=16, **experts))


def gpt_oss() -> transformers.PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**{**SHAPE, **experts}, head_dim=16))


def llama() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))


MODELS = {
    "gemma3": (
        gemma3,
        "all-linear",
        snapshot(
            [
                "adapters: q_proj, k_proj, v_proj, o_proj of self_attn in all 2 layers; gate_proj, up_proj, down_proj of mlp in all 2 layers",
                "no adapters: vision_tower (36.5% of the parameters); multi_modal_projector (1.8% of the parameters, kept in 32 bits)",
            ]
        ),
    ),
    "gemma3 by name": (
        gemma3,
        ["q_proj", "v_proj"],
        snapshot(
            [
                "adapters: q_proj, v_proj of self_attn in all 2 layers",
                "no adapters: mlp in all 2 layers (32.4% of the parameters); vision_tower (36.5% of the parameters); multi_modal_projector (1.8% of the parameters, kept in 32 bits)",
            ]
        ),
    ),
    "qwen3_5": (
        qwen3_5,
        QKVO,
        snapshot(
            [
                "adapters: q_proj, k_proj, v_proj, o_proj of self_attn in 1 of 2 layers",
                "no adapters: linear_attn in 1 of 2 layers (19.9% of the parameters); mlp in all 2 layers (42.2% of the parameters)",
            ]
        ),
    ),
    "qwen3_moe": (
        qwen3_moe,
        "all-linear",
        snapshot(
            [
                "adapters: q_proj, k_proj, v_proj, o_proj of self_attn in all 2 layers; gate_proj, up_proj, down_proj of mlp in 1 of 2 layers",
                "no adapters: mlp.experts (4 each) in 1 of 2 layers (29.0% of the parameters, kept in 32 bits)",
            ]
        ),
    ),
    "gpt_oss": (
        gpt_oss,
        QKVO,
        snapshot(
            [
                "adapters: q_proj, k_proj, v_proj, o_proj of self_attn in all 2 layers",
                "no adapters: mlp.experts (4 each) in all 2 layers (70.3% of the parameters, kept in 32 bits)",
            ]
        ),
    ),
    "llama": (
        llama,
        QKVO,
        snapshot(
            [
                "adapters: q_proj, k_proj, v_proj, o_proj of self_attn in all 2 layers",
                "no adapters: mlp in all 2 layers (47.2% of the parameters)",
            ]
        ),
    ),
    "llama whole": (
        llama,
        "all-linear",
        snapshot(
            [
                "adapters: q_proj, k_proj, v_proj, o_proj of self_attn in all 2 layers; gate_proj, up_proj, down_proj of mlp in all 2 layers"
            ]
        ),
    ),
    "llama, one layer": (
        llama,
        ["layers.1.self_attn.q_proj"],
        snapshot(
            [
                "adapters: q_proj of self_attn in 1 of 2 layers",
                "no adapters: self_attn in 1 of 2 layers (15.7% of the parameters); mlp in all 2 layers (47.2% of the parameters)",
            ]
        ),
    ),
}


def saved(make: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    make().save_pretrained(folder)
    return folder


SLOW = {"qwen3_5"}  # its linear attention is planned step by step


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in MODELS])
def test_parts_with_and_without_adapters(case, tiny_config, tmp_path):
    make, targets, words = MODELS[case]
    config = tiny_config(model_name_or_path=str(saved(make, tmp_path)), lora_target_modules=targets)
    model = load_model(config, CPU, torch.float32)
    coverage = model.adapter_coverage()
    assert coverage.in_words() == words
    assert coverage.num_parameters == model.num_parameters - model.num_trainable
    assert sum(part["share"] for part in coverage.to_json()["parts"]) == pytest.approx(1, abs=1e-5)
    assert model_shape(config).coverage == coverage  # the plan says what the run says


def test_adapters_belong_to_the_language_model_alone_and_all_are_trained(tiny_config, tmp_path):
    """The vision tower has as many layers as the language model, and stands in front of it."""
    config = tiny_config(model_name_or_path=str(saved(gemma3, tmp_path)), lora_target_modules=["q_proj", "gate_proj"])
    model = load_model(config, CPU, torch.float32)
    assert model.layers is model.module.model.language_model.layers
    assert all(name.startswith("model.language_model.") for name in model.lora_layers) and len(model.lora_layers) == 4
    losses, _ = model.token_losses(collate(random_rows(2), CPU))
    losses.sum().backward()
    assert all(layer.lora_B.grad.abs().sum() > 0 for layer in model.lora_layers.values())
    written = lora.peft_config(config.lora, model.lora_layers, model.module, base="x", revision="main")
    assert written["target_modules"] == sorted(model.lora_layers)  # q_proj alone would select the tower's too
