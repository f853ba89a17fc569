"""Programs that are a config and its files, as ordinary people write them, with nothing wrong: asked before training by
rules alone, some of them trained for a few steps and asked again.

    real_configs.py     over real files, with the tokenizers and templates of SmolLM2, Llama 3 and Qwen 3
    templated.py        over templated tasks, made here

What is recorded beside the verdict: what `solotune data` says of the same rows, or the monitor of the same run; the
three must agree.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import solotune
from bench.diagnose.bases import KINDS, load
from examples import smollm2
from solotune.display.progress import SilentDisplay
from solotune.errors import SolotuneError

Keys = dict[str, Any]
Files = Callable[[Path], Keys]
"""Writes the data into a folder, and returns the keys that name it."""

_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2}  # fmt: skip
_CONFIGS: dict[str, tuple[str, Keys, Keys]] = {
    "llama3": (
        "LlamaConfig",
        {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0, "bos_token_id": 128000,
         "eos_token_id": 128009},
        {"bos_token_id": 128000, "eos_token_id": [128001, 128009], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
    ),
    "qwen3": (
        "Qwen3Config",
        {"vocab_size": 151936, "max_position_embeddings": 40960, "rope_theta": 1000000.0, "bos_token_id": 151643,
         "eos_token_id": 151645, "tie_word_embeddings": True, "head_dim": 16},
        {"bos_token_id": 151643, "eos_token_id": [151645, 151643], "pad_token_id": 151643, "do_sample": True,
         "temperature": 0.6, "top_k": 20, "top_p": 0.95},
    ),
}  # fmt: skip
"""Name -> class, config.json and generation_config.json, as these families ship them; the weights are random."""
TRAINED: Keys = {
    "use_cpu": True, "bf16": False, "base_precision": "fp32", "optim": "adamw_torch", "max_steps": 20, "num_samples": 0,
    "save_strategy": "no", "gradient_checkpointing": False, "gradient_accumulation_steps": 1, "max_length": 256,
}  # fmt: skip
"""For a few steps on a processor."""


@dataclass(frozen=True)
class ConfigProgram:
    """One config over one set of files; `kind` is real or templated."""

    title: str
    base: str
    """smollm2, llama3, qwen3 (a real tokenizer), or a base of `bases.KINDS`."""
    kind: str
    files: Files
    keys: Keys = field(default_factory=dict)
    tokenizers: Path | None = None
    """Of `bench.real_data`; SmolLM2's is not among them."""
    is_before: bool = True
    """The config is diagnosed by rules alone; else a run of it, with probes."""

    codes: tuple[str, ...] = ()
    """Nothing is wrong."""

    @property
    def split(self) -> str:
        return self.kind

    @property
    def name(self) -> str:
        """healthy/alpaca_en packed/llama3/real/before"""
        return f"healthy/{self.title}/{self.base}/{self.kind}" + ("/before" if self.is_before else "")

    def preload(self) -> None:
        """Makes what all programs of this base share."""
        self.model()

    def model(self) -> Path:
        """The model's folder."""
        if self.base == "smollm2":
            return smollm2.ensure()
        if self.base in KINDS:
            return load(self.base).folder
        assert self.tokenizers is not None
        return _random_model(self.base, self.tokenizers / self.base)

    def written(self, folder: Path) -> Path:
        """The config, with its files, in `folder`."""
        config = {"model_name_or_path": str(self.model()), "output_dir": str(folder / "run"), **self.files(folder),
                  **self.keys}  # fmt: skip
        path = folder / "sft.yaml"
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items()), encoding="utf-8")
        return path

    def asked(self, folder: Path, budget: float) -> tuple[Any, Keys]:
        """The diagnosis, and what the other door to the same rules said."""
        config = self.written(folder)
        if self.is_before:
            return solotune.diagnose(config, budget=0), _data(config)
        try:
            solotune.train(config, display=SilentDisplay())
        except SolotuneError as error:  # refused, or failed: its owner asks why
            target = folder / "run" if (folder / "run").exists() else config
            return solotune.diagnose(target, budget=budget), {
                "monitor_verdict": "fault",
                "monitor_messages": [str(error)],
            }
        told = json.loads((folder / "run" / "diagnosis.json").read_text(encoding="utf-8"))
        found = solotune.diagnose(folder / "run", budget=budget)
        culprits = [f"{culprit['fault']}: {culprit['evidence'][:1]}" for culprit in told["culprits"]]
        return found, {"monitor_verdict": told["verdict"], "monitor_messages": culprits,
                       "monitor_next": told["next_experiment"]}  # fmt: skip


def _data(config: Path) -> Keys:
    """The faults and all messages of `solotune data`; a config that it refuses is faulty to its owner."""
    try:
        findings = solotune.data(config).report.findings or []
    except SolotuneError as error:
        said = error.problem + (f" ({error.seen})" if error.seen is not None else "")
        return {"data_faults": [error.fault or "refused"], "data_messages": [_short(f"refused: {said}")]}
    return {
        "data_faults": sorted({found["code"] for found in findings if found["severity"] == "error"}),
        "data_messages": [_short(f"{f['code']} {f['severity']}: {f['message']}") for f in findings],
    }


def _short(text: str) -> str:
    return text if len(text) <= 300 else text[:297] + "..."


@cache
def _random_model(name: str, tokenizer: Path) -> Path:
    """A tiny model with random weights under a real tokenizer, kept in the cache."""
    import shutil

    import torch
    import transformers

    cache_folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache_folder / "solotune" / "bench-diagnose" / f"random-{name}"
    if (folder / "tokenizer.json").exists():
        return folder
    family, config, generation = _CONFIGS[name]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, family)(**_SHAPE, **config), dtype=torch.bfloat16
    )
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    model.save_pretrained(partial)
    (partial / "generation_config.json").write_text(json.dumps(generation))
    for file in ("tokenizer_config.json", "tokenizer.json"):
        shutil.copy(tokenizer / file, partial / file)
    if folder.exists():  # another process was first
        shutil.rmtree(partial)
    else:
        partial.rename(folder)
    return folder


def as_jsonl(path: Path, rows: list[Any]) -> str:
    """The path, after writing the rows."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)
