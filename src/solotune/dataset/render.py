"""From records to examples: render with the template, tokenise, mask, and fit to `max_length`.

A row longer than `max_length` is handled as `overflow` says, and always counted:

    truncate  its end is cut off; loss tokens that are lost are counted
    drop      the row is dropped
    split     the row becomes parts of `max_length`. Each part but the first repeats one token, the last of the part
              before it, so that every label has a predecessor and none is lost. A part does not see earlier parts.
    error     stop, and name the row

Weights (`messages.py`) stay with their tokens throughout. A row without a loss token is dropped and counted: a step
over such rows only would have a loss of 0 / 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from solotune.config.settings import RenderSettings
from solotune.dataset.chat.answer_spans import ChatTemplate, Rendered
from solotune.dataset.chat.encode import Encoded, Encoder
from solotune.dataset.chat.formats import Record
from solotune.dataset.chat.rendered_content import THOUGHTS, WAYS_TO_KEEP_THOUGHTS, ContentCheck, Part
from solotune.dataset.chat.rendered_text import OWN, RenderedTexts, known_format
from solotune.dataset.data_report import (
    ANSWER_PAST_MAX_LENGTH,
    LONGER_THAN_MAX_LENGTH,
    NOTHING_TO_LEARN,
    PLAIN,
    DataReport,
)
from solotune.dataset.example import Example
from solotune.dataset.long_rows import LongRows
from solotune.dataset.readers.bad_rows import BadRows
from solotune.dataset.readers.row import RowError
from solotune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH_ROWS, _BATCH_CHARACTERS = 256, 2 << 20
"""Rows that are tokenised together: the tokenizer's output takes some hundred bytes per token."""


MOST_COUNTED = 1000
"""Bad rows after which no more rows are rendered: the data will be refused anyway."""
_TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""End tokens that writers of texts use beside the tokenizer's own; they count where they are control tokens."""


class _Row(NamedTuple):
    """A row on its way to tokens."""

    record: Record
    whole: Rendered
    cut: Rendered
    """What is tokenised."""
    is_cut: bool
    """Whether a part of the row is left out, of the record or of its rendering."""


