"""Ordinary configs over real files: what people fine-tune on, with the keys that people set. Nothing is wrong in them.

    programs(FOLDER)      FOLDER of `python -m bench.real_data FOLDER`

Before training, by rules alone: every config. Trained for some steps: a few, with the real SmolLM2-135M, for each takes
minutes.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.diagnose.configs import TRAINED, ConfigProgram, Files, Keys, as_jsonl

Rows = list[dict[str, Any]]


def default_folder() -> Path:
    """Where the real data lies unless the command says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "solotune" / "bench-real-data"


def _read(path: Path) -> Rows:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def _file(folder: Path, name: str) -> Files:
    """The file as it was downloaded."""
    return lambda scratch: {"dataset": str(folder / name)}


def _head(folder: Path, name: str, rows: int) -> Files:
    """The first rows of a large file, as `head` copies them."""

    def write(scratch: Path) -> Keys:
        with (folder / name).open(encoding="utf-8") as file:
            lines = [line for line, _ in zip(file, range(rows), strict=False)]
        (scratch / Path(name).name).write_text("".join(lines), encoding="utf-8")
        return {"dataset": str(scratch / Path(name).name)}

    return write


def _made(folder: Path, name: str, change: Callable[[Rows], Rows]) -> Files:
    """Rows of a file, rewritten as jsonl."""
    return lambda scratch: {
        "dataset": as_jsonl(scratch / f"{Path(name).stem}.jsonl", change(_read(folder / "llamafactory" / name)))
    }


def _with_eval(folder: Path, name: str, held_out: int) -> Files:
    """The last rows are the person's own evaluation file."""

    def write(scratch: Path) -> Keys:
        rows = _read(folder / name)
        known = {_folded(row) for row in rows[:-held_out]}
        kept = [row for row in rows[-held_out:] if _folded(row) not in known]  # without copies, which would be a fault
        return {"dataset": as_jsonl(scratch / "train.jsonl", rows[:-held_out]),
                "eval_dataset": as_jsonl(scratch / "eval.jsonl", kept)}  # fmt: skip

    return write


def _folded(row: dict[str, Any]) -> str:
    return " ".join(json.dumps(row, ensure_ascii=False, sort_keys=True).casefold().split())


def _as_csv(folder: Path, name: str) -> Files:
    def write(scratch: Path) -> Keys:
        rows = _read(folder / "llamafactory" / name)
        with (scratch / "rows.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return {"dataset": str(scratch / "rows.csv")}

    return write


def _as_parquet(folder: Path, name: str) -> Files:
    def write(scratch: Path) -> Keys:
        import pyarrow
        import pyarrow.parquet

        rows = _read(folder / name)[:1000]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), scratch / "rows.parquet")
        return {"dataset": str(scratch / "rows.parquet")}

    return write


def _both(*files: Files) -> Files:
    """Several files in one training."""

    def write(scratch: Path) -> Keys:
        return {"dataset": [one(scratch)["dataset"] for one in files]}

    return write


def _named(rows: Rows) -> Rows:
    """The identity file with its blanks filled in, as its readme asks."""
    text = json.dumps(rows, ensure_ascii=False).replace("{{name}}", "Robin").replace("{{author}}", "Example Labs")
    return json.loads(text)


def _chosen(rows: Rows) -> Rows:
    """Of preference pairs the preferred answer."""
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    return [
        {"messages": [{"role": roles[turn["from"]], "content": turn["value"]}
                      for turn in [*row["conversations"], row["chosen"]]]}
        for row in rows
    ]  # fmt: skip


def _liked(rows: Rows) -> Rows:
    """Of rated answers the good ones."""
    return [{"messages": row["messages"]} for row in rows if row["label"]]


def _weighted(rows: Rows) -> Rows:
    """Every third row counts double."""
    return [{**row, "weight": 2.0 if number % 3 == 0 else 1.0} for number, row in enumerate(rows)]


def _paragraphs(folder: Path) -> Files:
    """A plain text file, one document a paragraph."""

    def write(scratch: Path) -> Keys:
        text = (folder / "llamafactory" / "wiki_demo.txt").read_text(encoding="utf-8")
        rows = [{"text": line.strip()} for line in text.splitlines() if len(line.strip()) > 80]
        return {"dataset": as_jsonl(scratch / "wiki.jsonl", rows)}

    return write


