"""Runs of solotune's own, from the files that a person has to the run directory, through the doors that a person uses.

    job = clean(load("llama-chatml"), seed=0)      a model folder, files of rows and a config, all of them right
    job.config["learning_rate"] = 1e-6             what ours_faults.py and ours_healthy.py do
    solotune.diagnose(carried_out(job, folder))

Nothing is handed over but the path of the config or of the run directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import solotune
from bench.diagnose.bases import KINDS, Base, Format
from bench.diagnose.registry import Needs
from solotune.diagnosis import catalogue
from solotune.display.progress import SilentDisplay
from solotune.errors import SolotuneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]


@dataclass
class Job:
    """What a person asks of solotune, before it is written to disk."""

    base: Base
    tokenizer: PreTrainedTokenizerFast
    format: Format
    """Of the rows: the tokenizer's template, or the file of a base that has none."""
    train: list[Row]
    held_out: list[Row]
    """`eval_dataset`; none of it: a part of `train` is held out."""
    config: dict[str, Any]
    template: str | None = None
    """The file `chat_template_path`."""
    edit_model: list[Callable[[Any], None]] = field(default_factory=list)
    """The model, before its folder is written."""
    model_config: dict[str, Any] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)
    after: list[Callable[[Path, Path], None]] = field(default_factory=list)
    """What happens to run directory and model folder after the run."""
    stops_after: int | None = None
    """A scheduler ends it by SIGTERM after this step."""
    is_before: bool = False
    """The config is diagnosed, and nothing trained."""

    def messages(self) -> list[list[dict[str, str]]]:
        """The chats of all rows, to be changed in place."""
        return [row["messages"] for row in [*self.train, *self.held_out]]

    def retemplate(self) -> None:
        """The format, where the rows get their template from."""
        if self.template is None:
            self.tokenizer.chat_template = self.format.jinja()
        else:
            self.template = self.format.jinja()


Change = Callable[[Job, random.Random], None]


@dataclass(frozen=True)
class Asked:
    """One change to a clean job; `code` is empty where the run stays healthy."""

    code: str
    name: str
    needs: Needs
    change: Change
    is_seen_before: bool = False
    """Whether the config and its files already show it."""

    def fits(self, base: str) -> bool:
        return self.needs.met_by(KINDS[base])


FAULTS: list[Asked] = []
HEALTHY: list[Asked] = []


def asked(code: str = "", needs: Needs = Needs.ANY, before: bool = False) -> Callable[[Change], Change]:
    """Registers a change, of a fault where there is a code."""

    def registered(change: Change) -> Change:
        (FAULTS if code else HEALTHY).append(Asked(code, change.__name__, needs, change, before))
        return change

    return registered


def clean(base: Base, seed: int, rows: int = 240, held_out: int = 32) -> Job:
    """A job in which nothing is wrong."""
    train, validation = base.world.split(rows, held_out, seed)
    return Job(
        base=base,
        tokenizer=base.tokenizer(),
        format=base.kind.format,
        train=[{"messages": chat} for chat in train],
        held_out=[{"messages": chat} for chat in validation],
        template=None if base.kind.is_instruct else base.kind.format.jinja(),
        config={
            "base_precision": "fp32",
            "bf16": False,
            "use_cpu": True,
            "lora_r": 8,
            "lora_alpha": 16.0,
            "lora_dropout": 0.0,
            "lora_target_modules": "all-linear",
            "max_length": 256,
            "max_steps": 60,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "optim": "adamw_torch",
            "learning_rate": 6e-3,
            "lr_scheduler_type": "linear",
            "seed": seed % 1000,
            "eval_steps": 20,
            "num_samples": 0,
            "save_strategy": "no",
        },
    )


def carried_out(job: Job, folder: Path) -> Path:
    """Writes the job's files, trains where it is asked to, and returns what is to be diagnosed.

    A run that fails or is refused leaves what it leaves; without a run directory it is the config that is diagnosed.
    """
    config = _written(job, folder)
    if job.is_before:
        return config
    output = folder / "run"
    with contextlib.suppress(SolotuneError):
        solotune.train(config, display=_Ends(job.stops_after))
    if not output.exists():
        return config
    for change in job.after:
        change(output, folder / "model")
    return output


def _written(job: Job, folder: Path) -> Path:
    model = folder / "model"
    shutil.copytree(job.base.folder, model, ignore=shutil.ignore_patterns("base.json", "*token*", "*.jinja"))
    if job.edit_model:
        changed = job.base.model()
        for edit in job.edit_model:
            edit(changed)
        changed.save_pretrained(model)
    job.tokenizer.save_pretrained(model)
    for name, values in (("config.json", job.model_config), ("generation_config.json", job.generation_config)):
        known = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**known, **values}))
    config = {
        "model_name_or_path": str(model),
        "dataset": _rows(folder / "train.jsonl", job.train),
        "output_dir": str(folder / "run"),
        "allow_faults": [*catalogue.FAULTS],  # what is diagnosed is the run, not the refusal to start it
        **job.config,
    }
    if job.held_out:
        config["eval_dataset"] = _rows(folder / "held_out.jsonl", job.held_out)
    if job.template is not None:
        (folder / "template.jinja").write_text(job.template)
        config["chat_template_path"] = str(folder / "template.jinja")
    path = folder / "sft.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items()))
    return path


def _rows(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class _Ends(SilentDisplay):
    """Sends this process what a scheduler sends, after a step."""

    def __init__(self, after: int | None) -> None:
        self._after = after

    def step(self, event: Any) -> None:
        if event.step == self._after:
            os.kill(os.getpid(), signal.SIGTERM)
