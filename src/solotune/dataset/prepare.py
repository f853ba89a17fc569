"""The one door from a config to the tokens that are trained on.

    read -> name columns -> normalise -> remove copies, group, split -> render by the template -> mask -> max_length

Every row that was read is either kept or dropped for a reason that is counted: rows read = kept + dropped. Training,
evaluation, the data report and chat all come through here, so they cannot render or mask differently.

    prepared = prepare(config, tokenizer, progress=lambda done, total, what: ...)
    prepared.train, prepared.validation      lists of Example
    prepared.report.to_json()                data.json
    prepared.manifest                        split.json: the hash of each row and the side it is on
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from typing import TYPE_CHECKING, Any

from solotune.config import RunConfig
from solotune.dataset import cache
from solotune.dataset.chat import ChatTemplate
from solotune.dataset.columns import check_mapping, mapped
from solotune.dataset.encode import Encoder
from solotune.dataset.example import Example, Prepared
from solotune.dataset.formats import Format, Record, check_shape, convert, recognise
from solotune.dataset.kinship import Kin, kinship, with_key
from solotune.dataset.render import Renderer
from solotune.dataset.report import ANSWER_PAST_MAX_LENGTH, EXACT_DUPLICATE, NOTHING_TO_LEARN, DataReport
from solotune.dataset.row import Row, RowError
from solotune.dataset.source import Source
from solotune.dataset.split import check_leaks, hold_out, without_copies
from solotune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ANSWER_PAST_MAX_LENGTH", "NOTHING_TO_LEARN", "DataReport", "Example", "Prepared", "Progress"]

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is being done); total is 0 where it is not known."""

NUM_SHOWN = 3
MANIFEST_HASH = "first 32 hex digits of sha256 over roles, texts (NFKC, case and blanks folded), calls and tools"


def prepare(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: Progress | None = None,
    rendered_on: date | None = None,
    use_cache: bool = True,
) -> Prepared:
    """Reads, splits, renders and masks the rows of a config; or takes the result of an earlier time from the cache.

    Args:
        rendered_on: the date that templates write which write one; today's if not given.

    Raises:
        InputError: a file, a row, the template or the split is not usable; names the place.
        CheckError: `eval_dataset` contains rows of `dataset`.
    """
    progress, rendered_on = progress or _silent, rendered_on or date.today()
    progress(0, 0, "reading rows")
    dataset, own = _sources(config)
    key = (
        cache.key_of(config, tokenizer, [source.digest() for source in (dataset, own) if source], rendered_on)
        if use_cache
        else None
    )
    if key is not None and (found := cache.load(key)) is not None:
        return found
    started = time.monotonic()
    prepared = _prepared(config, tokenizer, dataset, own, progress, rendered_on)
    is_unchanged = all(source.is_unchanged() for source in (dataset, own) if source)
    if key is not None and is_unchanged and time.monotonic() - started >= cache.MIN_SECONDS:
        cache.store(key, prepared)
    return prepared


def _silent(done: int, total: int, what: str) -> None:
    pass


def _prepared(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Source,
    own: Source | None,
    progress: Progress,
    rendered_on: date,
) -> Prepared:
    report = DataReport(format="", rendered_on=rendered_on.isoformat())
    train, validation, sides = _both_sides(config, report, dataset, own, progress)
    renderer = Renderer(config, tokenizer, report)
    total = len(train) + len(validation)
    examples = []
    for name, records, done in (("training", train, 0), ("validation", validation, len(train))):
        examples.append(list(renderer.examples(records, partial(_onward, progress, done, total, "tokenising rows"))))
        if records and not examples[-1]:
            raise _nothing_left(name, len(records), config, report)
    report.num_train, report.num_validation = map(len, examples)
    report.train_sha256, report.validation_sha256 = map(_sha256, examples)
    report.examples = [
        {"where": one.where, "tokens": len(one.input_ids), "pieces": one.pieces(tokenizer)}
        for one in examples[0][:NUM_SHOWN]
    ]
    manifest = {
        "version": 1,
        "hash": MANIFEST_HASH,
        "seed": config.seed,
        "validation_size": config.validation_size,
        "split_by": config.split_by,
        "rows": sides,
    }
    return Prepared(examples[0], examples[1], report, manifest)


