"""Tokenise rendered text: ids, answer spans and the loss mask.

Loss mask
---------
A text is tokenised once, as a whole, without adding special tokens (the template has written them), so the ids are
those of inference. A token is trained on if it starts inside an answer's characters. A token that starts before the
answer and reaches into it (`\\n\\n` made of the prompt's newline and the answer's) is not: at inference the prompt
has already ended there.

Offsets come from a copy of the Rust tokenizer without its post-processor: byte-level tokenizers trim whitespace off the
offsets they report, which would move a token's start across a boundary.

Forged control tokens
---------------------
They (see `control_tokens`) are encoded as text: the stretch between two genuine control tokens that holds one is
encoded again by a second copy of the tokenizer that has no control tokens. The stretches are independent of each other
because the tokenizer itself splits at control tokens first.

Prompt as prefix
----------------
For the same reason it is cheap to check for every answer that the prompt tokenised alone, as at inference, has the same
ids: only the stretch between the last control token and the answer can differ, and in nearly all rows it is the same
few characters (`assistant\\n`). If the ids differ, the model is trained after ids that it never sees at inference; the
report counts these rows.
"""

from __future__ import annotations

import copy
import json
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from solotune.dataset.chat.answer_spans import Rendered, Span
from solotune.dataset.chat.control_tokens import ControlTokens
from solotune.dataset.readers.row import RowError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_FIRST = itemgetter(0)
_LONGEST_MEMO = 200  # characters: headers are shorter, prompts of plain text need not be remembered


class Encoded(NamedTuple):
    """A row as ids, not truncated."""

    ids: np.ndarray
    """int32 (T,)"""
    spans: list[Span]
    """Positions of each answer in the ids, `[begin, end)`."""
    is_prefix: list[bool]
    """For each answer, whether the text before it has these same ids when it is tokenised alone."""
    num_crossing: int
    """Tokens that start before an answer and reach into it; they are not trained on."""
    is_chat: bool = True
    """Whether the model's chat template has made the text."""

    def mask(self, answers: Sequence[int] | None = None) -> np.ndarray:
        """bool (T,): the tokens of these answers (numbers from 0), or of all."""
        loss_mask = np.zeros(len(self.ids), dtype=bool)
        for number in range(len(self.spans)) if answers is None else answers:
            begin, end = self.spans[number]
            loss_mask[begin:end] = True
        return loss_mask


