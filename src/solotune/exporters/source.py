"""What is exported: a run of solotune, or an adapter folder of PEFT, TRL, Unsloth or Axolotl with its base.

    source = open_source("runs/demo")                                  the run's adapter, base, tokenizer, held-out rows
    source = open_source("their_adapter", base="org/name", dataset="chats.jsonl")
    source.load()                                                      the model as it was trained, for comparisons

The base of a run is checked by its fingerprint. A folder of another trainer has none, so its base is what the user
names: a name or a path in that folder is shown, but not opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from solotune import dataset
from solotune.config.run_config import Choice, RunConfig
from solotune.config.settings import FOREIGN
from solotune.dataset import Example
from solotune.dataset.chat.tokenizer import has_tokenizer, saved_files
from solotune.errors import InputError, SolotuneError
from solotune.evaluation import generation
from solotune.hub.hf_config import architecture_of
from solotune.hub.model_files import ModelFiles, resolve_model
from solotune.model.adapter import CONFIG, Adapter
from solotune.model.loading import Progress, TrainableModel
from solotune.run.run_dir import MARKS, RunDirectory, located
from solotune.training.trained_run import TunedRun, load_base, resolve_for_machine

MAX_ROWS, MAX_TOKENS = 32, 512  # rows that an export is measured on, and tokens of each
NO_ROWS = "no-rows"  # stands for `dataset`, which a config must have


@dataclass
class ExportSource:
    """An adapter with all that belongs to it."""

    adapter: Adapter
    adapter_folder: Path
    base: ModelFiles
    """With its weights."""
    tokenizer: Any
    prompt_format: str
    """How the model was trained, and is asked: `chat` (through its chat template) or `text`."""
    system_prompt: str | None
    """The one that all training rows have; None if they differ, have none, or are not known."""
    answer_ends: list[int]
    """Ids of the last tokens of the training rows; `stop_ids` are those that end an answer."""
    config: RunConfig
    """As `load` needs it on this machine. Of an adapter that others trained: what is known of its settings."""
    run: RunDirectory | None
    rows: Sequence[Example]
    """Held-out rows, or rows of --dataset, of at most MAX_TOKENS tokens; may be empty."""
    choices: list[Choice] = field(default_factory=list)
    tuned_run: TunedRun | None = field(default=None, repr=False)
    data: Sequence[Sequence[Example]] = field(default=(), repr=False)
    """All rows of the training, and those held out, or of --dataset; empty if they are not here any more."""

    @cached_property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: those of tokenizer and base, and special tokens that end the training rows."""
        architecture = self.base.config
        ids = self.base.generation_config.get("eos_token_id", architecture.get("eos_token_id"))
        return generation.stop_ids_of(ids, self.tokenizer, self.answer_ends)

    @property
    def vocab_size(self) -> int:
        """Rows of the base's embedding."""
        return _text_config(self.base).vocab_size

    def tokenizer_files(self) -> list[tuple[str, bytes]]:
        """(name, content) of the tokenizer's files; without the base's chat template if the training used none.

        Servers and libraries would else ask the model in a form that it was not trained on.
        """
        files = list(saved_files(self.tokenizer))
        if self.prompt_format == "chat":
            return files
        return [(name, content) for name, content in files if "chat_template" not in name]

    def load(self, progress: Progress | None = None) -> TrainableModel:
        """Load the model that was trained: the base in the precision of the training, with the adapter.

        Raises:
            SolotuneError: it cannot be loaded, or its memory is full.
        """
        if self.tuned_run is not None:
            return self.tuned_run.load(progress)
        config, machine, _ = resolve_for_machine(self.config)
        model = load_base(config, machine, self.base, progress)
        for name, layer in model.lora_layers.items():  # ranks may differ between layers
            A, B = self.adapter.factors(name)
            layer.lora_A = torch.nn.Parameter(A.to(model.device), requires_grad=False)
            layer.lora_B = torch.nn.Parameter(B.to(model.device), requires_grad=False)
            layer.scaling = self.adapter.scaling(name)
        return model