class Renderer:
    """Turn records into examples, and count in a report what is lost."""

    def __init__(self, settings: RenderSettings, tokenizer: PreTrainedTokenizerBase, report: DataReport) -> None:
        self._settings, self._report, self._tokenizer = settings, report, tokenizer
        self._encoder = Encoder(tokenizer)
        self._template: ChatTemplate | None = None
        self._content_check: ContentCheck | None = None
        self._end_ids: dict[bool, frozenset[int]] = {}
        self._long_rows = LongRows(settings, tokenizer)
        self._bad_rows, self._num_rendered = BadRows(), 0

    def examples(self, records: Sequence[Record], progress: Callable[[int], None]) -> Iterator[Example]:
        """Yield the examples of the records, in order.

        Rows that the template or the tokenizer refuses are left out; unless `on_bad_row: drop`, `check` raises an error
        for them.

        Raises:
            RowError: too many refused rows to go on.
            InputError: a row that is too long, with `overflow: error`; no chat template.
        """
        for done, batch in _batches(records):
            for record, encoded in self._encoded(batch):
                yield from self._examples_of(record, encoded)
            self._num_rendered += len(batch)
            if self._bad_rows.num_bad >= MOST_COUNTED:
                raise self._bad_rows.error(self._num_rendered, is_end=False)
            progress(done)

    # --- render and tokenise

    def _encoded(self, records: Sequence[Record]) -> list[tuple[Record, Encoded]]:
        """Encode a batch at once; row by row if it has a bad row that may be dropped."""
        try:
            rows = [self._row(record) for record in records]
            encoded = self._encoder.encode([row.cut for row in rows], [record.where for record in records])
            pairs = [(row.record, self._finished(row, one)) for row, one in zip(rows, encoded, strict=True)]
            parts = [self._content_of(row.record, row.whole) for row in rows]
        except RowError as error:
            if len(records) > 1:
                return [pair for record in records for pair in self._encoded([record])]
            if self._settings.on_bad_row == "error":
                self._bad_rows.add(error)
            else:
                self._report.dropped[error.reason] += 1
            return []
        for row, found in zip(rows, parts, strict=True):
            self._count(row, found)
        return pairs

    def _row(self, record: Record) -> _Row:
        """Render a row; what is far longer than max_length is cut before it is rendered, and before it is tokenised."""
        short = self._long_rows.shortened(record)
        whole = self._rendered(short)
        cut = self._long_rows.cut(whole, record.where)
        return _Row(short, whole, cut, is_cut=short is not record or cut is not whole)

    def _finished(self, row: _Row, encoded: Encoded) -> Encoded:
        if row.is_cut:
            encoded = self._long_rows.whole(encoded, len(row.whole.answers), row.record.where)
        return encoded if row.record.is_chat else self._with_affixes(row.record.text, encoded)

    def _count(self, row: _Row, parts: list[Part]) -> None:
        record, report = row.record, self._report
        report.num_with_forged_tokens += bool(row.cut.forged)
        report.num_cut_as_text += row.is_cut
        for part in parts:
            report.count_content(record.where, *part)
        if not record.is_chat:
            report.text_formats[OWN if row.cut.is_chat else known_format(record.text) or PLAIN] += 1

    def _rendered(self, record: Record) -> Rendered:
        if not record.is_chat:
            # special tokens in a text are the user's own rendering and stay special
            spans = self._texts.answers(record.text, record.answer_start) if self._texts else None
            return Rendered(
                record.text, [], spans or [(record.answer_start, len(record.text))], is_chat=spans is not None
            )
        return self._chat_template.render(record.where, record.messages, record.tools)

    def _content_of(self, record: Record, rendered: Rendered) -> list[Part]:
        """What a chat says, and whether its rendering contains it."""
        if not record.is_chat:
            return []
        if self._content_check is None:
            self._content_check = ContentCheck(self._chat_template)
        trained = self._trained_answers(record, len(rendered.answers))
        return self._content_check.parts(record.where, record.messages, record.tools, rendered, trained)

    def check(self) -> None:
        """Refuse the data after all rows are rendered.

        Raises:
            RowError: the template or the tokenizer refuses rows, and `on_bad_row` is error; counts them all.
            InputError: rows have thoughts, and no rendering has one.
        """
        if self._bad_rows.num_bad:
            raise self._bad_rows.error(self._num_rendered)
        counts = self._report.contents.get(THOUGHTS)
        if counts and counts["lost"] == counts["total"]:
            raise InputError(
                f"the chat template leaves out the thoughts of all {counts['total']:,} answers that have some",
                seen=f"lost in {', '.join(counts['rows'])}; it renders the thoughts of a last answer, but these stand "
                "before another answer",
                allowed="at least one rendered thought",
                change=WAYS_TO_KEEP_THOUGHTS + "; or, to train without thoughts, remove them from the rows",
            )

    @property
    def _chat_template(self) -> ChatTemplate:
        if self._template is None:  # created on first use: rows of plain text need none
            self._template = ChatTemplate(self._tokenizer, self._report.day)
        return self._template

    @cached_property
    def _texts(self) -> RenderedTexts | None:
        """For texts that the chat template has rendered already; None for a tokenizer without one."""
        return None if self._tokenizer.chat_template is None else RenderedTexts(self._chat_template)

    def _with_affixes(self, text: str, encoded: Encoded) -> Encoded:
        """Add to a text the tokenizer's own bos, unless it is there already, and an end token unless it ends with one.

        A text that the chat template has rendered gets what the template writes: often no bos, and an end of turn only
        if it breaks off in an answer.
        """
        before, after, ids = self._encoder.affixes[0], self._text_end, encoded.ids
        if encoded.is_chat and self._texts:
            is_answer_open = encoded.spans[-1][1] == len(ids) and not self._texts.is_ended(text)
            after = self._ids_of(self._chat_template.last_terminator) if is_answer_open else []
            before = before if self._texts.begins_with(str(self._tokenizer.bos_token)) else []
        elif self._is_ended(text):
            after = []
        if before and ids[: len(before)].tolist() == before:
            before = []
        if after and ids[-len(after) :].tolist() == after:
            after = []
        spans = [(begin + len(before), end + len(before)) for begin, end in encoded.spans]
        spans[-1] = (spans[-1][0], spans[-1][1] + len(after))
        return encoded._replace(ids=np.concatenate([before, ids, after]).astype(np.int32), spans=spans)

    def _is_ended(self, text: str) -> bool:
        """Whether a text ends with an end token, but for white space: the tokenizer's, or another model's usual one."""
        named = {str(self._tokenizer.eos_token), *_TEXT_ENDS} & self._encoder.control.spellings
        return text.rstrip().endswith(tuple(named))

    def _ids_of(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []

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

    def _trained_answers(self, record: Record, num_answers: int, *, is_chat: bool = True) -> list[int]:
        """Numbers of the answers of the row that are trained on."""
        trained = [k for k in range(num_answers) if not record.weights or record.weights[k]]
        is_last_only = self._settings.train_on_last_turn and is_chat
        return [k for k in trained if k == num_answers - 1] if is_last_only else trained

    def _mask(self, encoded: Encoded, trained: list[int]) -> np.ndarray:
        """bool (T,)"""
        if self._settings.assistant_only_loss:
            loss_mask = encoded.mask(trained)
        else:
            loss_mask = ~encoded.mask([k for k in range(len(encoded.spans)) if k not in trained])
        if len(loss_mask):
            loss_mask[0] = False  # nothing comes before the first token, so nothing predicts it
        return loss_mask

    def _examples_of(self, record: Record, encoded: Encoded) -> list[Example]:
        report, limit, overflow = self._report, self._settings.max_length, self._settings.overflow
        trained = self._trained_answers(record, len(encoded.spans), is_chat=encoded.is_chat)
        loss_mask = self._mask(encoded, trained)
        weights = _weights(record, encoded)
        num_tokens = len(encoded.ids)
        report.labels.row_tokens.append(num_tokens)
        if num_tokens > limit and overflow == "error":
            raise self._too_long(record, num_tokens)
        if not loss_mask.any():
            report.dropped[NOTHING_TO_LEARN] += 1
            return []
        if num_tokens > limit and overflow == "drop":
            report.dropped[LONGER_THAN_MAX_LENGTH] += 1
            report.labels.num_answers_dropped += len(trained)
            return []
        if num_tokens > limit and overflow == "split":
            num_kept, examples = num_tokens, self._parts(record, encoded.ids, loss_mask, weights)
        else:
            num_kept = min(num_tokens, limit)
            report.num_truncated += num_tokens > limit
            report.num_answers_cut += bool(loss_mask[limit:].any())
            if not loss_mask[:limit].any():
                report.dropped[ANSWER_PAST_MAX_LENGTH] += 1
                return []
            examples = [_example(record, record.where, encoded.ids[:limit], loss_mask[:limit], weights)]
        report.num_tokens += sum(len(example.input_ids) for example in examples)
        report.num_supervised += int(loss_mask[:num_kept].sum())
        report.total_weight += sum(example.total_weight for example in examples)
        report.num_weighted_rows += any(example.weights is not None for example in examples)
        report.num_weighted_answers += sum(_weight_of(record, number) != 1 for number in trained)
        report.labels.add(
            encoded,
            trained,
            loss_mask,
            num_kept,
            end_ids=self._end_ids_of(is_chat=encoded.is_chat),
            bos_id=cast("int | None", self._tokenizer.bos_token_id),
        )
        return examples

    def _parts(
        self, record: Record, ids: np.ndarray, loss_mask: np.ndarray, weights: np.ndarray | None
    ) -> list[Example]:
        """Split the row into parts that overlap by one token; return those with a loss token."""
        limit = self._settings.max_length
        starts = range(0, len(ids) - 1, limit - 1)
        examples = []
        for number, start in enumerate(starts, 1):
            part = slice(start, start + limit)
            mask = loss_mask[part].copy()
            mask[0] = False  # already a label in the previous part
            if mask.any():
                where = f"{record.where} part {number}/{len(starts)}"
                # generation from the messages would produce the whole row's answer, so only one part has them
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
    """Yield batches of rows to tokenise, each with the number of rows up to its end."""
    batch: list[Record] = []
    num_characters = 0
    for done, record in enumerate(records, 1):
        batch.append(record)
        num_characters += len(record.text) + sum(len(message["content"]) for message in record.messages)
        if len(batch) == _BATCH_ROWS or num_characters >= _BATCH_CHARACTERS or done == len(records):
            yield done, batch
            batch, num_characters = [], 0


def _weight_of(record: Record, answer: int) -> float:
    """Loss weight of the tokens of an answer."""
    return record.weight * (record.weights[answer] if record.weights else 1.0)


def _weights(record: Record, encoded: Encoded) -> np.ndarray | None:
    """float32 (T,): loss weight of each token; None if the row has no weights.

    Outside the answers, which only `assistant_only_loss: false` trains on, it is the row's weight.
    """
    if record.weight == 1 and not record.weights:
        return None
    weights = np.full(len(encoded.ids), record.weight, np.float32)
    for answer, (begin, end) in enumerate(encoded.spans):
        weights[begin:end] = _weight_of(record, answer)
    return weights


def _example(record: Record, where: str, ids: np.ndarray, loss_mask: np.ndarray, weights: np.ndarray | None) -> Example:
    """Build an example with its own copies of the arrays; with weights only if a label has a weight other than 1."""
    if weights is not None:
        weights = np.where(loss_mask, weights[: len(ids)], np.float32(0))
        weights = None if (weights[loss_mask] == 1).all() else weights
    return Example(ids.copy(), loss_mask.copy(), where, record.messages, record.tools, weights, record.group)
