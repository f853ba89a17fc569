"""Prepare a dataset: from a config to the tokens that are trained on.

    read -> rename columns -> normalise -> remove duplicates, group, split -> render by the template -> loss mask ->
    max_length

Every row is either kept or dropped for a reason that is counted: rows read = kept + dropped. Training, evaluation, the
data report and chat all use this module, so they render and mask in the same way.

    prepared = prepare(config, tokenizer, progress=lambda done, total, what: ...)
    prepared.train, prepared.validation      sequences of Example
    prepared.report.to_json()                data.json
    prepared.manifest                        split.json: the hash of each row and the side it is on

Memory
------
The rows may be many times larger than the memory. They are read one at a time and kept in a `Store` on disk before and
after rendering; only numbers are kept for all rows at once, under 250 bytes per row. In addition a constant: 0.1 GiB of
stores and memos, and what the tokenizer needs for a batch of rows or for one very long row, some hundred bytes per
token. `bench/data_memory.py` measures it.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from solotune.config.run_config import RunConfig
from solotune.config.settings import BatchSettings, SourceSettings, SplitSettings
from solotune.dataset import cache
from solotune.dataset import packing as pack
from solotune.dataset.chat.answer_spans import ChatTemplate, Rendered
from solotune.dataset.chat.encode import Encoder
from solotune.dataset.chat.formats import check_shape, convert
from solotune.dataset.chat.unused_keys import UnusedKeys
from solotune.dataset.data_report import (
    ANSWER_PAST_MAX_LENGTH,
    EXACT_DUPLICATE,
    LONGER_THAN_MAX_LENGTH,
    NOTHING_TO_LEARN,
    DataReport,
)
from solotune.dataset.example import Example, Examples, Prepared, lengths_of
from solotune.dataset.file_formats import FileFormats
from solotune.dataset.readers.bad_rows import BadRows
from solotune.dataset.readers.column_mapping import check_mapping, mapped
from solotune.dataset.readers.row import RowError
from solotune.dataset.readers.source import Source
from solotune.dataset.records import Records, packed, row_hash
from solotune.dataset.render import Renderer
from solotune.dataset.row_store import Store
from solotune.dataset.split.groups import Kinship
from solotune.dataset.split.holdout import check_leaks, hold_out, is_copy, with_groups, without_copies
from solotune.dataset.split.split_manifest import Manifest
from solotune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ANSWER_PAST_MAX_LENGTH", "NOTHING_TO_LEARN", "DataReport", "Example", "Prepared", "Progress"]

Progress = Callable[[int, int, str], None]
"""Called with (done, total, current step); total is 0 if it is not known."""

NUM_SHOWN = 3


def prepare(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: Progress | None = None,
    rendered_on: date | None = None,
    use_cache: bool = True,
) -> Prepared:
    """Read, split, render and mask the rows of a config, or load the result from the cache.

    Args:
        rendered_on: the date that the template sees as today; default: today.

    Raises:
        InputError: a file, a row, the template or the split cannot be used; the message names the place.
        CheckError: `eval_dataset` contains rows of `dataset`, or rows close to them.
    """
    progress, rendered_on = progress or _silent, rendered_on or date.today()
    progress(0, 0, "reading rows")
    dataset, own = _sources(config.source)
    key = (
        cache.key_of(config, tokenizer, [source.digest() for source in (dataset, own) if source], rendered_on)
        if use_cache
        else None
    )
    if key is not None and (found := cache.load(key)) is not None:
        return _with_packing(replace(found, key=key), config.batches)
    started = time.monotonic()
    prepared = _prepared(config, tokenizer, dataset, own, progress, rendered_on)
    is_unchanged = all(source.is_unchanged() for source in (dataset, own) if source)
    if key is not None and is_unchanged and time.monotonic() - started >= cache.MIN_SECONDS:
        cache.store(key, prepared)
        prepared = replace(prepared, key=key)
    return _with_packing(prepared, config.batches)


def _with_packing(prepared: Prepared, batches: BatchSettings) -> Prepared:
    if not batches.packing:
        return prepared
    packing = pack.account(lengths_of(prepared.train), batches.max_length)
    return replace(prepared, report=replace(prepared.report, packing=packing))


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
    train, validation, manifest = _both_sides(config.source, config.split, report, dataset, own, progress)
    renderer = Renderer(config.rendering, tokenizer, report)
    total = len(train) + len(validation)
    examples = []
    sides = {"training": train, "validation": validation}
    for records, done in zip(sides.values(), (0, len(train)), strict=True):
        examples.append(Examples())
        for example in renderer.examples(records, partial(_onward, progress, done, total, "tokenising rows")):
            examples[-1].append(example)
            if records is train:
                report.count_training_row(example.messages, example.last_loss_token)
    renderer.check()
    for (name, records), kept in zip(sides.items(), examples, strict=True):
        if records and not kept:
            raise _nothing_left(name, len(records), config.max_length, report)
    report.num_train, report.num_validation = map(len, examples)
    report.train_sha256, report.validation_sha256 = map(Examples.sha256, examples)
    report.examples = [
        {"where": one.where, "tokens": len(one.input_ids), "pieces": one.pieces(tokenizer)}
        for one in examples[0][:NUM_SHOWN]
    ]
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
    """Return the prompt ids for the next assistant turn, made by the code that renders training rows."""
    rendered = ChatTemplate(tokenizer, rendered_on).render_prompt(messages, tools)
    return _encoder(tokenizer).encode([rendered], ["the prompt"])[0].ids.tolist()


def text_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text to continue, as the prompt of a row of plain text is tokenised.

    Raises:
        InputError: the text is empty.
    """
    if not text:
        raise InputError("the prompt is empty", allowed="the beginning of a text, as in the rows of the training")
    encoder = _encoder(tokenizer)
    ids = encoder.encode([Rendered(text, [], [], is_chat=False)], ["the prompt"])[0].ids.tolist()
    before = encoder.affixes[0]
    return ids if ids[: len(before)] == before else [*before, *ids]