def open_source(
    target: str | Path,
    *,
    base: str | None = None,
    dataset: str | None = None,
    base_precision: str | None = None,
) -> ExportSource:
    """Open a run or an adapter folder.

    Args:
        target: a run (its folder, its name below runs/, `latest`), or a folder with adapter_config.json.
        base: the base's folder or hub id. Of a run: only if it has moved.
        dataset: rows to measure with, of an adapter that others trained.
        base_precision: of an adapter that others trained: `nf4` if its base was in 4 bits (QLoRA), else `bf16`.

    Raises:
        InputError: nothing to export there, no base, or the adapter is not one of this base.
        IntegrityError: files of the run have changed, or its base is another one.
    """
    folder = located(target)
    if not folder.is_dir():
        RunDirectory.open(target)  # says which runs there are
    if (folder / CONFIG).is_file() and not any((folder / mark).exists() for mark in MARKS):
        source = _open_folder(folder, base, dataset, base_precision)
    else:
        given = {"--dataset": dataset, "--base-precision": base_precision}
        if named := [option for option, value in given.items() if value is not None]:
            raise InputError(
                f"{target}: {named[0]} is only for adapters that others trained",
                seen=f"{named[0]} {given[named[0]]}",
                change=f"leave it out; a run knows its {'held-out rows' if dataset else 'base_precision'}",
            )
        source = _open_run(target, base)
    _check_trained(source)
    _check_vocabulary(source)
    return source


def _open_run(target: str | Path, base: str | None) -> ExportSource:
    run = TunedRun.open(target)
    if base is not None:
        run.config = run.config.replaced("--base", model_name_or_path=base)
        run.base = resolve_model(run.config)
    run.base = run.checked_base()
    folder = run.adapter_folder()
    choices: list[Choice] = []
    if folder != run.directory.adapter:
        choices.append(Choice("adapter", folder.name, "the run has not finished; this is its newest checkpoint"))
    data, because = _prepared(run)
    rows = bounded(data[1]) if data else []
    choices.append(Choice("rows compared", len(rows), because))
    run.config = _for_measuring(run.config)
    return ExportSource(
        Adapter.read(folder),
        folder,
        run.base,
        run.tokenizer,
        run.prompt_format,
        run.shared_system_prompt,
        run.answer_ends,
        run.config,
        run.directory,
        rows,
        choices,
        run,
        data,
    )


def _prepared(run: TunedRun) -> tuple[Sequence[Sequence[Example]], str]:
    """Training rows and held-out rows of a run, and why these are compared; none if the data is not here any more.

    A missing file does not stop an export.
    """
    try:
        found = run.prepare()
    except SolotuneError as error:
        return (), f"the held-out rows cannot be read: {error.problem}"
    count = len(found.validation)
    because = _of_rows(count, "held-out rows") if count else "the run held out no rows"
    return (found.train, found.validation), because


def _of_rows(count: int, kind: str) -> str:
    return f"there are {count:,} {kind}; at most {MAX_ROWS} of {MAX_TOKENS} tokens are compared"


