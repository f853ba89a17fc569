"""The one door from a config to the tokens that are trained on.

    read -> normalise -> remove copies, group, split -> render by the template -> mask -> truncate

Every row that was read is either kept or dropped for a reason that is counted: rows read = kept + dropped. Training,
evaluation, the data report and chat all come through here, so they cannot render or mask differently.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from solotune.config import RunConfig
from solotune.dataset.chat import ChatTemplate, Rendered
from solotune.dataset.encode import Encoded, Encoder
from solotune.dataset.formats import Record, convert, recognise
from solotune.dataset.source import read
from solotune.dataset.split import check_leaks, hold_out, without_copies
from solotune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXACT_DUPLICATE = "exact duplicate"
NOTHING_TO_LEARN = "no supervised token"
ANSWER_PAST_MAX_LENGTH = "answer beyond max_length"
_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the model sees it: `label = input_ids where supervised else -100`."""

    input_ids: np.ndarray
    """int32 (T,)"""
    supervised: np.ndarray
    """bool (T,)"""
    where: str
    """The row's place: `chats.jsonl:17`, `owner/name[17]`."""
    messages: list[dict[str, Any]]
    """The normalised messages, for showing and generating; empty for a row of plain text."""
    tools: list[dict[str, Any]] | None = None
    """The tool definitions that were rendered with the messages."""

    @property
    def prompt_ids(self) -> np.ndarray:
        """The ids before the last answer, to generate it anew from; empty for a row that is learned whole."""
        begins = np.flatnonzero(self.supervised & ~np.concatenate(([False], self.supervised[:-1])))
        return self.input_ids[: begins[-1]] if len(begins) and begins[-1] > 1 else self.input_ids[:0]


@dataclass(slots=True)
class DataReport:
    """What happened to the rows, counted."""

    format: str
    num_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    num_train: int = 0
    num_validation: int = 0
    num_tokens: int = 0
    num_supervised: int = 0
    num_groups: int = 0
    num_exact_duplicates: int = 0
    num_near_duplicates: int = 0
    num_leaks: int = 0
    num_truncated: int = 0
    num_answers_cut: int = 0
    num_with_forged_tokens: int = 0
    train_sha256: str = ""
    validation_sha256: str = ""
    findings: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The shape of `data.json`."""
        return {
            "format": self.format,
            "rows": {
                "read": self.num_read,
                "kept": self.num_train + self.num_validation,
                "dropped": dict(sorted(self.dropped.items())),
                "truncated": self.num_truncated,
                "answers_cut": self.num_answers_cut,
                "with_control_tokens_as_text": self.num_with_forged_tokens,
            },
            "tokens": {"total": self.num_tokens, "supervised": self.num_supervised},
            "split": {
                "train": self.num_train,
                "validation": self.num_validation,
                "groups": self.num_groups,
                "exact_duplicates": self.num_exact_duplicates,
                "near_duplicates": self.num_near_duplicates,
                "leaks": self.num_leaks,
            },
            "sha256": {"train": self.train_sha256, "validation": self.validation_sha256},
            "findings": self.findings,
        }


@dataclass(frozen=True)
class Prepared:
    """The rows to train on, the rows to validate on, and the account of both."""

    train: list[Example]
    validation: list[Example]
    report: DataReport


def prepare(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Reads, splits, renders and masks the rows of a config.

    Raises:
        InputError: a file, a row, the template or the split is not usable; names the place.
        CheckError: `eval_dataset` contains rows of `dataset`.
    """
    report = DataReport(format="")
    train, validation = _both_sides(config, report)
    renderer = _Renderer(config, tokenizer, report)
    sides = [list(renderer.examples(side)) for side in (train, validation)]
    for name, records, examples in zip(("training", "validation"), (train, validation), sides, strict=True):
        if records and not examples:
            raise _nothing_left(name, len(records), config, report)
    report.num_train, report.num_validation = map(len, sides)
    report.train_sha256, report.validation_sha256 = map(_sha256, sides)
    return Prepared(sides[0], sides[1], report)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """The ids after which the model writes the next assistant turn; the same code that renders training rows."""
    rendered = ChatTemplate(tokenizer).render_prompt(messages, tools)
    return Encoder(tokenizer).encode([rendered], ["the prompt"])[0][0].tolist()


# --- read and split


def _both_sides(config: RunConfig, report: DataReport) -> tuple[list[Record], list[Record]]:
    records, report.format = _records(config, report, "dataset")
    if config.eval_dataset is None:
        split = hold_out(records, config.validation_size, config.seed)
        report.num_groups = split.num_groups
        report.num_exact_duplicates = split.num_exact_duplicates
        report.num_near_duplicates = split.num_near_duplicates
        train, validation = split.train, split.validation
    else:
        own, _ = _records(config, report, "eval_dataset")
        split, validation = hold_out(records, 0, config.seed), without_copies(own)
        report.num_groups = split.num_groups
        report.num_near_duplicates = split.num_near_duplicates
        report.num_exact_duplicates = split.num_exact_duplicates + len(own) - len(validation)
        train = split.train
        check_leaks(train, validation, key="eval_dataset")
    if report.num_exact_duplicates:
        report.dropped[EXACT_DUPLICATE] += report.num_exact_duplicates
    return train, validation