@lru_cache(maxsize=1)
def _encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Cached, because an Encoder copies the vocabulary: half a second for each reply in a chat."""
    return Encoder(tokenizer)


# --- read and split


def _sources(source: SourceSettings) -> tuple[Source, Source | None]:
    dataset = Source.of("dataset", source.dataset, source.split, config_name=source.config, revision=source.revision)
    if source.eval_dataset is None:
        return dataset, None
    return dataset, Source.of("eval_dataset", source.eval_dataset, source.eval_split)


def _both_sides(
    settings: SourceSettings,
    holdout: SplitSettings,
    report: DataReport,
    dataset: Source,
    own: Source | None,
    progress: Progress,
) -> tuple[Records, Records, Manifest]:
    """Return training rows, validation rows, and the side of each row by its hash."""
    unused = UnusedKeys()
    records, report.format = _records(settings, holdout.split_by, report, dataset, progress, unused)
    on_split = partial(_onward, progress, 0, len(records), "looking for duplicates")
    size = holdout.validation_size if own is None else 0
    keep_copies = not settings.exact_deduplication
    split = hold_out(records, size, holdout.seed, on_split, keep_copies=keep_copies)
    report.num_groups = split.num_groups
    report.num_near_duplicates = split.num_near_duplicates
    num_copies = split.num_exact_duplicates
    train, validation = split.train, split.validation
    hashes, is_validation = split.rows.hashes, split.is_validation
    if own is not None:
        records, _ = _records(settings, holdout.split_by, report, own, progress, unused)
        num_copies += int(is_copy(records).sum())
        validation = with_groups(records if keep_copies else without_copies(records))
        report.num_close_rows = check_leaks(train, validation, key=own.key)
        hashes = np.concatenate([hashes, validation.hashes])
        is_validation = np.arange(len(hashes)) >= len(train)
    report.unused = unused.to_json()
    if keep_copies:
        report.num_copies_kept = num_copies
    elif num_copies:
        report.num_exact_duplicates = num_copies
        report.dropped[EXACT_DUPLICATE] += num_copies
    _, first = np.unique(hashes, return_index=True)  # rows that differ in case only share a hash, and a side
    first.sort()
    written = {"seed": holdout.seed, "validation_size": holdout.validation_size, "split_by": holdout.split_by}
    return train, validation, Manifest(written, hashes[first], is_validation[first])


def _records(
    settings: SourceSettings,
    split_by: str | None,
    report: DataReport,
    source: Source,
    progress: Progress,
    unused: UnusedKeys,
) -> tuple[Records, str]:
    """Return the normalised rows of `dataset` or `eval_dataset`, and their formats; keys that are not read are counted.

    Raises:
        RowError: rows cannot be used, and `on_bad_row` is error; counts them all, and names the first.
    """
    mapping, is_strict = settings.column_mapping, settings.on_bad_row == "error"
    source.on_bad_row = _ignore  # in passes that come before the one that counts
    check_mapping(source, mapping, is_needed=source.key == "dataset")
    formats = FileFormats(source, mapping, is_strict=is_strict)
    kinship, bad_rows = Kinship(split_by), BadRows()
    store, hashes, exact, kept = Store(), bytearray(), array("Q"), array("q")

    def on_bad_row(error: RowError) -> None:
        bad_rows.add(error)
        report.dropped[error.reason] += 1

    source.on_bad_row = on_bad_row
    num_rows = num_linked = 0
    for file, own_names in source.rows_by_file():
        if num_rows % 1000 == 0:
            progress(num_rows, 0, "reading rows")
        num_rows += 1
        row = mapped(own_names, mapping)
        try:
            found, why = formats.of(file, row)
            num_linked += 1
            group = kinship.add(row, own_names, is_sharegpt=found.name == "sharegpt")
            check_shape(row, found, why)
            record = convert(row, found)
            unused.add(row, found, mapping.get(split_by, split_by) if split_by else None)
            if isinstance(record, str):
                report.dropped[record] += 1
                continue
            data, content_hash = packed(replace(record, group=group))
        except RowError as error:
            on_bad_row(error)
            continue
        store.append(data)
        exact.append(content_hash)
        hashes += row_hash(record)
        kept.append(num_linked - 1)
    report.num_read += num_rows + source.num_bad
    if is_strict and bad_rows.num_bad:
        formats.check_all_known()
        raise bad_rows.error(num_rows + source.num_bad)
    source.left_out.add_to(report.schema_nulls, report.beside_rows)
    if not kept:
        raise InputError(f"{source.key}: no row is left", seen=report.reasons(), change="check the rows of the file")
    links = kinship.links()[np.asarray(kept)]
    fingerprints = np.frombuffer(hashes, "S16"), np.frombuffer(exact, np.uint64)
    return Records(store, np.arange(len(kept)), *fingerprints, links), formats.names


def _ignore(error: RowError) -> None:
    pass


def _nothing_left(name: str, num_rows: int, max_length: int, report: DataReport) -> InputError:
    most = report.dropped.most_common(1)
    fault = {ANSWER_PAST_MAX_LENGTH: "F25", LONGER_THAN_MAX_LENGTH: "F25", NOTHING_TO_LEARN: "F21"}
    code = fault.get(most[0][0]) if most else None
    return InputError(
        f"none of the {num_rows} {name} rows can be used",
        seen=report.reasons(),
        allowed=f"at least one row whose answer starts within max_length: {max_length} tokens",
        change="give the answers a weight above 0" if code == "F21" else "raise max_length, or shorten the prompts",
        fault=code,
    )
