"""Settings for a model and its data, each with the reason: what `solotune init` writes.

    found = proposed("model", "chats.jsonl")
    found.config, found.because["max_length"], found.notes

It reads the model's config and tokenizer, and the rows (of a large file the first 2,000): their format and columns,
their lengths, their number. Then the plan says what fits on this machine.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from solotune import dataset
from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.config.write import yaml_value
from solotune.dataset.chat.columns import meanings
from solotune.dataset.chat.rendered_content import TOOLS
from solotune.dataset.readers.column_mapping import IGNORE, advised, mapped
from solotune.dataset.readers.source import Source
from solotune.display.progress import Display, SilentDisplay
from solotune.errors import InputError, SolotuneError
from solotune.hardware import machine as environment
from solotune.hub.download import is_local_path
from solotune.hub.model_files import ModelFiles, resolve_model
from solotune.planning.plan_inputs import plan_for
from solotune.units import format_bytes, format_duration

if TYPE_CHECKING:
    from solotune.dataset import Prepared

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")
LARGE_BYTES = 64 << 20
"""Of larger files only the first rows are read."""
FIRST_ROWS = 2000
TOKENS_MULTIPLE = 64
LEAST_LENGTH, MOST_LENGTH = 256, 8192
"""`max_length` is proposed between these; longer rows need a decision about memory."""
SHARE_THAT_FITS = 0.99
STEPS_WANTED = 60
"""Optimizer steps of a run that a small file should at least give, by smaller batches."""
LEAST_BATCH, MOST_BATCH, MICRO_BATCH = 4, 32, 4
LINES_WANTED = 20
VALIDATION_ROWS = 50
"""Held-out rows that give the loss to about 0.07 nats, if per-row losses vary by 0.5."""
MOST_HELD_OUT = 0.2


@dataclass
class Proposal:
    """A config, why each of its keys has its value, and what else is to be known."""

    config: RunConfig
    because: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def set(self, because: str, **values: Any) -> None:
        """Set values, all for the same reason."""
        self.config = self.config.replaced("init", **values)
        self.because.update(dict.fromkeys(values, because))


def proposed(given: dict[str, Any], left_out: Mapping[str, str], display: Display | None = None) -> Proposal:
    """Settings for a model and its data.

    Args:
        given: `model_name_or_path`, `dataset`, and settings that stay as they are.
        left_out: what a translated config says and solotune cannot, with the reason; it is noted.

    Raises:
        InputError: model and data are exchanged or missing, or the rows cannot be used.
    """
    display = display or SilentDisplay()
    _check_order(given["model_name_or_path"], given["dataset"])
    found = Proposal(load_config(given).replaced("command line", **given))
    found.notes += [f"not translated: {key}: {reason}" for key, reason in left_out.items()]
    display.phase("reading the model's files")
    try:
        model_files = resolve_model(found.config)
        tokenizer = dataset.load_tokenizer(found.config, model_files)
    except SolotuneError as error:
        if is_local_path(found.config.model_name_or_path):
            raise
        problem = error.problem.partition(": ")[2] or error.problem
        found.notes.append(f"settings are not fitted to model and data, because the model could not be read: {problem}")
        display.note(found.notes[-1] + (f" ({error.seen})" if error.seen else ""))
        source = found.config.source
        Source.of("dataset", source.dataset, source.split)  # a file that does not exist is refused all the same
        return found
    display.phase("reading data")
    is_sample = _is_large(found.config.dataset)
    prepared = _read(found, tokenizer, is_sample, display, given)
    display.phase("checking rows")
    _refuse_faults(found, tokenizer, prepared, model_files)
    _fit_to_rows(found, prepared, model_files, is_sample, given)
    display.phase("planning")
    _fit_to_machine(found, prepared, model_files, given)
    for note in found.notes:
        display.note(note)
    return found


def _check_order(model: str, data: Any) -> None:
    """Refuse exchanged arguments."""
    name = data if isinstance(data, str) else data[0]
    names_data = model.lower().endswith(DATA_SUFFIXES) or os.path.isfile(os.path.expanduser(model))
    is_model = os.path.isfile(os.path.join(os.path.expanduser(name), "config.json"))
    allowed = "a model folder or hub id first, then a data file or hub id"
    change = f"solotune init {name} {model}"
    if names_data:
        raise InputError(f"{model} is a data file, not a model", allowed=allowed, change=change)
    if is_model:
        raise InputError(f"{name} is a model folder, not data", allowed=allowed, change=change)


def _is_large(source: str | list[str]) -> bool:
    files = [Path(os.path.expanduser(one)) for one in ([source] if isinstance(source, str) else source)]
    return sum(file.stat().st_size for file in files if file.is_file()) > LARGE_BYTES


def _read(found: Proposal, tokenizer: Any, is_sample: bool, display: Display, given: dict[str, Any]) -> Prepared:
    """The rows, with the column mapping and the choice about bad rows that they need.

    Raises:
        InputError: they cannot be used.
    """
    split, refused = found.config.dataset_split, None
    while True:
        config = found.config.replaced("init", max_length=MOST_LENGTH, **_first_rows(split) if is_sample else {})
        try:
            prepared = dataset.prepare(config, tokenizer, progress=display.progress)
        except InputError as error:
            _answer(found, error, given)
            refused = error
            continue
        report = prepared.report
        if found.config.on_bad_row == "drop" and "on_bad_row" not in given:
            num_bad = report.num_read - report.num_kept - report.num_exact_duplicates
            if 2 * num_bad > report.num_read:
                raise InputError(
                    f"dataset: most rows cannot be used ({num_bad:,} of {report.num_read:,})",
                    seen=report.reasons(),
                    change=_without_dropping(refused) if refused else None,
                )
            reason = f"{num_bad:,} of {report.num_read:,} rows cannot be used"
            found.because["on_bad_row"] = f"{reason}; solotune data shows why"
            display.note(f"{reason}, and are left out (on_bad_row: drop): {report.reasons()}")
        return prepared


def _first_rows(split: str) -> dict[str, Any]:
    return {} if "[" in split else {"dataset_split": f"{split}[:{FIRST_ROWS}]"}


def _answer(found: Proposal, error: InputError, given: dict[str, Any]) -> None:
    """Do what an error about the rows advises, if that needs no decision of the user; else raise it."""
    for advice in error.advice:
        is_new = all(key not in given and found.config.source_of(key) == "default" for key in advice.settings)
        if is_new and not advice.is_choice:
            found.set("the columns of the file" if "column_mapping" in advice.settings else "", **advice.settings)
            return
    if error.advice and "column_mapping" in (settings := error.advice[0].settings):
        error.change = f"{error.change}; as a command: {_command(found.config, settings)}"
    raise error


def _without_dropping(error: InputError) -> str | None:
    """What an error about rows says to change, but for dropping them."""
    change = error.change
    for advice in error.advice:
        if change is not None and "on_bad_row" in advice.settings:
            change = change.removesuffix(advice.text).removesuffix("; or ") or None
    return change


def _refuse_faults(found: Proposal, tokenizer: Any, prepared: Prepared, model_files: ModelFiles) -> None:
    """Refuse rows at which `data` and `train` would stop: a config that cannot run is of no use.

    What to leave out is for the user to decide, since it changes what is learned.
    """
    from solotune.diagnosis.certain_faults import allowed_codes
    from solotune.diagnosis.data_checks import check_rows

    config = found.config.replaced("init", max_length=MOST_LENGTH)
    allowed = allowed_codes(config)
    for finding in check_rows(config, tokenizer, prepared, model_files):
        if finding.severity == "error" and finding.code not in allowed:
            change = finding.fix
            if finding.evidence.get("kind") == TOOLS and (leaving_out := _without_tools(config)):
                change = f"use a model whose chat template renders tools; or {change}; or, to train on the rows that "
                change += f"call no tool, without their tools: {_command(config, leaving_out)}"
            raise InputError(finding.message, change=change, fault=finding.code)


def _without_tools(config: RunConfig) -> dict[str, Any]:
    """Settings that leave out the column of the tools and the rows that call them; empty if there is no such column."""
    source = config.source
    rows = Source.of("dataset", source.dataset, source.split, config_name=source.config, revision=source.revision)
    row = mapped(next(iter(rows)), config.column_mapping)
    columns = meanings(row.values).get("tools", ())
    return {**advised(row, dict.fromkeys(columns, IGNORE)).settings, "on_bad_row": "drop"} if columns else {}


def _command(config: RunConfig, settings: Mapping[str, Any]) -> str:
    """`solotune init` with more settings, to paste into a shell."""
    keys = [f"{key}={yaml_value(value)}" for key, value in settings.items()]
    return shlex.join(["solotune", "init", config.model_name_or_path, *_names(config.dataset), *keys])


def _names(dataset: str | list[str]) -> list[str]:
    return [dataset] if isinstance(dataset, str) else dataset


def _fit_to_rows(
    found: Proposal, prepared: Prepared, model_files: ModelFiles, is_sample: bool, given: dict[str, Any]
) -> None:
    report, lengths = prepared.report, np.asarray(prepared.report.labels.row_tokens)
    rows = f"{'the first ' if is_sample else ''}{report.num_kept:,} rows"
    median = f"{int(np.median(lengths)):,} tokens in the median"
    found.notes.append(f"{rows} ({report.format}): {median}, {lengths.max():,} at most")
    if "max_length" not in given:
        most = min(MOST_LENGTH, _positions(model_files) or MOST_LENGTH)
        wanted = lengths.max() if lengths.max() <= most else np.quantile(lengths, SHARE_THAT_FITS)
        length = int(min(max(LEAST_LENGTH, math.ceil(wanted / TOKENS_MULTIPLE) * TOKENS_MULTIPLE), most))
        share = float((lengths <= length).mean())
        fits = f"the longest row has {lengths.max():,} tokens"
        found.set(fits if share == 1 else f"{share:.1%} of the rows fit; {fits}", max_length=length)
    if not is_sample:
        _fit_to_number(found, report.num_kept, given)


def _fit_to_number(found: Proposal, num_rows: int, given: dict[str, Any]) -> None:
    """Held-out rows, batch and log lines from the number of rows."""
    is_free = not {"validation_size", "eval_dataset"} & given.keys()
    if is_free and num_rows * found.config.validation_size < VALIDATION_ROWS:
        held_out = max(1, min(VALIDATION_ROWS, round(MOST_HELD_OUT * num_rows)))
        found.set(f"of {num_rows:,} rows; fewer make the held-out loss uncertain", validation_size=held_out)
        num_rows -= held_out
    epochs = found.config.num_train_epochs
    batch_keys = {"per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"}
    if not batch_keys & given.keys():
        wanted = 2 ** math.floor(math.log2(max(1.0, num_rows * epochs / STEPS_WANTED)))
        batch = min(MOST_BATCH, max(LEAST_BATCH, wanted))
        accumulation = max(1, batch // MICRO_BATCH)
        steps = math.ceil(num_rows / batch) * epochs
        reason = f"{MICRO_BATCH} x {accumulation} = {batch} rows a step: {steps:,.0f} steps in {epochs:g} epochs"
        found.set(reason, per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=accumulation)
        found.because["per_device_train_batch_size"] = "rows of a forward pass"
        if "logging_steps" not in given:
            every = max(1, min(25, int(steps // LINES_WANTED)))
            found.set(f"about {steps / every:.0f} lines in {steps:,.0f} steps", logging_steps=every)


def _fit_to_machine(found: Proposal, prepared: Prepared, model_files: ModelFiles, given: dict[str, Any]) -> None:
    """Change what does not fit, and note the plan."""
    machine = environment.probe()
    try:
        resolved, _ = environment.resolve_for_machine(found.config, machine)
        plan = plan_for(resolved, machine, prepared, model_files=model_files)
    except SolotuneError as error:
        found.notes.append(f"no plan for this machine: {error.problem}")
        return
    if not plan.fits and plan.changed is not None and not given.keys() & {key for key, _ in plan.changes}:
        for key, value in plan.changes:
            found.set(f"so that it fits on {plan.card.name}", **{key: value})
        plan = plan.changed
    used = plan.option.footprint.card_bytes
    seconds = plan.to_json()["seconds"]["total"]
    what = "fits" if plan.fits else "does not fit"
    found.notes.append(
        f"{what} on {plan.card.name}: {format_bytes(used)} of {format_bytes(plan.budget.bytes)}, "
        f"about {format_duration(seconds)} (solotune plan)"
    )


def _positions(model_files: ModelFiles) -> int | None:
    found = model_files.config.get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else None
