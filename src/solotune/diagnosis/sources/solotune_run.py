"""Build `RunFacts` of solotune's own: from prepared rows, a config, or a run directory.

    from_prepared(config, tokenizer, prepared, findings, model_files)     in `solotune train`
    of_config(config)                                                     before a run
    from_run("runs/demo")                                                 finished, crashed, unfinished or resumed

What cannot be read (the base model, the data, a file of the run) is in `missing` with the reason; the rest is judged
without it. Damaged files are read as far as possible: metrics with a torn last line, with NaN, empty or absent.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from solotune.config.run_config import RunConfig
from solotune.config.settings import SourceSettings
from solotune.dataset import Prepared, load_tokenizer, prepare
from solotune.diagnosis.data_checks import check_rows
from solotune.diagnosis.evidence import Signal, of_refusal
from solotune.diagnosis.facts import derived
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.run_facts import LiveModel, RunFacts, Settings
from solotune.diagnosis.sources import ranks, run_files
from solotune.diagnosis.sources.live_model import batches_of, load_live_model
from solotune.errors import IntegrityError, SolotuneError
from solotune.hardware.ram import ram
from solotune.hub.download import is_local_path, offline
from solotune.hub.model_files import ModelFiles, resolve_model
from solotune.run.record import RunRecord
from solotune.run.run_dir import RunDirectory
from solotune.units import gib


def settings_of(config: RunConfig) -> Settings:
    """All keys of a config with their sources, and fixed settings of solotune that have no key."""
    fixed: dict[str, Any] = {
        "tool": "solotune",
        "adapter_dtype": "float32",
        "load_in_4bit": config.base_precision == "nf4",
        "bnb_4bit_compute_dtype": config.bnb_4bit_compute_dtype or ("bfloat16" if config.bf16 else "float32"),
    }
    if config.ranks > 1:
        fixed["world_size"] = config.ranks
    sources = {key: config.source_of(key) for key in RunConfig.model_fields}
    return Settings({**config.model_dump(), **fixed}, sources=sources)


def from_prepared(
    config: RunConfig, tokenizer: Any, prepared: Prepared, findings: list[Finding], model_files: ModelFiles
) -> RunFacts:
    """Facts on a run that is about to start: its settings and its rows.

    Args:
        findings: of `check_rows` for these rows.
    """
    return RunFacts(
        name=config.name,
        settings=settings_of(config),
        tokenizer=tokenizer,
        model_config=model_files.json_or_empty("config.json"),
        generation_config=model_files.json_or_empty("generation_config.json"),
        train=prepared.train,
        validation=prepared.validation,
        findings=findings,
        batches=batches_of(config.batches, tokenizer, prepared.train),
    )


def of_config(
    config: RunConfig, model_files: ModelFiles | None = None, adapter: Path | None = None, rendered_on: Any = None
) -> RunFacts:
    """Facts on a config before its run; writes nothing.

    Settings are those that this machine would run, or as written if it refuses the config. What cannot be read (the
    base, the data) is in `missing` with the reason.

    Args:
        model_files: of the base; None: they are looked for.
        adapter: folder of a trained adapter for the live model; None: fresh adapters.
        rendered_on: the day of the run, for templates that print a date; None: today.
    """
    from solotune.training.trained_run import resolve_for_machine

    resolved = config
    with contextlib.suppress(SolotuneError):
        resolved = resolve_for_machine(config)[0]
    plain = RunFacts(config.name, settings_of(resolved))
    try:
        model_files = model_files or resolve_model(config)
        tokenizer = load_tokenizer(config, model_files)
    except SolotuneError as error:
        why = dict.fromkeys(("tokenizer", "train", "validation", "live", "model_config"), error.problem)
        return replace(plain, missing=why, conversations=_conversations(config.source), refusals=of_refusal(error))
    try:
        prepared = prepare(config, tokenizer, rendered_on=rendered_on)
        findings = check_rows(config, tokenizer, prepared, model_files)
        run_facts = replace(from_prepared(resolved, tokenizer, prepared, findings, model_files), name=config.name)
    except SolotuneError as error:
        why = dict.fromkeys(("train", "validation", "live"), error.problem)
        return replace(
            plain,
            tokenizer=tokenizer,
            missing=why,
            conversations=_conversations(config.source),
            refusals=of_refusal(error),
            model_config=model_files.json_or_empty("config.json"),
            generation_config=model_files.json_or_empty("generation_config.json"),
        )
    if (why := too_large(run_facts)) is not None:
        return replace(run_facts, missing={"live": why})
    return replace(run_facts, live=live_of(resolved, tokenizer, prepared, adapter, model_files))


def _conversations(source: SourceSettings) -> list[list[dict[str, Any]]]:
    """The rows as chats, if there is no tokenizer to render them; none if they cannot be read."""
    from solotune.dataset.chat.formats import convert, recognise
    from solotune.dataset.readers.column_mapping import mapped
    from solotune.dataset.readers.source import Source

    with contextlib.suppress(SolotuneError, OSError):
        rows = Source.of("dataset", source.dataset, source.split, config_name=source.config, revision=source.revision)
        found, _ = recognise((mapped(row, source.column_mapping) for row in rows), is_strict=True)
        chats = []
        for row in islice(rows, 5000):
            with contextlib.suppress(SolotuneError):
                record = convert(mapped(row, source.column_mapping), found)
                if not isinstance(record, str):
                    chats.append(list(record.messages))
        return chats
    return []


# --- the model


def too_large(run_facts: RunFacts) -> str | None:
    """Why the model does not fit on this machine; None if it should fit."""
    needs, free = derived.weight_bytes(run_facts), _free_bytes()
    if needs is None or 1.2 * needs < free:
        return None
    return f"the base needs about {gib(needs)} GiB, and {gib(free)} GiB are free on this machine"


def _free_bytes() -> int:
    import torch

    return int(torch.cuda.mem_get_info(0)[0]) if torch.cuda.is_available() else ram().free


def live_of(
    config: RunConfig,
    tokenizer: Any,
    prepared: Prepared,
    adapter: Path | None,
    model_files: ModelFiles | None = None,
) -> Callable[[], LiveModel]:
    """A function that loads the base with its adapters (fresh, or of a folder), once."""

    @cache
    def load() -> LiveModel:
        from solotune.model.adapter import adapter_tensors
        from solotune.training.trained_run import resolve_for_machine

        for_this_machine = {"base_offload": "auto", "base_sharding": False}
        again = config.replaced("diagnosis", torch_compile=False, **for_this_machine)
        resolved, machine, _ = resolve_for_machine(again)
        tensors = adapter_tensors(adapter) if adapter is not None else None
        return load_live_model(resolved, machine, tokenizer, prepared.train, prepared.validation, tensors, model_files)

    return load


# --- a run


def from_run(path: str | Path) -> RunFacts:
    """Facts on a run directory in any state.

    Raises:
        InputError: there is no run, or its config is of a version with other keys.
    """
    run = RunDirectory.open(path)
    config = run_files.recorded(run)
    adapter = run_files.newest_adapter(run)
    model_files = None
    with offline():  # somebody may have sent the run: its names are not looked up on the hub
        with contextlib.suppress(SolotuneError):  # `of_config` says why it is missing
            model_files = resolve_model(config)
        run_facts = of_config(config, model_files, adapter, run_files.day(run))
    if run_facts.live is not None:
        run_facts = replace(run_facts, live=without_network(run_facts.live))
    saved = run_files.saved_of(adapter) if adapter is not None else None
    missing = {part: _with_way_out(why, run.path, config) for part, why in run_facts.missing.items()}
    if saved is None:
        missing["saved"] = "nothing was saved yet" if adapter is None else f"{adapter}: the adapter cannot be read"
        if adapter is not None:
            missing["adapter"] = missing["saved"]
    record = RunRecord.read(run.path)
    refusals = [*run_facts.refusals, *_other_base(record, model_files)]
    return replace(
        run_facts,
        name=run.path.name,
        settings=replace(run_facts.settings, values={**run_facts.settings.values, **run_files.summary(record)}),
        findings=run_facts.findings or run_files.findings(record) or run_facts.findings,
        refusals=refusals,
        trace=run_files.trace_of(record),
        saved=saved,
        ranks=ranks.of_record(record),
        environment=record.environment or {},
        missing=missing,
    )


def without_network(load: Callable[[], LiveModel]) -> Callable[[], LiveModel]:
    """The same function, which finds a model only on this machine."""

    def loaded() -> LiveModel:
        with offline():
            return load()

    return loaded


def _with_way_out(why: str, run: Path, config: RunConfig) -> str:
    """The reason with the command that asks the hub, if something of the hub is not on this machine."""
    names = [config.dataset] if isinstance(config.dataset, str) else config.dataset
    for name in (config.model_name_or_path, *names):
        if name in why and not is_local_path(name):
            return f"{why} (diagnose asks the hub for nothing; solotune data {run}/config.yaml downloads it)"
    return why


def _other_base(record: RunRecord, model_files: ModelFiles | None) -> list[Signal]:
    """The signal that `solotune chat` would raise: the base in its folder is not the one of the training."""
    from solotune.model.base_fingerprint import base_fingerprint, check_base

    if model_files is None:  # not here, which `missing` says
        return []
    recorded = (record.fingerprints or {}).get("base")
    try:
        if isinstance(recorded, dict) and set(recorded) >= {"config", "tensors", "content"}:
            check_base(recorded, base_fingerprint(model_files), model_files.name)
    except IntegrityError as error:
        return of_refusal(error)
    except SolotuneError:  # its weights are missing or damaged, which is reported elsewhere
        pass
    return []


def expanded(path: str | Path) -> Path:
    """A path with `~` written out."""
    return Path(os.path.expanduser(path))
