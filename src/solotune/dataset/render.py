"""From records to examples: render by the template, tokenise, mask, and bring to `max_length`.

A row that is too long is dealt with as `overflow` says, and always counted:

    truncate  its end is cut; what answers lose is counted
    drop      the row is dropped
    split     it becomes parts of `max_length`. Each part but the first repeats one token, the last of the part before
              it, so that every label has a predecessor and none is lost. What came earlier a part does not see.
    error     stop, and name it

Weights (`messages.py`) go with the tokens through all of this. A row in which nothing is learned is dropped under a
reason: a step over such rows only would be a loss of 0 / 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from solotune.config.settings import RenderSettings
from solotune.dataset.chat.answer_spans import ChatTemplate, Rendered
from solotune.dataset.chat.encode import Encoded, Encoder
from solotune.dataset.chat.formats import Record
from solotune.dataset.data_report import ANSWER_PAST_MAX_LENGTH, LONGER_THAN_MAX_LENGTH, NOTHING_TO_LEARN, DataReport
from solotune.dataset.example import Example
from solotune.dataset.readers.row import RowError
from solotune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_ROWS, _BATCH_CHARACTERS = 256, 2 << 20
"""Rows that are tokenised together: what the tokenizer says of each token takes some hundred bytes."""


class Renderer:
    """Turns records into examples, counting in a report what is lost on the way."""

    def __init__(self, settings: RenderSettings, tokenizer: PreTrainedTokenizerBase, report: DataReport) -> None:
        self._settings, self._report, self._tokenizer = settings, report, tokenizer
        self._encoder = Encoder(tokenizer)
        self._template: ChatTemplate | None = None
        self._end_ids: dict[bool, frozenset[int]] = {}

    def examples(self, records: Sequence[Record], progress: Callable[[int], None]) -> Iterator[Example]:
        """The examples of the records, in order.

        Raises:
            RowError: a row that template or tokenizer refuse, unless `on_bad_row: drop`.
            InputError: a row that is too long, with `overflow: error`; no chat template.
        """
        for done, batch in _batches(records):
            for record, encoded in self._encoded(batch):
                yield from self._examples_of(record, encoded)
            progress(done)

    # --- render and tokenise

    def _encoded(self, records: Sequence[Record]) -> list[tuple[Record, Encoded]]:
        """A batch at once; if a row in it is bad and may be dropped, row by row."""
        try:
            rendered = [self._rendered(record) for record in records]
            encoded = self._encoder.encode(rendered, [record.where for record in records])
        except RowError as error:
            if self._settings.on_bad_row == "error":
                raise
            if len(records) == 1:
                self._report.dropped[error.reason] += 1
                return []
            return [pair for record in records for pair in self._encoded([record])]
        self._report.num_with_forged_tokens += sum(bool(one.forged) for one in rendered)
        return [
            (record, one if record.is_chat else self._with_affixes(one))
            for record, one in zip(records, encoded, strict=True)
        ]

    def _rendered(self, record: Record) -> Rendered:
        if not record.is_chat:
            # special tokens in a text are the user's own rendering and stay special
            return Rendered(record.text, [], [(record.answer_start, len(record.text))])
        return self._chat_template.render(record.where, record.messages, record.tools)

    @property
    def _chat_template(self) -> ChatTemplate:
        if self._template is None:  # made late: rows of plain text need none
            self._template = ChatTemplate(self._tokenizer, self._report.day)
        return self._template

    def _with_affixes(self, encoded: Encoded) -> Encoded:
        """A plain text gets what the tokenizer puts around texts (a bos), once, and an eos so that it ends."""
        before, ids = self._encoder.affixes[0], encoded.ids
        if before and ids[: len(before)].tolist() == before:
            before = []
        after = self._text_end
        if after and ids[-len(after) :].tolist() == after:
            after = []
        ((begin, end),) = encoded.spans
        span = (begin + len(before), end + len(before) + len(after))
        return encoded._replace(ids=np.concatenate([before, ids, after]).astype(np.int32), spans=[span])

    @property
    def _text_end(self) -> list[int]:
        eos = self._tokenizer.eos_token_id
        return self._encoder.affixes[1] or ([eos] if isinstance(eos, int) else [])

    def _end_ids_of(self, *, is_chat: bool) -> frozenset[int]:
        """The ids that an answer may end with."""
        if is_chat not in self._end_ids:
            if is_chat:
                control = self._chat_template.control.pattern
                last = [control.findall(spelling)[-1] for spelling in self._chat_template.terminators]
                self._end_ids[True] = frozenset(cast("list[int]", self._tokenizer.convert_tokens_to_ids(last)))
            else:
                self._end_ids[False] = frozenset(self._text_end[-1:])
        return self._end_ids[is_chat]

    # --- mask, and bring to max_length

    def _learned(self, record: Record, num_answers: int) -> list[int]:
        """The numbers of the answers to learn, among the answers of the row."""
        learned = [k for k in range(num_answers) if not record.weights or record.weights[k]]
        is_last_only = self._settings.train_on_last_turn and record.is_chat
        return [k for k in learned if k == num_answers - 1] if is_last_only else learned

    def _mask(self, encoded: Encoded, learned: list[int]) -> np.ndarray:
        """bool (T,)"""
        if self._settings.assistant_only_loss:
            supervised = encoded.mask(learned)
        else:
            supervised = ~encoded.mask([k for k in range(len(encoded.spans)) if k not in learned])
        if len(supervised):
            supervised[0] = False  # nothing comes before the first token, so nothing predicts it
        return supervised

    def _examples_of(self, record: Record, encoded: Encoded) -> list[Example]:
        report, limit, overflow = self._report, self._settings.max_length, self._settings.overflow
        learned = self._learned(record, len(encoded.spans))
        supervised = self._mask(encoded, learned)
        weights = _weights(record, encoded)
        num_tokens = len(encoded.ids)
        report.labels.row_tokens.append(num_tokens)
        if num_tokens > limit and overflow == "error":
            raise self._too_long(record, num_tokens)
        if not supervised.any():
            report.dropped[NOTHING_TO_LEARN] += 1
            return []
        if num_tokens > limit and overflow == "drop":
            report.dropped[LONGER_THAN_MAX_LENGTH] += 1
            return []
        if num_tokens > limit and overflow == "split":
            num_kept, examples = num_tokens, self._parts(record, encoded.ids, supervised, weights)
        else:
            num_kept = min(num_tokens, limit)
            report.num_truncated += num_tokens > limit
            report.num_answers_cut += bool(supervised[limit:].any())
            if not supervised[:limit].any():
                report.dropped[ANSWER_PAST_MAX_LENGTH] += 1
                return []
            examples = [_example(record, record.where, encoded.ids[:limit], supervised[:limit], weights)]
        report.num_tokens += sum(len(example.input_ids) for example in examples)
        report.num_supervised += int(supervised[:num_kept].sum())
        report.total_weight += sum(example.total_weight for example in examples)
        report.num_weighted_rows += any(example.weights is not None for example in examples)
        report.num_weighted_answers += sum(_weight_of(record, number) != 1 for number in learned)
        report.labels.add(
            encoded,
            learned,
            supervised,
            num_kept,
            end_ids=self._end_ids_of(is_chat=record.is_chat),
            bos_id=cast("int | None", self._tokenizer.bos_token_id),
        )
        return examples

    def _parts(
        self, record: Record, ids: np.ndarray, supervised: np.ndarray, weights: np.ndarray | None
    ) -> list[Example]:
        """The row in parts that overlap by one token; those with something to learn."""
        limit = self._settings.max_length
        starts = range(0, len(ids) - 1, limit - 1)
        examples = []
        for number, start in enumerate(starts, 1):
            part = slice(start, start + limit)
            mask = supervised[part].copy()
            mask[0] = False  # it is the label of the part before
            if mask.any():
                where = f"{record.where} part {number}/{len(starts)}"
                # generating from the messages would generate the whole row's answer, so one part has them
                source = record if number == 1 else replace(record, messages=[], tools=None)
                examples.append(_example(source, where, ids[part], mask, None if weights is None else weights[part]))
        self._report.num_split += 1
        self._report.num_added_by_split += len(examples) - 1
        self._report.num_parts_without_label += len(starts) - len(examples)
        return examples

    def _too_long(self, record: Record, num_tokens: int) -> InputError:
        return InputError(
            f"{record.where}: longer than max_length, and overflow is error",
            seen=f"{num_tokens:,} tokens",
            allowed=f"{self._settings.max_length:,} tokens",
            change="raise max_length, shorten the row, or set overflow to truncate, drop or split",
        )


def _batches(records: Sequence[Record]) -> Iterator[tuple[int, list[Record]]]:
    """Rows to tokenise together, and how many rows are done with them."""
    batch: list[Record] = []
    num_characters = 0
    for done, record in enumerate(records, 1):
        batch.append(record)
        num_characters += len(record.text) + sum(len(message["content"]) for message in record.messages)
        if len(batch) == _BATCH_ROWS or num_characters >= _BATCH_CHARACTERS or done == len(records):
            yield done, batch
            batch, num_characters = [], 0


def _weight_of(record: Record, answer: int) -> float:
    """What a token of an answer counts in the loss."""
    return record.weight * (record.weights[answer] if record.weights else 1.0)


def _weights(record: Record, encoded: Encoded) -> np.ndarray | None:
    """float32 (T,): what each token counts where it is learned; None where nothing has a weight.

    Between the answers, which only `assistant_only_loss: false` learns, it is the row's weight.
    """
    if record.weight == 1 and not record.weights:
        return None
    weights = np.full(len(encoded.ids), record.weight, np.float32)
    for answer, (begin, end) in enumerate(encoded.spans):
        weights[begin:end] = _weight_of(record, answer)
    return weights


def _example(
    record: Record, where: str, ids: np.ndarray, supervised: np.ndarray, weights: np.ndarray | None
) -> Example:
    """An example with arrays of its own; with weights only where one of its labels has another than 1."""
    if weights is not None:
        weights = np.where(supervised, weights[: len(ids)], np.float32(0))
        weights = None if (weights[supervised] == 1).all() else weights
    return Example(ids.copy(), supervised.copy(), where, record.messages, record.tools, weights)