def _sources(folder: Path) -> dict[str, Files]:
    lf = "llamafactory/"
    alpaca_en, alpaca_zh = _file(folder, lf + "alpaca_en_demo.json"), _file(folder, lf + "alpaca_zh_demo.json")
    identity = _made(folder, "identity.json", _named)
    return {
        "alpaca_en": alpaca_en,
        "alpaca_zh": alpaca_zh,
        "alpaca_en csv": _as_csv(folder, "alpaca_en_demo.json"),
        "alpaca_zh csv": _as_csv(folder, "alpaca_zh_demo.json"),
        "alpaca_en parquet": _as_parquet(folder, lf + "alpaca_en_demo.json"),
        "chitchat parquet": _as_parquet(folder, "chitchat.jsonl"),
        "alpaca_en eval file": _with_eval(folder, lf + "alpaca_en_demo.json", 99),
        "alpaca_zh eval file": _with_eval(folder, lf + "alpaca_zh_demo.json", 100),
        "c4 eval file": _with_eval(folder, lf + "c4_demo.jsonl", 30),
        "alpaca_en weights": _made(folder, "alpaca_en_demo.json", _weighted),
        "identity": identity,
        "identity and alpaca": _both(identity, alpaca_en),
        "alpaca en and zh": _both(alpaca_en, alpaca_zh),
        "glaive_en": _file(folder, lf + "glaive_toolcall_en_demo.json"),
        "glaive_zh": _file(folder, lf + "glaive_toolcall_zh_demo.json"),
        "dpo_en chosen": _made(folder, "dpo_en_demo.json", _chosen),
        "dpo_zh chosen": _made(folder, "dpo_zh_demo.json", _chosen),
        "kto_en liked": _made(folder, "kto_en_demo.json", _liked),
        "c4": _file(folder, lf + "c4_demo.jsonl"),
        "wiki": _paragraphs(folder),
        "sharegpt 500": _head(folder, "sharegpt.jsonl", 500),
        "sharegpt 1500": _head(folder, "sharegpt.jsonl", 1500),
        "chats 300": _head(folder, "chats.jsonl", 300),
        "chats 1000": _head(folder, "chats.jsonl", 1000),
        "chats 2000": _head(folder, "chats.jsonl", 2000),
        "chitchat 500": _head(folder, "chitchat.jsonl", 500),
        "chitchat": _head(folder, "chitchat.jsonl", 2500),
    }


