"""A subject out of what another trainer left: Hugging Face's Trainer, trl, PEFT, and the tools on top of them.

    from_folder("output")                                                   a final folder, or checkpoint-50 alone
    from_folder("output", config="sft.yaml", dataset="chats.jsonl")         with what made it

What is read: trainer_state.json (the curve), training_args.bin (never unpickled: `pickled`), adapter_config.json and
adapter_model.safetensors, tokenizer files, generation_config.json, README.md (versions), logs; of the newest
checkpoint, where the folder itself has none. Settings held are those of the arguments and of the adapter; what the
config file says beside them is `asked`, and where nothing else is known it is taken to have held.

The batches of a foreign training are in no file. Where data and base are here, probes see the rows as solotune renders
and masks them; what the training's own collator did to them stays open, and is said in `missing`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from solotune.config import RunConfig
from solotune.dataset import findings as row_findings
from solotune.dataset import load_tokenizer, prepare
from solotune.dataset.findings_facts import Facts
from solotune.dataset.report import DataReport
from solotune.diagnosis import foreign_config, own, pickled
from solotune.diagnosis.raw_rows import raw_chats
from solotune.diagnosis.subject import Saved, Settings, Subject, Trace
from solotune.errors import InputError, SolotuneError

MAX_JSON_BYTES = 256 << 20
LOG_BYTES = 64 << 10
"""The end of a log, where its error stands."""
NUM_FILES = 200
_TOOLS = ("trl", "unsloth", "axolotl", "llama-factory", "llamafactory", "swift")


def from_folder(folder: str | Path, config: str | Path | None = None, dataset: str | None = None) -> Subject:
    """Everything that is known of the training that wrote this folder.

    Args:
        config: the YAML or JSON that made it, in any of the tools' words.
        dataset: what it was trained on: files, or a hub id.

    Raises:
        InputError: no such folder, or a config that is none.
    """
    path = own.expanded(folder)
    if not path.is_dir():
        raise InputError(f"{path}: no such folder", allowed="a folder that a trainer wrote")
    newest = newest_checkpoint(path)
    places = [path, *([newest] if newest else [])]
    missing: dict[str, str] = {}
    settings = _settings(places, config, dataset, missing)
    saved = _saved(path, places, settings, missing)
    subject = Subject(
        name=path.name if not path.name.startswith("checkpoint-") else f"{path.parent.name}/{path.name}",
        settings=settings,
        trace=_trace(path, places, missing),
        saved=saved,
        environment=_environment(places),
        missing=missing,
    )
    return _with_base_and_rows(subject, places, missing)


def newest_checkpoint(folder: Path) -> Path | None:
    """checkpoint-N with the highest N."""
    found = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := re.search(r"-(\d+)$", path.name))]
    return max(found)[1] if found else None


def _first(places: list[Path], name: str) -> Path | None:
    return next((place / name for place in places if (place / name).is_file()), None)


def _json(path: Path | None) -> dict[str, Any]:
    """A JSON object; empty where there is none that can be read."""
    try:
        if path is None or path.stat().st_size > MAX_JSON_BYTES:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# --- settings


def _settings(places: list[Path], config: str | Path | None, dataset: str | None, missing: dict[str, str]) -> Settings:
    """What held: arguments and adapter; what was asked: the config file."""
    held: dict[str, Any] = {}
    sources: dict[str, str] = {}
    made_by, file = "", _first(places, "training_args.bin")
    if file is not None:
        try:
            made_by, found = pickled.attributes(file)
            held |= foreign_config.translated(found)
            sources |= dict.fromkeys(held, "training_args.bin")
        except pickled.UnreadableError as error:
            missing["training_args"] = f"cannot be read: {error}"
    adapter = _json(_first(places, "adapter_config.json"))
    held |= foreign_config.of_adapter(adapter)
    asked: dict[str, Any] = {}
    if config is not None:
        asked, lines = foreign_config.read(config)
        ours = foreign_config.translated(asked)
        held = {**ours, **{key: value for key, value in held.items() if value is not None}}
        sources |= {key: lines[key] for key in ours if key in lines}
        if file is not None:
            unwritten = {"learning_rate", "max_length", "num_train_epochs"} & set(held) - set(ours)
            sources |= dict.fromkeys(unwritten, "default: the config does not name it")
    if dataset is not None:
        held["dataset"] = dataset
    readme = _first(places, "README.md")
    text = made_by + (readme.read_text(encoding="utf-8", errors="replace")[:LOG_BYTES] if readme else "")
    tool = next((tool for tool in _TOOLS if re.search(rf"\b{tool}\b", text, re.IGNORECASE)), None)
    held.setdefault("tool", tool or ("transformers" if made_by else None))
    return Settings(held, asked, sources)


def _environment(places: list[Path]) -> dict[str, Any]:
    """The versions that the model card names."""
    readme = _first(places, "README.md")
    text = readme.read_text(encoding="utf-8", errors="replace")[:LOG_BYTES] if readme else ""
    names = "TRL|Transformers|Pytorch|Datasets|Tokenizers|PEFT|Unsloth|Axolotl"
    found = re.findall(rf"^\s*-\s*({names})\s*:?\s*v?(\d[\w.+]*)", text, re.MULTILINE | re.IGNORECASE)
    return {"versions": {name.lower(): version for name, version in found}} if found else {}


# --- the curve


def _trace(folder: Path, places: list[Path], missing: dict[str, str]) -> Trace | None:
    file = _first(places, "trainer_state.json")
    state = _json(file)
    errors = _errors(folder)
    history = [entry for entry in state.get("log_history") or () if isinstance(entry, Mapping)]
    if not history and not errors:
        missing["trace"] = "no trainer_state.json" if file is None else f"{file.name} has no log that can be read"
        return None
    steps = [dict(entry) for entry in history if "loss" in entry and isinstance(entry.get("step"), int)]
    evals = [dict(entry) for entry in history if "eval_loss" in entry and isinstance(entry.get("step"), int)]
    total, last = state.get("max_steps"), state.get("global_step")
    ended = any("train_runtime" in entry or "train_loss" in entry for entry in history)
    return Trace(
        step_S=np.array([entry["step"] for entry in steps], np.int64),
        loss_S=own.column(steps, "loss"),
        learning_rate_S=own.column(steps, "learning_rate"),
        grad_norm_S=own.column(steps, "grad_norm"),
        epoch_S=own.column(steps, "epoch"),
        eval_step_E=np.array([entry["step"] for entry in evals], np.int64),
        eval_loss_E=own.column(evals, "eval_loss"),
        total_steps=total if isinstance(total, int) and total > 0 else None,
        is_finished=ended or (isinstance(last, int) and isinstance(total, int) and 0 < total <= last),
        errors=errors,
    )


def _errors(folder: Path) -> tuple[str, ...]:
    """Tracebacks, errors and warnings in the logs that lie in the folder or beside it."""
    names = sorted(path for pattern in ("*.log", "*.out", "*.err", "log*.txt") for path in folder.glob(pattern))
    found = []
    for path in names[:NUM_FILES]:
        try:
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - LOG_BYTES))
                text = file.read(LOG_BYTES).decode("utf-8", "replace")
        except OSError:
            continue
        place = text.rfind("Traceback (most recent call last)")
        if place >= 0:
            found.append(text[place:])
        found += [line for line in text.splitlines() if re.search(r"error|warning|warn\(", line, re.IGNORECASE)][-50:]
    return tuple(found)


# --- what was saved


def _saved(folder: Path, places: list[Path], settings: Settings, missing: dict[str, str]) -> Saved | None:
    config, file = _json(_first(places, "adapter_config.json")), _first(places, "adapter_model.safetensors")
    if file is None:
        other = _first(places, "adapter_model.bin")
        missing["saved"] = (
            "adapter_model.bin is a pickle, which is never loaded; save the adapter as safetensors"
            if other
            else "there is no adapter_model.safetensors"
        )
        return None
    from solotune import checkpoint

    try:
        tensors = checkpoint.read_adapter(file.parent)
    except SolotuneError as error:
        missing["saved"] = error.problem
        return None
    resumed = settings.get("resume_from_checkpoint")
    state = _resumed_from(folder, resumed) if resumed else None
    has = [None if state is None else any((state / f"{name}{end}").is_file() for end in (".pt", ".bin", ".safetensors"))
           for name in ("optimizer", "scheduler")]  # fmt: skip
    return Saved(tensors, config, optimizer_present=has[0], scheduler_present=has[1])


def _resumed_from(folder: Path, resumed: Any) -> Path | None:
    """The checkpoint that the run went on from, where it is still there."""
    if isinstance(resumed, str):
        for place in (own.expanded(resumed), folder / Path(resumed).name, folder.parent / Path(resumed).name):
            if place.is_dir():
                return place
    return None


# --- base, tokenizer and rows


def _with_base_and_rows(subject: Subject, places: list[Path], missing: dict[str, str]) -> Subject:
    get = subject.settings.get
    base = _base_of(subject)
    rows, chats = get("dataset"), []
    if rows:
        chats = raw_chats(rows, str(get("dataset_split") or "train"))
    config = foreign_config.as_run_config(subject.settings, base or str(places[0]), rows or "unknown.jsonl")
    files = Facts(config, None, [], [], DataReport("")).model_files  # type: ignore[arg-type] - only files are asked for
    generation = _json(_first(places, "generation_config.json")) or files["generation_config.json"]
    subject = replace(subject, model_config=files["config.json"], generation_config=generation, conversations=chats)
    if not files["config.json"]:
        missing["model_config"] = f"the base {base or '(no name of it is known)'} is not on this machine"
        missing["live"] = missing["model_config"]
    tokenizer = _tokenizer(config, places, missing)
    subject = replace(subject, tokenizer=tokenizer)
    if tokenizer is None or not rows:
        why = "--dataset names the data that it was trained on" if not rows else missing["tokenizer"]
        missing |= {part: why for part in ("train", "validation", "live") if part not in missing}
        return subject
    try:
        prepared = prepare(config, tokenizer)
    except SolotuneError as error:
        missing |= dict.fromkeys(("train", "validation"), error.problem)
        missing.setdefault("live", error.problem)
        return subject
    prepared.report.findings = row_findings.known_or_found(config, tokenizer, prepared)
    rest = own.from_prepared(config, tokenizer, prepared)
    missing["batches"] = "no file holds them; probes see the rows as solotune renders and masks them"
    subject = replace(subject, train=rest.train, validation=rest.validation, findings=rest.findings)
    if "live" in missing:
        return subject
    why = own.too_large(subject) or _not_here(config)
    if why is not None:
        missing["live"] = why
        return subject
    return replace(subject, live=own.live_of(_loadable(config, subject), tokenizer, prepared, _adapter_folder(places)))


def _base_of(subject: Subject) -> str | None:
    saved = subject.saved.adapter_config if subject.saved else {}
    found = saved.get("base_model_name_or_path") or subject.settings.get("model_name_or_path")
    return str(found) if found else None


def _tokenizer(config: RunConfig, places: list[Path], missing: dict[str, str]) -> Any:
    """That of the folder, which was saved with the training's template, else the base's."""
    for name in [*(str(place) for place in places if (place / "tokenizer_config.json").is_file()), None]:
        try:
            return load_tokenizer(config if name is None else config.replaced("folder", model_name_or_path=name))
        except SolotuneError as error:
            missing["tokenizer"] = error.problem
    return None


def _not_here(config: RunConfig) -> str | None:
    """Why the base's weights cannot be loaded without asking a network; None where they can."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if own.expanded(config.model_name_or_path).is_dir():
        return None
    try:
        for name in ("model.safetensors", "model.safetensors.index.json"):
            if isinstance(try_to_load_from_cache(config.model_name_or_path, name, revision=config.model_revision), str):
                return None
    except HFValidationError:
        pass
    return f"the weights of {config.model_name_or_path} are not on this machine"


def _loadable(config: RunConfig, subject: Subject) -> RunConfig:
    """The config with the adapter's own targets, by the modules in its file."""
    from solotune.diagnosis.arithmetic import adapted

    leaves = sorted({path.rpartition(".")[2] for path in adapted(subject)})
    return config.replaced("adapter", lora_target_modules=leaves) if leaves else config


def _adapter_folder(places: list[Path]) -> Path | None:
    file = _first(places, "adapter_model.safetensors")
    return file.parent if file else None
