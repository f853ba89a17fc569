"""Default settings of other trainers, for folders with a config but no training_args.bin.

    tool = tool_of({"micro_batch_size": 1, "sequence_len": 512})        "axolotl", by keys that no other tool has
    unstated("axolotl")["lr_scheduler_type"]                            "cosine"

Keys are solotune's. Values are from the source code of the tools; values that depend on others (a batch size made of
several keys) are left out. If there is a training_args.bin, it is read instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TRANSFORMERS: dict[str, Any] = {
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "adam_epsilon": 1e-8,
}
"""transformers 5.24, training_args.py; the base of the others."""

_DEFAULTS: dict[str, dict[str, Any]] = {
    "transformers": _TRANSFORMERS,
    # trl 1.16: trainer/sft_config.py, trainer/base_config.py (bf16 where fp16 is not set), trainer/model_config.py
    "trl": {
        **_TRANSFORMERS,
        "learning_rate": 2e-5,
        "max_length": 1024,
        "packing": False,
        "gradient_checkpointing": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
    },
    # LLaMA-Factory: hparams/finetuning_args.py (alpha is twice the rank), hparams/data_args.py
    "llama-factory": {
        **_TRANSFORMERS,
        "max_length": 2048,
        "assistant_only_loss": True,
        "lora_r": 8,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
    },
    # axolotl: utils/schemas/config.py, training.py and peft.py; the rate, rank and alpha have to be written
    "axolotl": {
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 1,
        "max_length": 512,
        "assistant_only_loss": True,
        "weight_decay": 0.0,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1.0,
        "lora_dropout": 0.0,
    },
    # ms-swift: its args.json has every value; loss_scale is `default`, which is the answers alone
    "swift": {"assistant_only_loss": True},
}
_WORDS: dict[str, frozenset[str]] = {
    "axolotl": frozenset({"micro_batch_size", "sequence_len", "sample_packing", "val_set_size", "lora_target_linear"}),
    "llama-factory": frozenset({"cutoff_len", "finetuning_type", "dataset_dir", "lora_target", "neat_packing"}),
    "swift": frozenset({"tuner_type", "train_type", "sft_type", "tuner_backend", "loss_scale", "val_dataset",
                        "split_dataset_ratio"}),
    "trl": frozenset({"use_peft", "assistant_only_loss", "completion_only_loss", "packing_strategy", "padding_free",
                      "dataset_text_field", "dataset_train_split", "dataset_kwargs", "truncation_mode"}),
}  # fmt: skip


def tool_of(written: Mapping[str, Any]) -> str | None:
    """The tool with the most of its own keys in a config; None if there is none, or a tie."""
    counts = sorted(((len(words & written.keys()), tool) for tool, words in _WORDS.items()), reverse=True)
    return counts[0][1] if counts[0][0] > counts[1][0] else None


def unstated(tool: str | None) -> dict[str, Any]:
    """The defaults of this tool; empty for an unknown one."""
    return dict(_DEFAULTS.get({"llamafactory": "llama-factory"}.get(str(tool), str(tool)), {}))
