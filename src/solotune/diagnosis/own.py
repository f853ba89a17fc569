"""A subject out of what is ours: rows that are prepared, a config, a run directory.

    from_prepared(config, tokenizer, prepared)     what the verb train has in hand
    of_config(config)                              before a run
    from_run("runs/demo")                          during or after it: finished, crashed, unfinished, resumed

Whatever is not there (the base model, the data, a file of the run) is named in `missing` with its reason, and the rest
is judged without it. A run's files are read as they are: metrics with a torn last line, with NaN, empty or absent.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from solotune import __version__
from solotune.config import RunConfig, load_config
from solotune.dataset import Prepared, load_tokenizer
from solotune.dataset.examined import examined
from solotune.dataset.findings_facts import Facts, Finding
from solotune.dataset.report import DataReport
from solotune.diagnosis import arithmetic
from solotune.diagnosis.evidence import Signal, of_refusal
from solotune.diagnosis.own_live import batches_of, own_live
from solotune.diagnosis.subject import Live, Saved, Settings, Subject, Trace
from solotune.environment import ram
from solotune.errors import InputError, IntegrityError, SolotuneError
from solotune.record import FINGERPRINTS, RunDirectory


def settings_of(config: RunConfig) -> Settings:
    """All keys of a config, each with where it was set, and what solotune does without a key for it."""
    fixed = {
        "tool": "solotune",
        "adapter_dtype": "float32",
        "load_in_4bit": config.base_precision == "nf4",
        "bnb_4bit_compute_dtype": config.bnb_4bit_compute_dtype or ("bfloat16" if config.bf16 else "float32"),
    }
    sources = {key: config.source_of(key) for key in RunConfig.model_fields}
    return Settings({**config.model_dump(), **fixed}, sources=sources)


def from_prepared(config: RunConfig, tokenizer: Any, prepared: Prepared) -> Subject:
    """A training that is about to begin: its settings and its rows, of which nothing has run yet."""
    files = Facts(config, tokenizer, prepared.train, prepared.validation, prepared.report).model_files
    return Subject(
        name=config.name,
        settings=settings_of(config),
        tokenizer=tokenizer,
        model_config=files["config.json"],
        generation_config=files["generation_config.json"],
        train=prepared.train,
        validation=prepared.validation,
        findings=[Finding(**found) for found in prepared.report.findings],
        batches=batches_of(config, tokenizer, prepared.train),
    )


def of_config(config: RunConfig) -> Subject:
    """A config, before it is run; nothing is written.

    What cannot be read (the base, the data) is missing from the subject, and said.
    """
    return _with_rows(config, load_settled(config), None)


def load_settled(config: RunConfig) -> RunConfig:
    """The config as this machine would run it; as it is where the machine refuses."""
    from solotune.tuned import settle

    try:
        return settle(config)[0]
    except SolotuneError:
        return config


def _with_rows(config: RunConfig, settled: RunConfig, adapter: Path | None, rendered_on: Any = None) -> Subject:
    """Settings, tokenizer, rows and the way to a live model, as far as they can be had."""
    plain = Subject(config.name, settings_of(settled))
    try:
        tokenizer = load_tokenizer(config)
    except SolotuneError as error:
        why = dict.fromkeys(("tokenizer", "train", "validation", "live", "model_config"), error.problem)
        return replace(plain, missing=why, conversations=_conversations(config), refusals=of_refusal(error))
    try:
        prepared = examined(config, tokenizer, rendered_on=rendered_on)
        subject = replace(from_prepared(settled, tokenizer, prepared), name=config.name)
    except SolotuneError as error:
        why = dict.fromkeys(("train", "validation", "live"), error.problem)
        files = Facts(config, tokenizer, [], [], DataReport("")).model_files
        configs = {"model_config": files["config.json"], "generation_config": files["generation_config.json"]}
        chats = _conversations(config)
        return replace(
            plain, tokenizer=tokenizer, missing=why, conversations=chats, refusals=of_refusal(error), **configs
        )
    if (why := too_large(subject)) is not None:
        return replace(subject, missing={"live": why})
    return replace(subject, live=live_of(settled, tokenizer, prepared, adapter))


def _conversations(config: RunConfig) -> list[list[dict[str, Any]]]:
    """The rows as chats, where no tokenizer is there to render them; none where they cannot be read."""
    from solotune.dataset.columns import mapped
    from solotune.dataset.formats import convert, recognise
    from solotune.dataset.source import Source

    with contextlib.suppress(SolotuneError, OSError):
        source = Source.of("dataset", config.dataset, config.dataset_split, config_name=config.dataset_config,
                           revision=config.dataset_revision)  # fmt: skip
        found, _ = recognise((mapped(row, config.column_mapping) for row in source), is_strict=True)
        chats = []
        for row in islice(source, 5000):
            with contextlib.suppress(SolotuneError):
                record = convert(mapped(row, config.column_mapping), found)
                if not isinstance(record, str):
                    chats.append(list(record.messages))
        return chats
    return []


# --- the model, and the batches that its training sees


def too_large(subject: Subject) -> str | None:
    """Why the model cannot be loaded here; None where it should fit."""
    needs, free = arithmetic.weight_bytes(subject), _free_bytes()
    if needs is None or 1.2 * needs < free:
        return None
    return f"the base takes about {needs / 2**30:.1f} GiB, and {free / 2**30:.1f} are free on this machine"


def _free_bytes() -> int:
    import torch

    return int(torch.cuda.mem_get_info(0)[0]) if torch.cuda.is_available() else ram()[1]


def live_of(config: RunConfig, tokenizer: Any, prepared: Prepared, adapter: Path | None) -> Callable[[], Live]:
    """Loads the base with its adapters, fresh or those of a folder, once."""

    @cache
    def load() -> Live:
        from solotune import checkpoint
        from solotune.tuned import settle

        settled, machine, _ = settle(config.replaced("diagnosis", torch_compile=False))
        tensors = checkpoint.read_adapter(adapter) if adapter is not None else None
        return own_live(settled, machine, tokenizer, prepared.train, prepared.validation, tensors)

    return load


# --- a run


def from_run(path: str | Path) -> Subject:
    """A run directory, in whatever state it is.

    Raises:
        InputError: there is no run, or its config is of a version that has other keys.
    """
    run = RunDirectory.open(path)
    config = _recorded(run)
    adapter = _newest_adapter(run)
    subject = _with_rows(config, load_settled(config), adapter, _day(run))
    saved = saved_of(adapter) if adapter is not None else None
    missing = dict(subject.missing)
    if saved is None:
        missing["saved"] = "nothing was saved yet" if adapter is None else f"{adapter}: the adapter cannot be read"
        if adapter is not None:
            missing["adapter"] = missing["saved"]
    environment = _json(run.path / "environment.json")
    refusals = [*subject.refusals, *_other_base(run, config)]
    return replace(
        subject,
        name=run.path.name,
        settings=replace(subject.settings, values={**subject.settings.values, **_summary(run)}),
        findings=subject.findings or _findings(run),
        refusals=refusals,
        trace=trace_of(run),
        saved=saved,
        environment=environment,
        missing=missing,
    )


def _recorded(run: RunDirectory) -> RunConfig:
    path = run.path / "config.yaml"
    try:
        return load_config(path)
    except InputError as error:
        made_by = _json(run.path / "environment.json").get("solotune")
        raise InputError(
            f"{path}: solotune {__version__} cannot read the config of this run",
            seen=error.problem,
            change=f"solotune {made_by} wrote it; use that version"
            if made_by not in (None, __version__)
            else "the file was changed since its run, or another version wrote it; solotune verify tells",
        ) from None


def _day(run: RunDirectory) -> Any:
    from solotune.resume import day_of

    with contextlib.suppress(SolotuneError):
        return day_of(run.path)
    return None


def _newest_adapter(run: RunDirectory) -> Path | None:
    from solotune import checkpoint

    return run.adapter if run.adapter.is_dir() else checkpoint.newest(run.checkpoints)


def _other_base(run: RunDirectory, config: RunConfig) -> list[Signal]:
    """What `solotune chat` would refuse: the base in its folder is not the one that was trained on."""
    from solotune.fingerprint import base_fingerprint, check_base

    recorded = _json(run.path / FINGERPRINTS).get("base")
    try:
        if isinstance(recorded, dict) and set(recorded) >= {"config", "tensors", "content"}:
            check_base(recorded, base_fingerprint(config), config.model_name_or_path)
    except IntegrityError as error:
        return of_refusal(error)
    except SolotuneError:  # it is not here, which is said elsewhere
        pass
    return []


def _summary(run: RunDirectory) -> dict[str, Any]:
    """What the run counted when it began."""
    start = [event for event in run.read_metrics() if isinstance(event, dict) and event.get("event") == "start"]
    keys = ("train_rows", "validation_rows", "trainable_parameters")
    return {key: start[-1][key] for key in keys if start and isinstance(start[-1].get(key), int)}


def _findings(run: RunDirectory) -> list[Finding]:
    """What the data door said when the run began, where the rows are not here any more."""
    found = _json(run.path / "data.json").get("findings")
    names = set(Finding.__dataclass_fields__)
    return [Finding(**one) for one in found or () if isinstance(one, dict) and set(one) == names]


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def saved_of(folder: Path) -> Saved | None:
    """The adapter of a folder, ours or PEFT's; None where there is none that can be read."""
    from solotune import checkpoint

    try:
        tensors = checkpoint.read_adapter(folder)
    except SolotuneError:
        return None
    has_state = (folder / "state.json").is_file()
    optimizer = (folder / "optimizer.safetensors").is_file() if has_state else None
    return Saved(tensors, _json(folder / "adapter_config.json"), optimizer, optimizer)


