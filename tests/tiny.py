"""Tiny random models of the families that are supported, and rows of random tokens."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from solotune.dataset import Example
from solotune.run.run_dir import RunDirectory

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

SHORT_RUN = {
    "max_length": 64,
    "use_cpu": True,
    "lora_target_modules": "all-linear",
    "lora_r": 4,
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "seed": 0,
}
"""Keys of a run of a few steps, less its model, data and rate."""

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
    "falcon": lambda: transformers.FalconConfig(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2,
    num_attention_heads=4),
}  # fmt: skip


def random_rows(count: int, longest: int = 24, seed: int = 0) -> list[Example]:
    """Rows of random tokens and lengths; the second half of each is supervised."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length = int(rng.integers(4, longest + 1))
        supervised = np.arange(length) >= length // 2
        rows.append(Example(rng.integers(3, VOCAB, length).astype(np.int32), supervised, f"random:{i + 1}", []))
    return rows


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_model(folder: Path, config: transformers.PreTrainedConfig | None = None, **changes: Any) -> str:
    """Write a random model, the same on every call: a small Llama or that of `config`, with other values of its keys."""
    torch.manual_seed(0)
    config = config or FAMILIES["llama"]()
    for key, value in changes.items():
        setattr(config, key, value)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def save_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 128 ids (letters, digits, signs) with a ChatML template; pad is eos, as SmolLM2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet = [c for c in alphabet if c.isascii()] + ["Ġ", "Ċ"]  # printable ASCII, blank, line break
    vocab = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>"
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)


def chat_rows(count: int) -> list[dict[str, object]]:
    """Short chats: a number, and its double."""
    return [
        {"messages": [{"role": "user", "content": f"twice {i}"}, {"role": "assistant", "content": f"it is {2 * i}"}]}
        for i in range(count)
    ]


def metrics_of(run: RunDirectory) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl as they stand there."""
    path, found = run.path / "metrics.jsonl", []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):  # torn
            found.append(json.loads(line))
    return found
