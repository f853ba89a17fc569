"""Settings of a trainer's folder: what the run used, what its config asks for, and the data that belongs to it.

    settings, names = settings_of(places, config, log, found, missing)
    settings, choice = with_rows(settings, names, dataset, config, log, found)

A run used what stands in training_args.bin and adapter_config.json; without arguments, what a tracker recorded, else
what the config or the model card says, with the defaults of the tool. `names` are what these files call data and base:
they are compared with what lies in and beside the folder (`surroundings`), and never opened.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solotune.diagnosis.run_facts import Settings
from solotune.diagnosis.sources import (
    found_config,
    found_rows,
    hf_settings,
    model_card,
    pickle_reader,
    trainer_defaults,
    trl_preprocessing,
)
from solotune.diagnosis.sources.found import Found
from solotune.diagnosis.sources.found_rows import Choice
from solotune.diagnosis.sources.hf_rows import first_with
from solotune.diagnosis.sources.run_files import json_of
from solotune.diagnosis.sources.step_log import StepLog
from solotune.regular_files import open_regular

LOG_BYTES = 64 << 10
"""Bytes read from the start of a model card."""
NAMES_OUTSIDE = ("dataset", "dataset_config", "dataset_revision", "dataset_split", "eval_dataset", "eval_dataset_split",
                 "chat_template_path", "model_revision")  # fmt: skip
"""Settings of training_args.bin that say where something outside of the folder is."""
_RECORDED = found_config.KEYS | {
    "seed", "adam_epsilon", "gradient_checkpointing", "logging_steps", "group_by_length", "dataloader_drop_last",
    "validation_size", "eval_dataset", "neftune_noise_alpha", "logging_nan_inf_filter", "use_rslora", "load_in_8bit",
    "bnb_4bit_compute_dtype", "truncation_side", "init_lora_weights", "modules_to_save", "use_reentrant",
}  # fmt: skip
"""Settings taken from a tracker, which records the model's config.json among them."""
_NO_LENGTH = 20
"""`max_length` of transformers' generation settings, which a tracker records with the model's config."""
_TOOLS = ("trl", "unsloth", "axolotl", "llama-factory", "llamafactory", "swift")


def settings_of(
    places: list[Path],
    config: str | Path | None,
    log: StepLog | None,
    found: Found,
    missing: dict[str, str],
) -> tuple[Settings, dict[str, Any]]:
    """Settings of arguments and adapter, else of the tracker's record, the config file and the model card; `asked`:
    those of the config file. And the names that the run's files give for things outside, which are no settings here."""
    held, made_by = _of_files(places, log, found, missing)
    names = _take_names(held, "training_args.bin")
    sources = dict.fromkeys(held, "training_args.bin") if made_by else {}
    adapter = json_of(first_with(places, "adapter_config.json"))
    held |= hf_settings.of_adapter(adapter)
    base = adapter.get("base_model_name_or_path")
    card = model_card.read(beginning(first_with(places, "README.md")))
    asked: dict[str, Any] = {}
    text = made_by + beginning(first_with(places, "README.md"))
    tool = next((tool for tool in _TOOLS if re.search(rf"\b{tool}\b", text, re.IGNORECASE)), None)
    choice = found_config.choose(found.around, held) if config is None else found_config.ConfigChoice()
    found.config(choice)
    if (used := config or choice.path) is not None:
        asked, lines = hf_settings.read(used)
        ours = hf_settings.translated(asked)
        if config is None:
            names = _take_names(ours, Path(used).name) | names
            asked = {key: value for key, value in asked.items() if key not in _of_names(asked)}
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
    elif not made_by and card.settings:
        found.parts.setdefault("settings", "README.md")
        ours = hf_settings.translated(card.settings)
        names = _take_names(ours, "README.md") | names
        sources |= dict.fromkeys(set(ours) - set(held), "README.md")
        held = {**ours, **held}
    held.setdefault("tool", tool or ("transformers" if made_by else None))
    names |= {"model_name_or_path": (base, "adapter_config.json")} if isinstance(base, str) and base else {}
    return Settings(held, asked, sources), names


