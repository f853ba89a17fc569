"""Add base, tokenizer, rows and a live model to the facts on a folder of another trainer.

    run_facts = with_base_and_rows(run_facts, [folder, folder / "checkpoint-50"], missing)

For TRL, rows and batches are rebuilt as TRL makes them (`trl_preprocessing`). The collators of other trainers are not
saved: probes then see the rows as solotune renders and masks them, and `missing` says so.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from solotune.config.run_config import RunConfig
from solotune.config.settings import FOREIGN
from solotune.dataset import DataReport, Example, Prepared, load_tokenizer, prepare
from solotune.diagnosis.data_checks import check_rows
from solotune.diagnosis.evidence import of_refusal
from solotune.diagnosis.facts.base_tokenizer import with_base_tokenizer
from solotune.diagnosis.facts.derived import lora_layers, setting
from solotune.diagnosis.facts.row_facts import chat_template_of
from solotune.diagnosis.run_facts import LiveModel, RunFacts
from solotune.diagnosis.sources import hf_settings, solotune_run, tokenized_rows, trl_preprocessing
from solotune.diagnosis.sources.found_rows import Choice
from solotune.diagnosis.sources.raw_rows import raw_chats, raw_texts
from solotune.diagnosis.sources.run_files import json_of
from solotune.errors import InputError, SolotuneError
from solotune.hub.model_files import ModelFiles, model_here
from solotune.hub.safe_files import check_regular

_UNCUT = 1 << 20
"""Tokens that no row has."""


def first_with(places: Sequence[Path], name: str) -> Path | None:
    """The file of this name in the first of these folders that has it as a regular file, not a link; else None."""
    return next((place / name for place in places if _is_own(place, name)), None)


def why_absent(places: Sequence[Path], name: str) -> str:
    """Why `first_with` finds no file of this name."""
    if any(os.path.lexists(place / name) for place in places):
        return f"{name} is not read: it is a link out of the folder, or not a regular file"
    links = sorted(path.name for path in places[0].glob("checkpoint-*") if path.is_symlink())
    if links:
        return f"no {name}; {links[-1]} is a link, which is not followed: diagnose the folder that it leads to"
    return f"there is no {name}"


def _is_own(place: Path, name: str) -> bool:
    try:
        check_regular(place, place / name)
    except InputError:
        return False
    return True


def with_base_and_rows(
    run_facts: RunFacts, places: list[Path], missing: dict[str, str], named: Mapping[str, Any]
) -> RunFacts:
    """Add what can be loaded; write the reason for everything else into `missing`.

    Args:
        named: `base`, the model that the user gave or that lies beside (None if neither); `model_name_or_path` and
            `dataset`, what the folder's own files name; `used`, how the data was found, if the user did not give it.
    """
    used: Choice = named.get("used") or Choice()
    run_facts = _without_absent_evaluation(run_facts, missing)
    rows = _names(run_facts.settings.get("dataset"))
    run_facts, config, base_files = _with_base(run_facts, places, missing, named)
    if (tokenizer := run_facts.tokenizer) is None or not rows:
        why = _unknown_data(named.get("dataset")) if not rows else missing.get("tokenizer") or missing["model_config"]
        missing |= {part: why for part in ("train", "validation", "live") if part not in missing}
        return run_facts
    if (saved := tokenized_rows.read(used.paths, _batch_size(run_facts)) if used.paths else None) is not None:
        run_facts = replace(run_facts, train=saved.examples, batches=saved.batches)
        prepared = Prepared(run_facts.train, run_facts.validation, DataReport(""))
    elif (made := _as_trl_made_them(run_facts, tokenizer)) is not None:
        run_facts = _with_rows_of_trl(run_facts, made)
        prepared = Prepared(run_facts.train, run_facts.validation, DataReport(""))
    else:
        try:
            prepared = _prepared(run_facts, config, tokenizer)
            findings = check_rows(config, tokenizer, prepared, base_files)
        except SolotuneError as error:
            missing |= dict.fromkeys(("train", "validation"), error.problem)
            missing.setdefault("live", error.problem)
            if used.paths and not used.is_named:  # then it was another file's number of rows
                return run_facts
            return replace(run_facts, refusals=[*run_facts.refusals, *of_refusal(error)])
        missing["batches"] = "the trainer saves no batches; probes see the rows as solotune renders and masks them"
        # The folder's generation_config.json may differ from the base's, which `check_rows` read: where that found
        # nothing, the rules judge the rows with the folder's.
        checked = findings or None
        run_facts = replace(run_facts, train=prepared.train, validation=prepared.validation, findings=checked)
    why = missing.get("live") or solotune_run.too_large(run_facts) or _no_weights(config.model_name_or_path, base_files)
    if why is not None:
        missing["live"] = why
        return run_facts
    if targets := sorted({path.rpartition(".")[2] for path in lora_layers(run_facts)}):
        config = config.replaced("adapter", lora_target_modules=targets)
    load = solotune_run.live_of(config, tokenizer, prepared, _adapter_folder(places), base_files)
    return replace(run_facts, live=_as_saved(solotune_run.without_network(load), run_facts))


def _prepared(run_facts: RunFacts, config: RunConfig, tokenizer: Any) -> Prepared:
    """The rows as solotune renders and masks them, truncated on the side on which the trainer did.

    Raises:
        SolotuneError: they cannot be used.
    """
    limit = config.max_length
    if run_facts.settings.get("truncation_side") != "left":
        return prepare(config, tokenizer)
    whole = prepare(config.replaced(FOREIGN, max_length=_UNCUT), tokenizer)
    train, validation = ([_last(row, limit) for row in rows] for rows in (whole.train, whole.validation))
    return replace(whole, train=train, validation=validation, key=None)  # the cache has the whole rows


def _last(row: Example, size: int) -> Example:
    weights = None if row.weights is None else row.weights[-size:]
    return replace(row, input_ids=row.input_ids[-size:], loss_mask=row.loss_mask[-size:], weights=weights)


def _without_absent_evaluation(run_facts: RunFacts, missing: dict[str, str]) -> RunFacts:
    """The facts without evaluation data that is not here: the training rows are judged all the same."""
    named = run_facts.settings.get("eval_dataset")
    names = _names(named)
    files = [names] if isinstance(names, str) else names or []
    if named is None or (files and all(os.path.exists(os.path.expanduser(name)) for name in files)):
        return run_facts
    missing["validation"] = f"the evaluation data {str(named)[:200]} is not here"
    values = {key: value for key, value in run_facts.settings.values.items() if key != "eval_dataset"}
    return replace(run_facts, settings=replace(run_facts.settings, values=values))


def _with_base(
    run_facts: RunFacts, places: list[Path], missing: dict[str, str], named: Mapping[str, Any]
) -> tuple[RunFacts, RunConfig, ModelFiles | None]:
    """The facts with the base's configs, the tokenizer and the chats; the settings as a config; the base's files."""
    get = run_facts.settings.get
    base, unopened = _base_of(named, places[0])
    rows = _names(get("dataset"))
    chats = raw_chats(rows, str(get("dataset_split") or "train")) if rows else []
    config = hf_settings.as_run_config(run_facts.settings, base or str(places[0]), rows or "unknown.jsonl")
    base_files = model_here(config.model_name_or_path, config.model_revision)
    base_config = base_files.json_or_empty("config.json") if base_files else {}
    generation = json_of(first_with(places, "generation_config.json"))
    if not generation and base_files:
        generation = base_files.json_or_empty("generation_config.json")
    if not base_config:
        missing["model_config"] = unopened or f"the base {base or '(its name is not known)'} is not on this machine"
        missing["live"] = missing["model_config"]
    tokenizer, own = _tokenizers(config, places, base_files, missing)
    found = replace(
        _with_template_of_training(run_facts, tokenizer, places),
        model_config=base_config,
        generation_config=generation,
        conversations=chats,
        texts=raw_texts(rows, str(get("dataset_split") or "train")) if rows and not chats else [],
        tokenizer=tokenizer,
        base_tokenizer=own,
    )
    return with_base_tokenizer(found), config, base_files


def _as_saved(load: Callable[[], LiveModel], run_facts: RunFacts) -> Callable[[], LiveModel]:
    """The live model with the adapter precision, batches and optimizer of that training.

    Its accumulation and evaluation are not known; with solotune's own, the probes would rule out faults of them.
    """
    parts = run_facts.saved.adapter.values() if run_facts.saved else ()
    is_narrow = {tensor.dtype for tensor in parts if tensor.is_floating_point()} == {torch.bfloat16}

    def loaded() -> LiveModel:
        live = load()
        if is_narrow:
            for name, parameter in live.model.named_parameters():
                if "lora_" in name:
                    parameter.data = parameter.data.to(torch.bfloat16)
        return replace(
            live,
            batches=run_facts.batches or live.batches,
            make_optimizer=lambda parameters: _optimizer(run_facts, list(parameters)),
            backward=None,
            evaluate=None,
            is_rebuilt=True,
        )

    return loaded


def _optimizer(run_facts: RunFacts, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """SGD if the training used it, since its learning rates have another scale; else AdamW, for all similar ones."""
    optim, decay = str(run_facts.settings.get("optim") or ""), setting(run_facts, "weight_decay") or 0.0
    if "sgd" in optim.lower():
        return torch.optim.SGD(parameters, weight_decay=decay)
    return torch.optim.AdamW(parameters, eps=setting(run_facts, "adam_epsilon") or 1e-8, weight_decay=decay)


# --- as TRL made them


def _as_trl_made_them(run_facts: RunFacts, tokenizer: Any) -> trl_preprocessing.Made | None:
    """The training rows as TRL makes them; None for another trainer, or if TRL made them in an unknown way."""
    get = run_facts.settings.get
    sft = get("sft")
    return (
        trl_preprocessing.prepare(get("dataset"), str(get("dataset_split") or "train"), tokenizer, sft) if sft else None
    )


def _with_rows_of_trl(run_facts: RunFacts, made: trl_preprocessing.Made) -> RunFacts:
    """Add rows, validation rows, batches, and which tokens TRL trains on."""
    get, sft = run_facts.settings.get, run_facts.settings.get("sft")
    held_out: list[Example] = []
    if get("eval_dataset"):
        evaluated = trl_preprocessing.prepare(get("eval_dataset"), "train", run_facts.tokenizer, sft)
        held_out = evaluated.examples if evaluated else []
    counted = {"rows_in": made.rows_in, "rows_out": len(made.examples)}
    loss_mask = {"assistant_only_loss": made.learns_answers or get("assistant_only_loss") is True}
    return replace(
        run_facts,
        settings=replace(run_facts.settings, values={**run_facts.settings.values, **counted, **loss_mask}),
        train=made.examples,
        validation=held_out,
        conversations=[row.messages for row in made.examples] if all(row.messages for row in made.examples) else [],
        batches=trl_preprocessing.batches_of(made.examples, run_facts.tokenizer, sft, _batch_size(run_facts)),
    )


def _batch_size(run_facts: RunFacts) -> int:
    size = run_facts.settings.get("per_device_train_batch_size")
    return size if isinstance(size, int) and 0 < size <= 4096 else 8


def _base_of(named: Mapping[str, Any], folder: Path) -> tuple[str | None, str | None]:
    """The base that was given or found beside, or that is inside the folder; and why the one that it names is not
    opened."""
    given, found = named.get("base"), named.get("model_name_or_path")
    if given is not None or not isinstance(found, str) or not found or "\0" in found:
        return (None if given is None else str(given)), None
    inside = os.path.realpath(folder / found)
    if Path(inside).is_relative_to(os.path.realpath(folder)) and os.path.isdir(inside):
        return inside, None
    return None, f"the folder names the base {found[:200]}, which is outside and not opened; give it with --base"


def _names(dataset: Any) -> str | list[str] | None:
    """The dataset of a config if it is a name or names."""
    names = dataset if isinstance(dataset, list) else [dataset]
    return dataset if names and all(isinstance(name, str) and 0 < len(name) <= 4096 for name in names) else None


def _unknown_data(named: Any) -> str:
    if named is None:
        return "the training data is not known; give it with --dataset"
    return f"the folder names the training data {str(named)[:200]}, which is not opened or looked up; give --dataset"


def _tokenizers(
    config: RunConfig, places: list[Path], base_files: ModelFiles | None, missing: dict[str, str]
) -> tuple[Any, Any]:
    """The tokenizer of the folder, which was saved with the template of the training, else of the base; None if neither
    can be loaded. And the base's own, if it is known."""
    tokenizer: Any = None
    own = [ModelFiles(str(place), "main", place, True) for place in places if _is_own(place, "tokenizer_config.json")]
    for files in [*own, *([base_files] if base_files else [])]:
        try:
            tokenizer = load_tokenizer(config, files)
            break
        except SolotuneError as error:
            missing["tokenizer"] = error.problem
    if tokenizer is None:
        return None, None
    with contextlib.suppress(SolotuneError):
        return tokenizer, load_tokenizer(config, base_files) if base_files is not None and base_files.is_local else None
    return tokenizer, None


def _with_template_of_training(run_facts: RunFacts, tokenizer: Any, places: list[Path]) -> RunFacts:
    """The facts with both templates, if the folder's is not that of its newest checkpoint, which the trainer saved
    during the run: rows were rendered with the checkpoint's, and the folder's was put there for serving."""
    served, *trained = (chat_template_of(ModelFiles(str(place), "main", place, True)) for place in places)
    if tokenizer is None or not served or not trained or not trained[0] or served == trained[0]:
        return run_facts
    if tokenizer.chat_template == served:
        tokenizer.chat_template = trained[0]
    settings = run_facts.settings
    both = {"chat_template": trained[0], "serving_template": served}
    return replace(run_facts, settings=replace(settings, values={**settings.values, **both}))


def _no_weights(name: str, base_files: ModelFiles | None) -> str | None:
    """Why the weights of the base cannot be loaded without a network; None if they can."""
    names = ("model.safetensors", "model.safetensors.index.json")
    if base_files and (base_files.is_local or any((base_files.folder / name).is_file() for name in names)):
        return None
    return f"the weights of {name} are not on this machine"


def _adapter_folder(places: list[Path]) -> Path | None:
    file = first_with(places, "adapter_model.safetensors")
    return file.parent if file else None
