"""Build `RunFacts` from an output folder of Hugging Face's Trainer, TRL, PEFT, or tools on top of them.

    from_folder("output")                                                   a final folder, or checkpoint-50 alone
    from_folder("output", config="sft.yaml", dataset="chats.jsonl")         with its config and data; `base` as well

It reads trainer_state.json (the curve), training_args.bin (never unpickled: `pickle_reader`), adapter_config.json and
adapter_model.safetensors, tokenizer files, generation_config.json, README.md (versions) and logs; from the newest
checkpoint if the folder itself has none. The settings are those of the arguments and of the adapter. Those of the
config file are `asked`, and count as settings where neither file has the key.

The folder is not trusted. Models, data and files outside that it names are not opened and not looked up; `missing` says
which, and the option that gives them. Its own files are read if they are regular files inside it.

A trainer saves no batches. If data and base are here, probes see the rows as solotune renders and masks them; what the
collator of the training did stays open, and `missing` says so.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

import numpy as np

from solotune.diagnosis.facts.derived import is_zero
from solotune.diagnosis.run_facts import RunFacts, Saved, Settings, Trace
from solotune.diagnosis.sources import (
    hf_settings,
    pickle_reader,
    run_files,
    solotune_run,
    trainer_defaults,
    trl_preprocessing,
)
from solotune.diagnosis.sources.hf_rows import first_with, why_absent, with_base_and_rows
from solotune.diagnosis.sources.run_files import json_of
from solotune.errors import InputError, SolotuneError
from solotune.hub.safe_files import check_regular
from solotune.regular_files import open_regular
from solotune.run.events import MAX_INT

LOG_BYTES = 64 << 10
"""Bytes read from the end of a log, where its error is."""
NUM_FILES = 200
NAMES_OUTSIDE = ("dataset", "dataset_config", "dataset_revision", "dataset_split", "eval_dataset", "eval_dataset_split",
                 "chat_template_path", "model_revision")  # fmt: skip
"""Settings of training_args.bin that say where something outside of the folder is."""
STATE = "trainer_state.json"
_TOOLS = ("trl", "unsloth", "axolotl", "llama-factory", "llamafactory", "swift")


def from_folder(
    folder: str | Path, config: str | Path | None = None, dataset: str | None = None, base: str | None = None
) -> RunFacts:
    """Facts on the training that wrote this folder.

    Args:
        config: its YAML or JSON config, with the keys of any of the tools.
        dataset: the training data: a file, or a hub id.
        base: the base model: a folder, or a hub id that is in the cache.

    Raises:
        InputError: no such folder, or not a config.
    """
    path = solotune_run.expanded(folder)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder", allowed="the output folder of a trainer")
    newest = newest_checkpoint(path)
    places = [path, *([newest] if newest else [])]
    missing: dict[str, str] = {}
    settings, named = _settings(places, config, dataset, missing)
    saved = _saved(path, places, settings, missing)
    run_facts = RunFacts(
        name=path.name if not path.name.startswith("checkpoint-") else f"{path.parent.name}/{path.name}",
        settings=settings,
        trace=_trace(path, places, missing),
        saved=saved,
        environment=_environment(places),
        missing=missing,
    )
    base = base or hf_settings.translated(settings.asked).get("model_name_or_path")
    return with_base_and_rows(run_facts, places, missing, named | {"base": base})


def newest_checkpoint(folder: Path) -> Path | None:
    """checkpoint-N with the highest N; a link is none, since it leads out of the folder."""
    found = [
        (int(m[1]), path)
        for path in folder.glob("checkpoint-*")
        if (m := re.fullmatch(r"checkpoint-(\d{1,18})", path.name)) and path.is_dir() and not path.is_symlink()
    ]
    return max(found)[1] if found else None


# --- settings


def _settings(
    places: list[Path], config: str | Path | None, dataset: str | None, missing: dict[str, str]
) -> tuple[Settings, dict[str, Any]]:
    """Settings of arguments and adapter, else of the config file; `asked`: those of the config file. And the names that
    the folder itself gives for things outside, which are no settings here."""
    held: dict[str, Any] = {}
    named: dict[str, Any] = {}
    sources: dict[str, str] = {}
    made_by, file = "", first_with(places, "training_args.bin")
    if file is not None:
        try:
            made_by, found = pickle_reader.attributes(file)
            held |= hf_settings.translated(found)
            named = {key: held.pop(key) for key in NAMES_OUTSIDE if key in held}
            if "completion_only_loss" in found and "packing_strategy" in found:
                held["sft"] = trl_preprocessing.arguments(found)
            sources |= dict.fromkeys(held, "training_args.bin")
        except pickle_reader.UnreadableError as error:
            missing["training_args"] = f"cannot be read: {error}"
    adapter = json_of(first_with(places, "adapter_config.json"))
    held |= hf_settings.of_adapter(adapter)
    asked: dict[str, Any] = {}
    readme = first_with(places, "README.md")
    text = made_by + _beginning(readme)
    tool = next((tool for tool in _TOOLS if re.search(rf"\b{tool}\b", text, re.IGNORECASE)), None)
    if config is not None:
        asked, lines = hf_settings.read(config)
        ours = hf_settings.translated(asked)
        if ours.get("assistant_only_loss") is True:
            held["assistant_only_loss"] = True  # as written; the labels show what it did
        tool = tool or (trainer_defaults.tool_of(asked) if not made_by else None)
        if not made_by:
            ours = {**trainer_defaults.unstated(tool), **ours}
            held |= {"sft": trl_preprocessing.arguments(asked)} if tool == "trl" else {}
        held = {**ours, **{key: value for key, value in held.items() if value is not None}}
        sources |= {key: lines[key] for key in ours if key in lines}
        unwritten = {"learning_rate", "max_length", "num_train_epochs"} & set(held) - set(lines)
        sources |= dict.fromkeys(unwritten, "default: not set in the config")
    if dataset is not None:
        held["dataset"] = dataset
    held.setdefault("tool", tool or ("transformers" if made_by else None))
    return Settings(held, asked, sources), named


def _beginning(path: Path | None) -> str:
    """The first LOG_BYTES of a text file; empty if there is none that can be read."""
    if path is None:
        return ""
    with contextlib.suppress(OSError), open_regular(path) as file:
        return file.read(LOG_BYTES).decode("utf-8", "replace")
    return ""


def _environment(places: list[Path]) -> dict[str, Any]:
    """Library versions from the model card."""
    text = _beginning(first_with(places, "README.md"))
    names = "TRL|Transformers|Pytorch|Datasets|Tokenizers|PEFT|Unsloth|Axolotl"
    found = re.findall(rf"^\s*-\s*({names})\s*:?\s*v?(\d[\w.+]*)", text, re.MULTILINE | re.IGNORECASE)
    return {"versions": {name.lower(): version for name, version in found}} if found else {}


# --- the curve


def _trace(folder: Path, places: list[Path], missing: dict[str, str]) -> Trace | None:
    file = first_with(places, STATE)
    state = json_of(file)
    errors = _errors(folder)
    logged = state.get("log_history")
    history = [entry for entry in logged if isinstance(entry, Mapping)] if isinstance(logged, list) else []
    if not history and not errors:
        missing["trace"] = why_absent(places, STATE) if file is None else f"{file.name} has no readable log"
        return None
    steps = [dict(entry) for entry in history if "loss" in entry and _is_step(entry.get("step"))]
    evals = [dict(entry) for entry in history if "eval_loss" in entry and _is_step(entry.get("step"))]
    total, last = state.get("max_steps"), state.get("global_step")
    ended = any("train_runtime" in entry or "train_loss" in entry for entry in history)
    return Trace(
        step_S=np.array([entry["step"] for entry in steps], np.int64),
        loss_S=run_files.column(steps, "loss"),
        learning_rate_S=run_files.column(steps, "learning_rate"),
        grad_norm_S=run_files.column(steps, "grad_norm"),
        epoch_S=run_files.column(steps, "epoch"),
        eval_step_E=np.array([entry["step"] for entry in evals], np.int64),
        eval_loss_E=run_files.column(evals, "eval_loss"),
        total_steps=total if _is_step(total) and total > 0 else None,
        is_finished=ended or (_is_step(last) and _is_step(total) and 0 < total <= last),
        errors=errors,
    )


def _is_step(value: Any) -> TypeGuard[int]:
    return type(value) is int and abs(value) <= MAX_INT


def _errors(folder: Path) -> tuple[str, ...]:
    """Tracebacks, errors and warnings in the log files of the folder."""
    names = sorted(path for pattern in ("*.log", "*.out", "*.err", "log*.txt") for path in folder.glob(pattern))
    found = []
    for path in names[:NUM_FILES]:
        try:
            check_regular(folder, path)
            with open_regular(path) as file:
                file.seek(max(0, path.stat().st_size - LOG_BYTES))
                text = file.read(LOG_BYTES).decode("utf-8", "replace")
        except (OSError, InputError):
            continue
        place = text.rfind("Traceback (most recent call last)")
        if place >= 0:
            found.append(text[place:])
        found += [line for line in text.splitlines() if re.search(r"error|warning|warn\(", line, re.IGNORECASE)][-50:]
    return tuple(found)


# --- what was saved


def _saved(folder: Path, places: list[Path], settings: Settings, missing: dict[str, str]) -> Saved | None:
    config, file = json_of(first_with(places, "adapter_config.json")), first_with(places, "adapter_model.safetensors")
    if file is None:
        other = first_with(places, "adapter_model.bin")
        missing["saved"] = (
            "adapter_model.bin is a pickle, which solotune never loads; save the adapter as safetensors"
            if other
            else why_absent(places, "adapter_model.safetensors")
        )
        return None
    from solotune.model.adapter import adapter_tensors

    try:
        tensors = adapter_tensors(file.parent)
    except SolotuneError as error:
        missing["saved"] = error.problem
        return None
    resumed = settings.get("resume_from_checkpoint")
    state = _resumed_from(folder, resumed) if resumed else None
    has = [None if state is None else any((state / f"{name}{end}").is_file() for end in (".pt", ".bin", ".safetensors"))
           for name in ("optimizer", "scheduler")]  # fmt: skip
    return Saved(tensors, config, has[0], has[1], in_checkpoint=_in_checkpoint(file, tensors))


def _in_checkpoint(file: Path, tensors: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The adapter of the newest checkpoint if the folder's own has only zero B; the same if this is a checkpoint."""
    if not all(is_zero(tensor) for name, tensor in tensors.items() if "lora_B" in name):
        return None
    if file.parent.name.startswith("checkpoint-"):
        return tensors
    newest = newest_checkpoint(file.parent)
    if newest is None or not (newest / file.name).is_file():
        return None
    from solotune.model.adapter import adapter_tensors

    try:
        return adapter_tensors(newest)
    except SolotuneError:
        return None


def _resumed_from(folder: Path, resumed: Any) -> Path | None:
    """The checkpoint that the run resumed from, if it is in this folder: its name leads nowhere else."""
    name = PurePosixPath(resumed).name if isinstance(resumed, str) else ""
    place = folder / name
    return place if name not in ("", "..") and place.is_dir() and not place.is_symlink() else None