def _onward(progress: Progress, before: int, total: int, what: str, done: int) -> None:
    progress(before + done, total, what)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    *,
    rendered_on: date | None = None,
) -> list[int]:
    """The ids after which the model writes the next assistant turn; the same code that renders training rows."""
    rendered = ChatTemplate(tokenizer, rendered_on).render_prompt(messages, tools)
    return Encoder(tokenizer).encode([rendered], ["the prompt"])[0].ids.tolist()


# --- read and split


def _sources(config: RunConfig) -> tuple[Source, Source | None]:
    dataset = Source.of(
        "dataset",
        config.dataset,
        config.dataset_split,
        config_name=config.dataset_config,
        revision=config.dataset_revision,
    )
    if config.eval_dataset is None:
        return dataset, None
    return dataset, Source.of("eval_dataset", config.eval_dataset, config.eval_dataset_split)


def _both_sides(
    config: RunConfig, report: DataReport, dataset: Source, own: Source | None, progress: Progress
) -> tuple[list[Record], list[Record], dict[str, str]]:
    """Rows to train on, rows to validate on, and the side of each row by its hash."""
    records, report.format = _records(config, report, dataset)
    on_split = partial(_onward, progress, 0, len(records), "looking for copies")
    size = config.validation_size if own is None else 0
    split = hold_out(records, size, config.seed, on_split)
    report.num_groups = split.num_groups
    report.num_near_duplicates = split.num_near_duplicates
    report.num_exact_duplicates = split.num_exact_duplicates
    train, validation, sides = split.train, split.validation, split.sides
    if own is not None:
        records, _ = _records(config, report, own)
        first = without_copies(records)
        validation = list(first.values())
        report.num_exact_duplicates += len(records) - len(validation)
        check_leaks(train, validation, key=own.key)
        sides = {**sides, **dict.fromkeys(first, "validation")}
    if report.num_exact_duplicates:
        report.dropped[EXACT_DUPLICATE] += report.num_exact_duplicates
    return train, validation, sides


def _records(config: RunConfig, report: DataReport, source: Source) -> tuple[list[Record], str]:
    """The normalised rows of `dataset` or `eval_dataset`, and their format."""
    rows = source.rows()
    report.num_read += len(rows)
    mapping, is_strict = config.column_mapping, config.on_bad_row == "error"
    check_mapping(rows, mapping, is_needed=source.key == "dataset")
    named = [mapped(row, mapping) for row in rows]
    found = recognise(named, is_strict=is_strict)
    kin = kinship(named, is_sharegpt=found.name == "sharegpt")
    records = []
    for row, own_names, joined in zip(named, rows, kin, strict=True):
        try:
            if config.split_by is not None:
                joined = with_key(own_names, joined, config.split_by)
            record = _record(row, found, joined)
        except RowError as error:
            if is_strict:
                raise
            record = error.reason
        if isinstance(record, str):
            report.dropped[record] += 1
        else:
            records.append(record)
    if not records:
        raise InputError(f"{source.key}: no row is left", seen=report.reasons(), change="look at the rows of the file")
    return records, found.name


def _record(row: Row, found: Format, kin: Kin) -> Record | str:
    check_shape(row, found, "as most rows")
    record = convert(row, found)
    return record if isinstance(record, str) else replace(record, group=kin.group, links=kin.links)


def _nothing_left(name: str, num_rows: int, config: RunConfig, report: DataReport) -> InputError:
    return InputError(
        f"no {name} row is left of {num_rows}",
        seen=report.reasons(),
        allowed=f"at least one row whose answer begins within max_length: {config.max_length} tokens",
        change="raise max_length, or shorten the prompts",
    )


def _sha256(examples: Sequence[Example]) -> str:
    """Over ids, mask and weights of all rows: equal exactly if the same tokens are learned alike in the same order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(example.input_ids.astype("<i4").tobytes())
        digest.update(example.supervised.astype("u1").tobytes())
        if example.weights is not None:
            digest.update(b"weights" + example.weights.astype("<f4").tobytes())
    return digest.hexdigest()
