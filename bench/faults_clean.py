"""Runs in which nothing is wrong, odd ones among them: what guards against NaN and infinity must stay silent."""

from __future__ import annotations

import json
import random
import tempfile
from pathlib import Path
from typing import Any

from bench.faults_run import Result
from solotune.api.train import train
from solotune.errors import SolotuneError

STEPS = 30


def clean_runs(count: int, seed: int) -> Result:
    """Small models of every family, at rates, precisions and batches that people use and some that they rarely do."""
    import transformers

    from tests import tiny

    result, rng = Result("clean runs"), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(rng)))
        for number in range(count):
            family = list(tiny.FAMILIES)[number % len(tiny.FAMILIES)]
            model = folder / family
            if not model.exists():
                transformers.set_seed(seed)
                transformers.AutoModelForCausalLM.from_config(tiny.FAMILIES[family]()).save_pretrained(model)
                tiny.save_tokenizer(model)
            keys = _odd(rng)
            try:
                train({
                    "model_name_or_path": str(model), "dataset": str(folder / "chats.jsonl"), "validation_size": 6,
                    "output_dir": str(folder / f"run-{number}"), "use_cpu": True, "max_length": 64, "seed": number,
                    "lora_target_modules": "all-linear", "max_steps": STEPS, "num_samples": 0, "save_strategy": "no",
                    **keys,
                })  # fmt: skip
                problem = None
            except SolotuneError as error:
                problem = str(error).split("\n")[0]
            result.take(f"{family} {keys}", problem)
    return result


def _rows(rng: random.Random) -> list[dict[str, Any]]:
    """Answers of one sign and of sixty, the same ones again and again."""
    answers = ["y", "no", "it is " + "so " * 20, "a b c", "7"]
    return [
        {"messages": [{"role": "user", "content": f"ask {i}"}, {"role": "assistant", "content": rng.choice(answers)}]}
        for i in range(60)
    ]


def _odd(rng: random.Random) -> dict[str, Any]:
    precision = rng.choice(("nf4", "bf16", "fp32", "fp8"))
    return {
        "base_precision": precision,
        "matmul_precision": rng.choice(("bf16", "fp8")) if precision == "nf4" else "auto",
        "learning_rate": rng.choice((1e-6, 1e-4, 1e-3, 1e-2, 3e-2)),
        "lr_scheduler_type": rng.choice(("cosine", "linear", "constant")),
        "warmup_ratio": rng.choice((0.0, 0.03, 0.5)),
        "lora_r": rng.choice((1, 4, 16)),
        "lora_alpha": rng.choice((1.0, 16.0, 64.0)),
        "lora_dropout": rng.choice((0.0, 0.05, 0.5)),
        "optim": rng.choice(("paged_adamw_8bit", "adamw_torch")),
        "per_device_train_batch_size": rng.choice((1, 2, 4)),
        "gradient_accumulation_steps": rng.choice((1, 3)),
        "packing": rng.random() < 0.5,
        "max_grad_norm": rng.choice((1e-3, 1.0, 100.0)),
        "weight_decay": rng.choice((0.0, 0.1)),
        "assistant_only_loss": rng.random() < 0.7,
        "gradient_checkpointing": rng.random() < 0.3,
    }