def bounded(rows: Sequence[Example]) -> list[Example]:
    """At most MAX_ROWS rows, evenly spaced, cut to MAX_TOKENS; without those that then have no token to predict."""
    wanted = range(0, len(rows), max(1, len(rows) // MAX_ROWS))
    shorter = (cut(rows[place], MAX_TOKENS) for place in wanted)
    return [row for row in shorter if row.loss_mask[1:].any()][:MAX_ROWS]


def cut(row: Example, length: int) -> Example:
    """The first tokens of a row."""
    weights = None if row.weights is None else row.weights[:length]
    return Example(row.input_ids[:length], row.loss_mask[:length], row.where, row.messages, row.tools, weights)


def _for_measuring(config: RunConfig) -> RunConfig:
    """The config without what only training needs; layers would be compiled again for each candidate."""
    return config.replaced("export", torch_compile=False, packing=False, gradient_checkpointing=False)


# --- an adapter that others trained


def _open_folder(folder: Path, base: str | None, rows_of: str | None, base_precision: str | None) -> ExportSource:
    adapter = Adapter.read(folder)
    named = adapter.config.get("base_model_name_or_path")
    if base is None:
        raise InputError(
            f"{folder}: the base model of this adapter must be given",
            seen=f"{CONFIG} names {str(named)[:100]}" if named else f"{CONFIG} does not name it",
            allowed="the 16-bit model that it was trained on: a folder or a hub id",
            change=f"solotune export {folder} --base {named if named and _is_16_bit(named) else 'MODEL'}",
        )
    precision = base_precision or ("bf16" if _is_16_bit(named) else "nf4")
    because = (
        "--base-precision" if base_precision
        else f"{CONFIG} names a base in 4 bits ({named})" if precision == "nf4"
        else f"{CONFIG} does not say how the base was stored; --base-precision nf4 if this was QLoRA"
    )  # fmt: skip
    config = _config_of(adapter, base, rows_of or NO_ROWS, precision)
    files = resolve_model(config).with_weights()
    positions = getattr(_text_config(files), "max_position_embeddings", None) or MAX_TOKENS  # 0: without positions
    longest = min(MAX_TOKENS, positions)
    config, _, _ = resolve_for_machine(config.replaced("export", max_length=longest))
    choices = [Choice("base_precision", precision, because)]
    own = has_tokenizer(folder)
    place = config.replaced("export", model_name_or_path=str(folder)) if own else config
    tokenizer = dataset.load_tokenizer(place, None if own else files)
    source = ExportSource(
        adapter,
        folder,
        files,
        tokenizer,
        "chat" if tokenizer.chat_template else "text",
        None,
        [],
        config,
        None,
        [],
        choices,
    )
    if rows_of is not None:
        _add_rows(source)
    return source


def _is_16_bit(named: Any) -> bool:
    """Whether a base's name does not say that it is in 4 bits, as Unsloth's do (`llama-3-8b-bnb-4bit`)."""
    return not (isinstance(named, str) and "4bit" in named.lower().replace("-bit", "bit"))


def _config_of(adapter: Adapter, base: str, rows_of: str, precision: str) -> RunConfig:
    values = {
        "model_name_or_path": base,
        "dataset": rows_of,
        "base_precision": precision,
        "lora_r": max(map(adapter.rank, adapter.modules)),
        "lora_alpha": float(adapter.config["lora_alpha"]),
        "use_rslora": bool(adapter.config.get("use_rslora")),
        "lora_target_modules": adapter.modules,
        "lora_dropout": 0.0,
        "validation_size": 0,
    }
    sources = {**dict.fromkeys(values, FOREIGN), "model_name_or_path": "--base", "dataset": "--dataset"}
    return _for_measuring(RunConfig.validated(values, sources, "export"))


def _add_rows(source: ExportSource) -> None:
    """Read the rows of --dataset, and how they are asked."""
    prepared = dataset.prepare(source.config, source.tokenizer)
    source.rows, source.data = bounded(prepared.train), (prepared.train,)
    report = prepared.report
    source.prompt_format, source.answer_ends = report.prompt_format, list(report.answer_ends)
    source.system_prompt = report.shared_system_prompt
    source.choices.append(Choice("rows compared", len(source.rows), _of_rows(len(prepared.train), "rows in --dataset")))


# --- checks


def _check_trained(source: ExportSource) -> None:
    """Raises:
    InputError: the adapter changes nothing.
    """
    if not any(bool(source.adapter.factors(name)[1].any()) for name in source.adapter.modules):
        raise InputError(
            f"{source.adapter_folder}: the adapter is untrained",
            seen="every lora_B is zero, so it changes nothing",
            change="train it; if it was trained, it was saved before the first step, or without its weights",
        )


def _check_vocabulary(source: ExportSource) -> None:
    """Raises:
    InputError: the tokenizer has ids that the base has no embedding for.
    """
    highest = max(source.tokenizer.get_vocab().values(), default=0)
    if highest >= source.vocab_size:
        raise InputError(
            f"{source.adapter_folder}: the tokenizer has tokens that the base has no embedding for",
            seen=f"token ids up to {highest:,}, and an embedding of {source.vocab_size:,} rows",
            allowed="a base with the resized embedding that was trained",
            change="save the resized base (model.resize_token_embeddings, model.save_pretrained) and give it as --base",
        )


def _text_config(base: ModelFiles) -> Any:
    """The language model's config, under transformers' names."""
    return architecture_of(base.folder, base.config).get_text_config()
