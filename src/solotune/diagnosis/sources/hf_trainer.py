"""Build `RunFacts` from an output folder of Hugging Face's Trainer, TRL, PEFT, or tools on top of them.

    from_folder("output")                                                   a final folder, or checkpoint-50 alone
    from_folder("output", config="sft.yaml", dataset="chats.jsonl")         with its config and data; `base` as well

It reads the logged steps (`folder_steps`), the settings (`folder_settings`), adapter_config.json and
adapter_model.safetensors, tokenizer files and generation_config.json; from the newest checkpoint if the folder has
none. Config, data and base that are not given are looked for in the folder and beside it (`surroundings`); `found` says
what was found, and what to give.

The folder is not trusted. What its files name is compared with what lies there, never opened or looked up by that name;
`missing` says which, and the option that gives it. Files are read if they are regular files.

A trainer saves no batches. If data and base are here, probes see the rows as solotune renders and masks them; what the
collator of the training did stays open, and `missing` says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from solotune.diagnosis.facts.derived import is_zero
from solotune.diagnosis.run_facts import RunFacts, Saved, Settings
from solotune.diagnosis.sources import hf_settings, model_card, ranks, solotune_run, step_log
from solotune.diagnosis.sources.folder_settings import base_beside, beginning, settings_of, with_rows
from solotune.diagnosis.sources.folder_steps import steps_in, steps_of
from solotune.diagnosis.sources.found import Found
from solotune.diagnosis.sources.hf_rows import first_with, why_absent, with_base_and_rows
from solotune.diagnosis.sources.run_files import json_of
from solotune.diagnosis.sources.surroundings import Surroundings
from solotune.diagnosis.sources.trainer_logs import STATE
from solotune.errors import InputError, SolotuneError


def from_folder(
    folder: str | Path,
    config: str | Path | None = None,
    dataset: str | None = None,
    base: str | None = None,
    log_file: Path | None = None,
) -> RunFacts:
    """Facts on the training that wrote this folder.

    Args:
        log_file: the log that the user pointed at; None: the best in the folder.
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
    around = Surroundings.of(path)
    found = Found(around)
    missing: dict[str, str] = {}
    log, errors = steps_of(path, places, around) if log_file is None else steps_in(log_file)
    if log is None and not errors:
        has_state = first_with(places, STATE) is not None
        missing["trace"] = f"{STATE} has no readable log" if has_state else why_absent(places, STATE)
    found.steps(log)
    settings, names = settings_of(places, config, log, found, missing)
    settings, used = with_rows(settings, names, dataset, config, log, found)
    saved = _saved(path, places, settings, missing)
    run_facts = RunFacts(
        name=_name(path) if log_file is None else log_file.name,
        settings=settings,
        trace=None if log is None and not errors else step_log.trace_of(log or step_log.NO_STEPS, errors),
        saved=saved,
        ranks=ranks.of_folder(path),
        environment=_environment(places),
        missing=missing,
    )
    given = base or (hf_settings.translated(settings.asked).get("model_name_or_path") if config is not None else None)
    named: dict[str, Any] = {key: value for key, (value, _) in names.items()}
    named |= {"base": given or base_beside(names, found), "used": used}
    run_facts = with_base_and_rows(run_facts, places, missing, named)
    found.rest(run_facts, given, names)
    return replace(run_facts, found=found.parts, not_given=found.not_given(run_facts))


def _name(path: Path) -> str:
    """The folder's name; of a checkpoint with that of its run."""
    path = Path(os.path.abspath(path))
    return path.name if not path.name.startswith("checkpoint-") else f"{path.parent.name}/{path.name}"


def newest_checkpoint(folder: Path) -> Path | None:
    """checkpoint-N with the highest N; a link is none, since it leads out of the folder."""
    found = [
        (int(m[1]), path)
        for path in folder.glob("checkpoint-*")
        if (m := re.fullmatch(r"checkpoint-(\d{1,18})", path.name)) and path.is_dir() and not path.is_symlink()
    ]
    return max(found)[1] if found else None


def _environment(places: list[Path]) -> dict[str, Any]:
    """Library versions from the model card."""
    found = model_card.read(beginning(first_with(places, "README.md"))).versions
    return {"versions": dict(found)} if found else {}


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