class Encoder:
    """Tokenise rendered rows with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.control = ControlTokens(tokenizer)
        self._fast: Tokenizer | None = None
        self._memo: dict[tuple[str, str], list[int]] = {}
        if tokenizer.is_fast:
            backend: Any = tokenizer
            fast = copy.deepcopy(backend.backend_tokenizer)
            fast.no_padding()
            fast.no_truncation()
            fast.encode_special_tokens = False
            fast.post_processor = None
            self._fast = fast

    def encode(self, rows: Sequence[Rendered], places: Sequence[str]) -> list[Encoded]:
        """Tokenise rows and find their answers; `places` are the rows' names for messages.

        Raises:
            RowError: a control token in a text, or an answer, that this tokenizer cannot separate.
        """
        if self._fast is None:
            return [self._encode_slowly(row, place) for row, place in zip(rows, places, strict=True)]
        encodings = self._fast.encode_batch([row.text for row in rows], add_special_tokens=False)
        result = []
        for row, place, encoding in zip(rows, places, encodings, strict=True):
            ids, offsets = encoding.ids, encoding.offsets
            if row.forged:
                ids, offsets = self._without_forgery(row, place, ids, offsets)
            result.append(self._with_spans(row, ids, offsets))
        return result

    def _with_spans(self, row: Rendered, ids: list[int], offsets: list[Span]) -> Encoded:
        begins = np.fromiter(map(_FIRST, offsets), dtype=np.int32, count=len(ids))
        spans, is_prefix, num_crossing = [], [], 0
        for begin, end in row.answers:
            inside = np.flatnonzero((begins >= begin) & (begins < end))
            span = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
            spans.append(span)
            first = span[0] if len(inside) else int(np.searchsorted(begins, begin))
            is_crossing = first > 0 and offsets[first - 1][1] > begin
            num_crossing += is_crossing
            is_prefix.append(not is_crossing and self._is_prefix(row, ids[:first], offsets[:first], begin))
        return Encoded(np.asarray(ids, dtype=np.int32), spans, is_prefix, num_crossing, row.is_chat)

    def _is_prefix(self, row: Rendered, ids: list[int], offsets: list[Span], answer_begin: int) -> bool:
        """Whether the ids before an answer are those of the text before it, tokenised alone."""
        last = len(ids) - 1
        while last >= 0 and ids[last] not in self.control.ids:
            last -= 1
        before, begin = (row.text[slice(*offsets[last])], offsets[last][1]) if last >= 0 else ("", 0)
        if any(begin <= forged[0] for forged in row.forged if forged[0] < answer_begin):
            return self._as_text(row.text[begin:answer_begin], begin)[0] == ids[last + 1 :]
        stretch = row.text[begin:answer_begin]
        return not stretch or self._after(before, stretch) == ids[last + 1 :]

    def _after(self, control: str, stretch: str) -> list[int]:
        """The ids of a text after a control token (empty: at the start of a row)."""
        assert self._fast is not None
        if (known := self._memo.get((control, stretch))) is not None:
            return known
        ids = self._fast.encode(control + stretch, add_special_tokens=False).ids[bool(control) :]
        if len(stretch) <= _LONGEST_MEMO:
            self._memo[control, stretch] = ids
        return ids

    @cached_property
    def affixes(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer adds before and after a plain text: usually ([bos], [])."""
        bare, full = (self._tokenizer.encode("x", add_special_tokens=add) for add in (False, True))
        for begin in range(len(full) - len(bare) + 1):
            if full[begin : begin + len(bare)] == bare:
                return full[:begin], full[begin + len(bare) :]
        return [], []

    # --- forged control tokens

    def _without_forgery(
        self, row: Rendered, place: str, ids: list[int], offsets: list[Span]
    ) -> tuple[list[int], list[Span]]:
        forged = set(row.forged)
        genuine = [
            k for k, index in enumerate(ids) if index in self.control.ids and not _covers(offsets[k], row.forged)
        ]
        edges = [-1, *genuine, len(ids)]
        new_ids: list[int] = []
        new_offsets: list[Span] = []
        for left, right in pairwise(edges):
            begin = offsets[left][1] if left >= 0 else 0
            end = offsets[right][0] if right < len(ids) else len(row.text)
            again_ids, again_offsets = self._as_text(row.text[begin:end], begin)
            if not any(begin <= span[0] < end for span in forged) and again_ids != ids[left + 1 : right]:
                raise self._cannot(row, place)
            new_ids += again_ids
            new_offsets += again_offsets
            if right < len(ids):
                new_ids.append(ids[right])
                new_offsets.append(offsets[right])
        still = [k for k, index in enumerate(new_ids) if index in self.control.ids]
        if len(still) != len(genuine):
            raise self._cannot(row, place)
        return new_ids, new_offsets

    def _cannot(self, row: Rendered, place: str) -> RowError:
        begin, end = row.forged[0]
        return RowError(
            f"{place}: the text contains a control token, and this tokenizer cannot encode its spelling as text",
            reason="control token that cannot be encoded as text",
            seen=row.text[begin:end],
            change="change the spelling in the row, or remove the row",
        )

    def _as_text(self, text: str, begin: int) -> tuple[list[int], list[Span]]:
        encoder, ids = self._plain_encoders[begin > 0]
        encoding = encoder.encode(text, add_special_tokens=False)
        return (
            [ids.get(index, index) for index in encoding.ids],
            [(left + begin, right + begin) for left, right in encoding.offsets],
        )

    @cached_property
    def _plain_encoders(self) -> tuple[tuple[Tokenizer, dict[int, int]], tuple[Tokenizer, dict[int, int]]]:
        """Tokenizers without control tokens: one for the start of a row, one for its inside.

        Each has a map to the true ids of the added tokens it kept: removing some renumbers those outside the model's
        vocabulary.
        """
        from tokenizers import Tokenizer

        assert self._fast is not None
        state = json.loads(self._fast.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in self.control.spellings]
        built = []
        for is_inside in (False, True):
            if is_inside:
                _no_space_at_the_start(state["pre_tokenizer"])
            encoder = Tokenizer.from_str(json.dumps(state))
            kept = {index: token.content for index, token in encoder.get_added_tokens_decoder().items()}
            true = {index: self._fast.token_to_id(content) for index, content in kept.items()}
            built.append((encoder, {index: new for index, new in true.items() if new is not None and new != index}))
        return built[0], built[1]

    # --- tokenizers without offsets

    def _encode_slowly(self, row: Rendered, place: str) -> Encoded:
        """Find answers by ids: the ids of the text up to a boundary must be the first ids of the whole text."""
        ids = self._pieces(row.text, row.forged)
        spans = []
        for begin, end in row.answers:
            bounds = []
            for position in (begin, end):
                before = self._pieces(row.text[:position], [s for s in row.forged if s[1] <= position])
                if ids[: len(before)] != before:
                    raise RowError(
                        f"{place}: this tokenizer merges an answer and the text next to it into one token",
                        reason="answer and prompt share a token",
                        seen=repr(row.text[max(0, position - 20) : position + 20]),
                        allowed="tokens that belong to the answer or to the text around it, not to both",
                        change="use the model's fast tokenizer (tokenizer.json)",
                    )
                bounds.append(len(before))
            spans.append((bounds[0], bounds[1]))
        return Encoded(np.asarray(ids, dtype=np.int32), spans, [True] * len(spans), 0, row.is_chat)

    def _pieces(self, text: str, forged: list[Span]) -> list[int]:
        ids: list[int] = []
        position = 0
        for begin, end in [*forged, (len(text), len(text))]:
            if text[position:begin]:
                ids += self._tokenizer.encode(text[position:begin], add_special_tokens=False)
            if text[begin:end]:
                ids += self._tokenizer.encode(text[begin:end], add_special_tokens=False, split_special_tokens=True)
            position = end
        return ids


def _covers(offset: Span, spans: list[Span]) -> bool:
    """Whether the token at `offset` is one of the (sorted) spans, apart from whitespace that it includes."""
    place = bisect_left(spans, (offset[0], 0))
    return place < len(spans) and spans[place][1] <= offset[1]


def _no_space_at_the_start(pre_tokenizer: dict[str, Any] | None) -> None:
    """Llama's and Mistral's Metaspace puts a space before the first word of a text, but not inside one."""
    for part in [pre_tokenizer or {}, *((pre_tokenizer or {}).get("pretokenizers") or [])]:
        if part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