def trace_of(run: RunDirectory) -> Trace:
    """metrics.jsonl as arrays; its log's errors, and the steps after which it was resumed."""
    events = [event for event in run.read_metrics() if isinstance(event, dict)]
    steps = [event for event in events if event.get("event") == "step" and isinstance(event.get("step"), int)]
    evals = [event for event in events if event.get("event") == "eval" and isinstance(event.get("step"), int)]
    starts = [event.get("step") for event in events if event.get("event") == "start"]
    totals = [event["total_steps"] for event in steps if isinstance(event.get("total_steps"), int)]
    return Trace(
        step_S=np.array([event["step"] for event in steps], np.int64),
        loss_S=column(steps, "loss"),
        learning_rate_S=column(steps, "learning_rate"),
        grad_norm_S=column(steps, "grad_norm"),
        epoch_S=column(steps, "epoch"),
        eval_step_E=np.array([event["step"] for event in evals], np.int64),
        eval_loss_E=column(evals, "loss"),
        total_steps=totals[-1] if totals else None,
        is_finished=any(event.get("event") == "end" for event in events),
        errors=_errors(events),
        seams=tuple(step for step in starts if isinstance(step, int) and step > 0),
    )


def column(entries: list[dict[str, Any]], key: str) -> np.ndarray:
    """float64, NaN where an entry has no number under this key."""
    return np.array([_float(entry.get(key)) for entry in entries], float)


def _float(value: Any) -> float:
    try:
        return math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        return math.nan


def _errors(events: list[dict[str, Any]]) -> tuple[str, ...]:
    """What ended the run, as it is recorded: a device that failed, a step that was not finite."""
    found = []
    for event in events:
        if event.get("event") == "device_failed":
            found.append(f"{event.get('problem')}: {event.get('seen')}")
        if event.get("event") == "non_finite":
            found.append(f"step {event.get('step')}: not finite: {event.get('seen')}")
    return tuple(found)


def expanded(path: str | Path) -> Path:
    """A path with `~` written out."""
    return Path(os.path.expanduser(path))