def _of_files(
    places: list[Path], log: StepLog | None, found: Found, missing: dict[str, str]
) -> tuple[dict[str, Any], str]:
    """(settings that the run used, the class of its arguments; empty if there are none): of training_args.bin, else of
    what a tracker recorded."""
    file = first_with(places, "training_args.bin")
    if file is not None:
        try:
            made_by, written = pickle_reader.attributes(file)
            held = hf_settings.translated(written)
            if "completion_only_loss" in written and "packing_strategy" in written:
                held["sft"] = trl_preprocessing.arguments(written)
            found.parts["settings"] = "training_args.bin"
            return held, made_by
        except pickle_reader.UnreadableError as error:
            missing["training_args"] = f"cannot be read: {error}"
    if log is not None and log.kind in ("wandb", "tensorboard", "mlflow") and log.settings:
        found.parts["settings"] = f"recorded in {found.around.shown(log.file)}"
        written, _ = hf_settings.flat(log.settings)
        held = {key: value for key, value in hf_settings.translated(written).items() if key in _RECORDED}
        return {key: value for key, value in held.items() if (key, value) != ("max_length", _NO_LENGTH)}, ""
    return {}, ""


def _of_names(written: Mapping[str, Any]) -> set[str]:
    """The keys of a config that name something outside."""
    return {
        key for key in written if hf_settings.translated({key: "x"}).keys() & {*NAMES_OUTSIDE, "model_name_or_path"}
    }


def _take_names(held: dict[str, Any], where: str) -> dict[str, Any]:
    """Remove the names of things outside from settings that nobody gave: key -> (name, the file in which it stands)."""
    keys = (*NAMES_OUTSIDE, "model_name_or_path")
    return {key: (held.pop(key), where) for key in keys if held.get(key) is not None}


def with_rows(
    settings: Settings,
    names: Mapping[str, Any],
    dataset: str | None,
    config: str | Path | None,
    log: StepLog | None,
    found: Found,
) -> tuple[Settings, Choice]:
    """The settings with the training data: as given, else as found in the folder or beside it."""
    held = dict(settings.values)
    if dataset is not None:
        held["dataset"] = dataset
    choice = Choice()
    if dataset is not None or (config is not None and held.get("dataset") is not None):
        found.parts["rows"] = f"{dataset or held['dataset']} (given)"
    else:
        choice = found_rows.choose(found.around, _named(names, "dataset"), log, held)
        found.rows(choice)
        if not choice.paths:
            return settings, choice
        held["dataset"] = [str(path) for path in choice.paths]
    _take_held_out(held, names, found)
    return Settings(held, settings.asked, settings.sources), choice


def _take_held_out(held: dict[str, Any], names: Mapping[str, Any], found: Found) -> None:
    """Set the evaluation data to files that lie in the folder or beside it, if their names are the run's or given."""
    given = held.get("eval_dataset")
    written = [(name, "the config") for name in found_rows.names_of(given)] if given else _named(names, "eval_dataset")
    if given and all(os.path.exists(os.path.expanduser(name)) for name, _ in written):
        return
    held_out = found_rows.held_out(found.around, written)
    if held_out.paths:
        held["eval_dataset"] = [str(path) for path in held_out.paths]
        found.parts["evaluation rows"] = f"{found.listed(held_out.paths)} ({held_out.why})"


def _named(names: Mapping[str, Any], key: str) -> list[tuple[str, str]]:
    value, where = names.get(key) or (None, "")
    return [(name, where) for name in found_rows.names_of(value)]


def base_beside(names: Mapping[str, Any], found: Found) -> str | None:
    """The folder of a model in or beside the folder whose name is that of the base."""
    written, _ = names.get("model_name_or_path") or (None, "")
    place = found.around.named(written, found.around.models)
    return None if place is None else str(place)


def beginning(path: Path | None) -> str:
    """The first LOG_BYTES of a text file; empty if there is none that can be read."""
    if path is None:
        return ""
    with contextlib.suppress(OSError), open_regular(path) as file:
        return file.read(LOG_BYTES).decode("utf-8", "replace")
    return ""
