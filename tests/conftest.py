"""Tiny random models of the families that are supported, and rows of random tokens."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from solotune.config import RunConfig, load_config  # noqa: E402
from solotune.dataset import Example  # noqa: E402

VOCAB = 128
_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MULTI_HEAD = {key: value for key, value in _SHAPE.items() if key != "num_key_value_heads"}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

# family -> its transformers config: what the issue names, and architectures that once needed a special case
FAMILIES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_SHAPE),
    "llama_tied": lambda: transformers.LlamaConfig(**_SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**_SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**_SHAPE, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**_SHAPE, head_dim=16),
    "gemma": lambda: transformers.GemmaConfig(**_SHAPE, head_dim=16),
    "gemma2": lambda: transformers.Gemma2Config(**_SHAPE, head_dim=16),  # no sdpa, capped logits
    "gemma3": lambda: transformers.Gemma3TextConfig(**_SHAPE, head_dim=16),  # two rotary tables
    "phi": lambda: transformers.PhiConfig(**_SHAPE, resid_pdrop=0.0, embd_pdrop=0.0),  # biases, biased head
    "phi3": lambda: transformers.Phi3Config(**_SHAPE, resid_pdrop=0.0, embd_pdrop=0.0),  # fused projections
    "gpt2": lambda: transformers.GPT2Config(**_GPT2, **_NO_DROPOUT, bos_token_id=1, eos_token_id=2),  # Conv1D
    "cohere": lambda: transformers.CohereConfig(**_SHAPE),  # scaled logits
    "granite": lambda: transformers.GraniteConfig(**_SHAPE, logits_scaling=3.0),
    "neox": lambda: transformers.GPTNeoXConfig(**_MULTI_HEAD, hidden_dropout=0.0),  # names converted on load
    "mixtral": lambda: transformers.MixtralConfig(**_SHAPE, num_local_experts=4),  # experts merged on load
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=32, dropout=0.0,
    ),  # absolute positions, projections outside the layers
    "falcon": lambda: transformers.FalconConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
}  # fmt: skip


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> a folder with a random model of it, in the clear (weights large enough that nothing is near zero)."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.add_(0.05 * torch.randn_like(parameter))
                    elif parameter.eq(0).all():
                        parameter.add_(0.02 * torch.randn_like(parameter))  # biases that matter
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def tiny_config(model_folder: Callable[[str], Path]) -> Callable[..., RunConfig]:
    """A float32 CPU config on a tiny model; keywords change keys."""

    def make(family: str = "llama", **keys: object) -> RunConfig:
        plain: dict[str, object] = {
            "model_name_or_path": str(model_folder(family)),
            "dataset": "unused.jsonl",
            "base_precision": "fp32",
            "bf16": False,
            "use_cpu": True,
            "lora_target_modules": "all-linear",
            "lora_r": 4,
            "lora_alpha": 8.0,
            "lora_dropout": 0.0,
            "gradient_checkpointing": False,
            "optim": "adamw_torch",
            "learning_rate": 1e-2,
            "seed": 0,
        }
        return load_config({**plain, **keys})

    return make


def random_rows(count: int, longest: int = 24, seed: int = 0) -> list[Example]:
    """Rows of random tokens and lengths; the second half of each is supervised."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length = int(rng.integers(4, longest + 1))
        supervised = np.arange(length) >= length // 2
        rows.append(Example(rng.integers(3, VOCAB, length).astype(np.int32), supervised, f"random:{i + 1}", []))
    return rows


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
