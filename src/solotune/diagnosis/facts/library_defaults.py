"""The values that trl, transformers and peft use if nothing is set."""

from __future__ import annotations

from typing import Any

from solotune.diagnosis.facts.derived import number

_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "learning_rate": (2e-5, 5e-5), "max_length": (1024, 512), "num_train_epochs": (3.0,), "logging_steps": (10, 500),
    "per_device_train_batch_size": (8,), "gradient_checkpointing": (True, False), "bf16": (True, False),
    "model_dtype": ("float32", "auto"), "warmup_steps": (0,), "warmup_ratio": (0.0,), "weight_decay": (0.0,),
    "lora_r": (8,), "lora_alpha": (8,), "lora_dropout": (0.0,), "max_grad_norm": (1.0,),
    "lr_scheduler_type": ("linear",),
    "gradient_accumulation_steps": (1,), "packing": (False,), "optim": ("adamw_torch", "adamw_torch_fused"),
    "seed": (42,), "dtype": ("float32",), "torch_dtype": ("float32",), "eval_strategy": ("no",),
}  # fmt: skip
"""Defaults of trl, transformers and peft."""


def default_exists(key: str) -> bool:
    """Whether the default of this setting is known."""
    return key in _DEFAULTS


def is_default(key: str, value: Any) -> bool:
    """Whether a library uses this value if nothing is set."""
    return any(number(value) == number(one) if number(one) is not None else value == one
               for one in _DEFAULTS.get(key, ()))  # fmt: skip