def _records(config: RunConfig, report: DataReport, key: str) -> tuple[list[Record], str]:
    """The normalised rows of `dataset` or `eval_dataset`, and their format."""
    if key == "dataset":
        rows = read(
            key,
            config.dataset,
            config.dataset_split,
            config_name=config.dataset_config,
            revision=config.dataset_revision,
        )
    else:
        assert config.eval_dataset is not None
        rows = read(key, config.eval_dataset, config.eval_dataset_split)
    report.num_read += len(rows)
    found = recognise(rows)
    records = []
    for row in rows:
        record = convert(row, found)
        if isinstance(record, str):
            report.dropped[record] += 1
            continue
        if config.split_by is not None:
            record = replace(record, group=_group(row.where, row.values, config.split_by))
        records.append(record)
    if not records:
        raise InputError(f"{key}: no row is left", seen=_reasons(report), change="look at the rows of the file")
    return records, found.name


def _group(where: str, values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if value is None or isinstance(value, (dict, list)):
        raise InputError(
            f"{where}: split_by: {key} " + ("is missing" if value is None else "is not a single value"),
            seen="the keys " + ", ".join(values),
            allowed="a key that every row has, with a text or a number",
        )
    return f"{key}={value}"


# --- render, mask, truncate


class _Renderer:
    """Turns records into examples, counting what is lost on the way."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase, report: DataReport) -> None:
        self._config, self._report, self._tokenizer = config, report, tokenizer
        self._encoder = Encoder(tokenizer)
        self._template: ChatTemplate | None = None

    def examples(self, records: Sequence[Record]) -> Iterator[Example]:
        for start in range(0, len(records), _BATCH_ROWS):
            batch = records[start : start + _BATCH_ROWS]
            encoded = self._encoder.encode([self._rendered(record) for record in batch], [r.where for r in batch])
            for record, one in zip(batch, encoded, strict=True):
                if not record.is_chat:
                    one = self._with_affixes(one)
                example = self._example(record, one)
                if example is not None:
                    yield example

    def _rendered(self, record: Record) -> Rendered:
        if not record.is_chat:
            # special tokens in a text are the user's own rendering and stay special
            return Rendered(record.text, [], [(record.answer_start, len(record.text))])
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer)
        rendered = self._template.render(record.where, record.messages, record.tools)
        self._report.num_with_forged_tokens += bool(rendered.forged)
        return rendered

    def _with_affixes(self, encoded: Encoded) -> Encoded:
        """A plain text gets what the tokenizer puts around texts (a bos), once, and an eos so that it ends."""
        ids, supervised = encoded
        before, after = self._encoder.affixes
        if before and ids[: len(before)].tolist() == before:
            before = []
        eos = self._tokenizer.eos_token_id
        after = after or ([eos] if eos is not None else [])
        if after and ids[-len(after) :].tolist() == after:
            after = []
        ids = np.concatenate([before, ids, after]).astype(np.int32)
        supervised = np.concatenate([np.zeros(len(before), bool), supervised, np.ones(len(after), bool)])
        return ids, supervised

    def _example(self, record: Record, encoded: Encoded) -> Example | None:
        ids, supervised = encoded
        if not self._config.assistant_only_loss:
            supervised = np.ones_like(supervised)
        if len(supervised):
            supervised[0] = False  # nothing comes before the first token, so nothing predicts it
        if not supervised.any():
            self._report.dropped[NOTHING_TO_LEARN] += 1
            return None
        limit = self._config.max_length
        if len(ids) > limit:
            self._report.num_truncated += 1
            self._report.num_answers_cut += bool(supervised[limit:].any())
            ids, supervised = ids[:limit].copy(), supervised[:limit].copy()
            if not supervised.any():
                self._report.dropped[ANSWER_PAST_MAX_LENGTH] += 1
                return None
        self._report.num_tokens += len(ids)
        self._report.num_supervised += int(supervised.sum())
        return Example(ids, supervised, record.where, record.messages, record.tools)


def _nothing_left(name: str, num_rows: int, config: RunConfig, report: DataReport) -> InputError:
    return InputError(
        f"no {name} row is left of {num_rows}",
        seen=_reasons(report),
        allowed=f"at least one row whose answer begins within max_length: {config.max_length} tokens",
        change="raise max_length, or shorten the prompts",
    )


def _reasons(report: DataReport) -> str:
    return "dropped: " + (", ".join(f"{reason} {n}" for reason, n in sorted(report.dropped.items())) or "none")


def _sha256(examples: Sequence[Example]) -> str:
    """Over ids and mask of all rows in order: equal exactly if the same tokens are learned in the same order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(example.input_ids.astype("<i4").tobytes())
        digest.update(example.supervised.astype("u1").tobytes())
    return digest.hexdigest()
