"""A small run with every file that a report reads, written by hand: no model is trained for it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from solotune.run.events import EndEvent, EvalEvent, Event, StartEvent, StepEvent, to_line

STEPS = 12
CONFIG = """\
# model
model_name_or_path: models/tiny  # run.yaml line 1
base_precision: nf4  # run.yaml line 2
base_residency: dequantized  # plan

# data
dataset: "chats  # 2.jsonl"  # command line
max_grad_norm: 1.0  # default
key_of_tomorrow: 7  # default
"""
DATA: dict[str, Any] = {
    "format": "messages",
    "prompt_format": "chat",
    "rows": {"read": 50, "kept": 48, "dropped": {"empty answer": 2}, "truncated": 3, "answers_cut": 0},
    "system_prompt": {"text": "Be brief.", "rows": 40, "of": 40},
    "unused_keys": {"lang": 50},
    "tokens": {"total": 1000, "supervised": 400},
    "split": {"train": 40, "validation": 8, "groups": 6, "exact_duplicates": 1},
    "histograms": {"row_tokens": {"edges": [8, 16, 32], "counts": [10, 38]}},
    "examples": [
        {
            "where": "chats.jsonl:1",
            "tokens": 7,
            "pieces": [
                {"text": "<|im_start|>user\nHi<|im_end|>\n", "supervised": False, "ids": [1, 2, 3, 4]},
                {"text": "Hello there<|im_end|>", "supervised": True, "ids": [5, 6, 7], "weight": 0.5},
            ],
        }
    ],
    "findings": [
        {
            "code": "F24",
            "slug": "answers-cut",
            "severity": "warning",
            "message": "3 answers are cut.",
            "fix": "max_length: 64",
        }
    ],
}
PLAN: dict[str, Any] = {
    "predicted": {
        "peak_bytes": 3 * 2**30,
        "by_category": {"weights": 2 * 2**30, "activations": 2**30, "logits": 0},
        "budget_bytes": 8 * 2**30,
        "seconds": {"step": 0.5, "total": 6.0},
        "tokens_per_second": 200.0,
        "choices": [{"key": "base_residency", "value": "dequantized", "because": "it fits"}],
    }
}
EVALUATION: dict[str, Any] = {
    "rows": 8,
    "groups": 6,
    "base": {"loss": 2.0, "stderr": 0.1, "tokens": 80},
    "tuned": {"loss": 1.0, "stderr": 0.05, "tokens": 80},
    "difference": {"loss": -1.0, "stderr": 0.04, "p_value": 0.03125},
    "verdict": "better",
    "scores": {"exact_match": {"base": 0.0, "tuned": 0.5, "stderr": {"base": 0.0, "tuned": 0.18}, "p_value": 0.125}},
    "row_losses": {
        "base": [20.0] * 8,
        "tuned": [9.0, 10.0, 11.0, 10.0, 9.0, 11.0, 10.0, 10.0],
        "weights": [10.0] * 8,
        "groups": None,
    },
    "samples": [{"where": "chats.jsonl:9", "prompt": "2 + 2?", "reference": "4", "base": "Five.", "tuned": "4"}],
}
DIAGNOSIS: dict[str, Any] = {
    "verdict": "fault",
    "culprits": [
        {
            "suspect": "S13",
            "fault": "F64",
            "slug": "rate-too-low",
            "confidence": 0.94,
            "evidence": ["the loss fell by 0.1 % a step"],
            "confirmed_by": None,
            "fix": "learning_rate: 2e-4",
            "expect": "a loss that falls within 20 steps",
        }
    ],
    "remarks": [
        {"suspect": "S5", "fault": "F24", "slug": "answers-cut", "says": "3 answers are cut", "fix": "max_length: 64"}
    ],
    "not_checked": [],
    "skipped": {"P1": "no time was left"},
}
EXPORT = {
    "artifacts": [
        {
            "kind": "merged",
            "bytes": 2**28,
            "parity": [{"engine": "transformers", "token_ids_equal": True, "mean_kl": 1e-4, "top1_agreement": 0.98}],
            "problems": ["the most likely token is the trained model's for 98 % of the tokens, not 99 %"],
            "notes": [],
        }
    ]
}
ENVIRONMENT: dict[str, Any] = {
    "os": "Linux 6.1",
    "python": "3.11.7",
    "cpu": "a CPU",
    "num_cpus": 2,
    "ram_bytes": 2**34,
    "gpu": None,
    "solotune": "0.1.0",
    "versions": {"torch": "2.13.0", "numpy": "2.4.6"},
    "choices": [],
}
FINGERPRINTS = {"train_rows": "a1", "validation_rows": "b2"}


def step(number: int, **changes: Any) -> StepEvent:
    values: dict[str, Any] = {
        "step": number,
        "total_steps": STEPS,
        "epoch": number / STEPS,
        "loss": 1 + math.exp(-number / 4),
        "token_accuracy": 0.5,
        "learning_rate": 1e-3 * (1 - number / STEPS),
        "grad_norm": 2 / number,
        "num_tokens": 100,
        "num_supervised": 40,
        "total_weight": 40.0,
        "step_seconds": 0.5,
        "tokens_per_second": 200.0,
        "peak_bytes": 2**31,
    }
    return StepEvent(**{**values, **changes})


def start() -> StartEvent:
    return StartEvent(0, STEPS, 40, 40, None, 8, 1_000, 100_000, [], 10**6, "cpu")


def events() -> list[Event]:
    """A whole run."""
    steps: list[Event] = [step(number) for number in range(1, STEPS + 1)]
    return [
        start(),
        *steps,
        EvalEvent(6, 0.2, 1.3, 0.06, 80),
        EvalEvent(STEPS, 0.5, 1.0, 0.05, 80),
        EndEvent(STEPS, 2**31),
    ]


def write_run(folder: Path, logged: list[Event] | None = None, config: str = CONFIG, **files: object) -> Path:
    """Write a run; `files` replaces a JSON file by other content, None leaves it out."""
    contents = {
        "data": DATA,
        "plan": PLAN,
        "evaluation": EVALUATION,
        "diagnosis": DIAGNOSIS,
        "environment": ENVIRONMENT,
        "fingerprints": FINGERPRINTS,
        "export": EXPORT,
    }
    (folder / "export").mkdir(parents=True)
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    logged = events() if logged is None else logged
    (folder / "metrics.jsonl").write_text("".join(to_line(event) for event in logged), encoding="utf-8")
    for name, content in {**contents, **files}.items():
        path = folder / "export" / "export.json" if name == "export" else folder / f"{name}.json"
        if content is not None:
            path.write_text(json.dumps(content), encoding="utf-8")
    return folder