_DROP = {"on_bad_row": "drop"}
_CONFIGS: tuple[tuple[str, str, Keys], ...] = (
    ("alpaca_en", "smollm2", {}),
    ("alpaca_en", "llama3", {}),
    ("alpaca_en", "qwen3", {}),
    ("alpaca_en", "smollm2", {"max_length": 256}),
    ("alpaca_en", "llama3", {"max_length": 512, "packing": True}),
    ("alpaca_en", "qwen3", {"max_length": 1024, "packing": True, "assistant_only_loss": False}),
    ("alpaca_en", "smollm2", {"packing": True, "max_length": 2048, "num_train_epochs": 1}),
    ("alpaca_en", "llama3", {"validation_size": 0.1, "learning_rate": 1e-4, "num_train_epochs": 2}),
    ("alpaca_en", "smollm2", {"validation_size": 100, "lora_target_modules": "all-linear", "lora_r": 32,
                              "lora_alpha": 64.0}),
    ("alpaca_en", "qwen3", {"train_on_last_turn": True, "max_length": 512}),
    ("alpaca_en", "smollm2", {"assistant_only_loss": False, "max_length": 512}),
    ("alpaca_en", "llama3", {"overflow": "drop", "max_length": 512, "warmup_ratio": 0.03}),
    ("alpaca_en csv", "smollm2", {"max_length": 1024}),
    ("alpaca_en csv", "qwen3", {"validation_size": 0.1}),
    ("alpaca_zh csv", "qwen3", {"max_length": 1024}),
    ("alpaca_en parquet", "llama3", {"max_length": 1024}),
    ("alpaca_en parquet", "smollm2", {"packing": True, "max_length": 1024}),
    ("alpaca_en eval file", "smollm2", {"max_length": 1024}),
    ("alpaca_en eval file", "llama3", {"packing": True, "max_length": 2048, "lr_scheduler_type": "linear"}),
    ("alpaca_zh eval file", "qwen3", {"max_length": 1024, "eval_steps": 50}),
    ("alpaca_en weights", "smollm2", {"max_length": 1024}),
    ("alpaca_en weights", "qwen3", {"packing": True, "max_length": 1024}),
    ("alpaca_zh", "smollm2", {}),
    ("alpaca_zh", "llama3", {"max_length": 1024, "weight_decay": 0.01}),
    ("alpaca_zh", "qwen3", {"max_length": 512, "packing": True}),
    ("alpaca_zh", "qwen3", {"validation_size": 0.1, "assistant_only_loss": False}),
    ("identity", "smollm2", {}),
    ("identity", "llama3", {"num_train_epochs": 10, "learning_rate": 1e-4}),
    ("identity", "qwen3", {"validation_size": 0.1, "per_device_train_batch_size": 2,
                           "gradient_accumulation_steps": 4}),
    ("identity", "smollm2", {"packing": True, "max_length": 512, "validation_size": 0}),
    ("identity and alpaca", "llama3", {"max_length": 1024}),
    ("identity and alpaca", "qwen3", {"packing": True, "max_length": 2048}),
    ("alpaca en and zh", "qwen3", {"max_length": 1024, "num_train_epochs": 1}),
    ("alpaca en and zh", "smollm2", {"max_length": 2048, "validation_size": 0.1}),
    ("glaive_en", "qwen3", {}),
    ("glaive_en", "qwen3", {"packing": True, "max_length": 4096}),
    ("glaive_zh", "qwen3", {"max_length": 4096, "validation_size": 0.1, "on_bad_row": "drop"}),
    ("glaive_zh", "qwen3", {"train_on_last_turn": True, "on_bad_row": "drop"}),
    ("dpo_en chosen", "smollm2", {}),
    ("dpo_en chosen", "llama3", {"max_length": 1024, "packing": True}),
    ("dpo_zh chosen", "qwen3", {"max_length": 4096}),
    ("kto_en liked", "llama3", {"max_length": 1024}),
    ("kto_en liked", "smollm2", {"validation_size": 0.1}),
    ("c4", "smollm2", {}),
    ("c4", "llama3", {"packing": True, "max_length": 1024}),
    ("c4", "qwen3", {"overflow": "split", "max_length": 512}),
    ("c4 eval file", "smollm2", {"packing": True, "max_length": 512}),
    ("wiki", "qwen3", {"packing": True, "max_length": 2048}),
    ("wiki", "smollm2", {"max_length": 1024, "overflow": "split"}),
    ("wiki", "llama3", {"max_length": 4096, "num_train_epochs": 1}),
    ("sharegpt 500", "smollm2", _DROP),
    ("sharegpt 500", "llama3", {**_DROP, "max_length": 4096}),
    ("sharegpt 1500", "qwen3", {**_DROP, "max_length": 1024, "packing": True}),
    ("chats 300", "llama3", {"max_length": 4096, "validation_size": 0.1}),
    ("chats 300", "smollm2", {"max_length": 768}),
    ("chats 1000", "smollm2", {"max_length": 2048, "packing": True, "num_train_epochs": 1}),
    ("chats 1000", "llama3", {"max_length": 1024}),
    ("chats 1000", "qwen3", {"max_length": 4096, "overflow": "drop"}),
    ("chats 2000", "smollm2", {"max_length": 1024, "overflow": "split"}),
    ("chats 2000", "llama3", {"max_length": 2048, "assistant_only_loss": False}),
    ("chitchat 500", "smollm2", {}),
    ("chitchat 500", "llama3", {"max_length": 512, "validation_size": 0.1}),
    ("chitchat 500", "qwen3", {"packing": True, "max_length": 4096}),
    ("chitchat", "smollm2", {"max_length": 256, "num_train_epochs": 1}),
    ("chitchat", "llama3", {"packing": True, "max_length": 2048, "assistant_only_loss": False}),
    ("chitchat parquet", "qwen3", {"max_length": 1024}),
    ("chitchat parquet", "smollm2", {"max_length": 2048, "train_on_last_turn": True}),
)  # fmt: skip
_RUNS: tuple[tuple[str, Keys], ...] = (
    ("alpaca_en", {}), ("alpaca_zh", {"per_device_train_batch_size": 2}), ("identity", {"num_train_epochs": 1}),
    ("chitchat 500", {"packing": True}), ("chats 300", {"assistant_only_loss": False}), ("c4", {"packing": True}),
)  # fmt: skip
"""Trained for some steps with SmolLM2-135M."""


def programs(folder: Path) -> list[ConfigProgram]:
    """All of them; none if the real data is not there."""
    if not (folder / "chitchat.jsonl").is_file():
        return []
    sources = _sources(folder)
    found = [
        ConfigProgram(_title(source, keys), base, "real", sources[source], keys, folder / "tokenizers")
        for source, base, keys in _CONFIGS
    ]
    runs = [
        ConfigProgram(_title(source, keys), "smollm2", "real", sources[source], {**TRAINED, **keys}, is_before=False)
        for source, keys in _RUNS
    ]
    return found + runs


def _title(source: str, keys: Keys) -> str:
    """alpaca_en max_length=512 packing=True"""
    told = [f"{key}={value}" for key, value in keys.items() if key not in _DROP]
    return " ".join([source, *told]).replace("/", "-")
