"""The cases of `bench.plan_runs`: shapes of models, rows, and overrides of the walkthrough's config.

`resident` has the frozen base on the card, `streamed` streams it from host memory (with two resident runs to compare
with), `70B` streams a base of 35 GiB: each of its runs takes two minutes, most of it loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

RECIPE = Path(__file__).parent.parent / "examples" / "walkthrough.yaml"
ALL = "lora_target_modules=all-linear"
KEEP, REDO = "gradient_checkpointing=false", "gradient_checkpointing=true"
CODES, MIRROR = "base_residency=quantized", "base_residency=dequantized"
BF16, FP8 = "base_precision=bf16", "base_precision=fp8"
STREAM, STAY, INPUTS = "base_offload=true", "base_offload=false", "activation_offload=true"


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, tied: bool, **more: Any):
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": 131072}
    names = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2}
    return {**names, **sizes, **attention, "tie_word_embeddings": tied, **more}


QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
MODELS: dict[str, dict[str, Any]] = {
    "135M": _llama(576, 1536, 30, 9, 3, 49152, True),
    "0.5B": _llama(896, 4864, 24, 14, 2, 151936, True, **QWEN2),
    "1B": _llama(2048, 8192, 16, 32, 8, 128256, True, head_dim=64),
    "1.7B": _llama(2048, 6144, 28, 16, 8, 151936, True, **QWEN3),
    "3B": _llama(3072, 8192, 28, 24, 8, 128256, True, head_dim=128),
    "8B": _llama(4096, 14336, 32, 32, 8, 128256, False, head_dim=128),
    "70B": _llama(8192, 28672, 80, 64, 8, 128256, False, head_dim=128),
}


class Case(NamedTuple):
    model: str
    rows: int
    tokens: int
    overrides: tuple[str, ...]
    learned: float = 1.0  # share of each row's tokens, at its end
    rows_are_open: bool = False  # the plan may raise them; else two micro-batches of `rows` make a step

    @property
    def name(self) -> str:
        words = [f"{self.rows}x{self.tokens}", *self.overrides]
        words += [f"learned={self.learned}"] * (self.learned < 1) + ["rows=auto"] * self.rows_are_open
        return f"{self.model} {' '.join(words)}"


def of(model: str, shape: str, *overrides: str, **more: Any) -> Case:
    rows, tokens = map(int, shape.split("x"))
    return Case(model, rows, tokens, overrides, **more)


def _resident() -> Iterator[Case]:
    yield of("135M", "8x512", KEEP, MIRROR, ALL)
    yield of("135M", "4x2048", KEEP, BF16, ALL)
    yield of("135M", "1x8192", KEEP, BF16)
    yield of("135M", "16x2048", REDO, CODES, ALL)
    yield of("135M", "8x2048", KEEP, BF16, ALL, "lora_r=64")
    yield of("135M", "4x1024", KEEP, BF16, "torch_compile=false")
    yield of("0.5B", "4x2048", KEEP, MIRROR)
    yield of("0.5B", "8x2048", KEEP, BF16, ALL)
    yield of("0.5B", "2x4096", KEEP, FP8, ALL)
    yield of("0.5B", "16x512", REDO, CODES, learned=0.3)
    yield of("1B", "4x2048", KEEP, MIRROR)
    yield of("1B", "8x2048", KEEP, FP8, ALL)
    yield of("1B", "1x16384", KEEP, BF16)
    yield of("1B", "8x1024", CODES, ALL, "lora_r=64", "gradient_checkpointing=8")
    yield of("1.7B", "4x2048", KEEP, MIRROR)
    yield of("1.7B", "2x4096", REDO, BF16, ALL)
    yield of("1.7B", "16x512", KEEP, FP8, learned=0.3)
    yield of("3B", "4x2048", KEEP, CODES)
    yield of("3B", "4x2048", KEEP, BF16, ALL)
    yield of("3B", "1x8192", KEEP, FP8)
    yield of("3B", "4x2048", "memory_budget=8GiB")
    yield of("8B", "4x2048", REDO, CODES)
    yield of("8B", "4x2048", KEEP, MIRROR)
    yield of("8B", "4x2048", KEEP, MIRROR, ALL)
    yield of("8B", "4x2048", KEEP, FP8)
    yield of("8B", "4x2048", KEEP, FP8, ALL)
    yield of("8B", "4x2048", "memory_budget=9.5GiB")
    yield of("8B", "4x2048", "memory_budget=16GiB", ALL)
    yield of("8B", "4x2048", "memory_budget=24GiB")
    yield of("8B", "4x2048", "memory_budget=40GiB")
    yield of("8B", "4x2048", "memory_budget=60GiB", BF16, ALL)
    yield of("8B", "4x2048", "memory_budget=24GiB", FP8)
    yield of("8B", "1x16384", "memory_budget=24GiB", ALL, "lora_r=32")
    yield of("8B", "1x16384", KEEP, FP8)
    yield of("8B", "16x512", KEEP, CODES, learned=0.3)
    yield of("8B", "4x2048", REDO, CODES, "optim=adamw_torch", "lora_dropout=0.0")


def _streamed() -> Iterator[Case]:
    yield of("8B", "4x2048", REDO, STREAM)
    yield of("8B", "4x2048", REDO, STREAM, INPUTS)
    yield of("8B", "4x2048", REDO, CODES, STAY)
    yield of("8B", "8x2048", REDO, STREAM, INPUTS)
    yield of("8B", "8x2048", REDO, CODES, STAY)
    yield of("8B", "1x16384", REDO, STREAM, INPUTS)
    yield of("8B", "4x2048", REDO, BF16, STREAM)
    yield of("8B", "4x2048", REDO, FP8, STREAM)
    yield of("8B", "4x2048", "base_offload=16", REDO)
    yield of("8B", "1x2048", REDO, STREAM, "gradient_accumulation_steps=4")
    yield of("8B", "4x2048", "memory_budget=6GiB")
    yield of("8B", "4x256", "memory_budget=8GiB", BF16, rows_are_open=True)
    yield of("8B", "4x2048", REDO, STREAM, ALL, "lora_r=64")
    yield of("8B", "2x4096", REDO, STREAM, learned=0.3)
    yield of("3B", "4x2048", REDO, STREAM, INPUTS)
    yield of("3B", "4x2048", REDO, BF16, STREAM)
    yield of("1B", "4x2048", REDO, BF16, STREAM)


def _large() -> Iterator[Case]:
    yield of("70B", "4x2048", "memory_budget=24GiB")
    yield of("70B", "4x2048", REDO, STREAM, INPUTS)
    yield of("70B", "4x2048", REDO, CODES, STAY)


SETS = {"resident": list(_resident()), "streamed": list(_streamed()), "70B": list(_large())}
CASES = [case for cases in SETS.values() for case in cases]
