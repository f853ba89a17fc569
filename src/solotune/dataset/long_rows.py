"""Cut rows that are far longer than `max_length` before they are rendered and tokenised, or refuse them.

The tokenizer needs some 600 bytes of memory per token: 52 MB of text, which fit into 52 kB of gzip, would take 10 GiB
to tokenise, only to be cut off by `max_length`. A token stands for at most as many characters as the longest token of
the vocabulary has, so what comes after max_length times as many characters is cut off before:

    most = max(SHORT_ROW, (max_length + 1) * characters of the longest token), but at most LONGEST_ROW

A row of up to `most` characters is never touched. Refused are rows above LONGEST_ROW of which all tokens are needed:
with `overflow: split`, and where max_length is larger than the tokens of so many characters.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from solotune.config.settings import RenderSettings
from solotune.dataset.chat.answer_spans import Rendered
from solotune.dataset.chat.encode import Encoded
from solotune.dataset.chat.formats import Record
from solotune.dataset.readers.row import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHORT_ROW = 1 << 19
"""Characters of a row that are always tokenised: at most 0.4 GiB of memory."""
LONGEST_ROW = 8 << 20
"""Most characters that are tokenised at once: 2 million tokens of English, 1.4 GiB."""
_KEPT_CHARACTERS = 16  # of each message after the cut, so that the template takes the same branches


class LongRows:
    """Cuts rows for one tokenizer and one `max_length`."""

    def __init__(self, settings: RenderSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        self._settings, self._tokenizer = settings, tokenizer

    @cached_property
    def _most(self) -> int:
        """Characters after which a row is cut."""
        longest = max(map(len, self._tokenizer.get_vocab()))
        most = (self._settings.max_length + 1) * longest
        return LONGEST_ROW if self._settings.overflow == "split" else min(max(SHORT_ROW, most), LONGEST_ROW)

    def shortened(self, record: Record) -> Record:
        """The record with its texts cut off after the most characters; the same object if it is not longer.

        Raises:
            RowError: the row is too long to be tokenised, and must not be cut.
        """
        num_characters = _num_characters(record)
        if num_characters <= SHORT_ROW or num_characters <= self._most:
            return record
        if self._settings.overflow == "split":
            raise self._too_long(record.where, num_characters)
        if not record.is_chat:
            return replace(record, text=record.text[: self._most], answer_start=min(record.answer_start, self._most))
        left, messages = self._most, []
        for message in record.messages:
            cut: dict[str, Any] = dict(message)
            for key in ("content", "reasoning_content"):
                if key in cut:
                    left, cut[key] = left - len(cut[key]), cut[key][: max(left, _KEPT_CHARACTERS)]
            messages.append(cut)
        return replace(record, messages=messages)

    def cut(self, rendered: Rendered, where: str) -> Rendered:
        """A rendered row without what is beyond the most characters, and without the answers that begin there.

        Raises:
            RowError: the row is too long to be tokenised, and must not be cut.
        """
        if len(rendered.text) <= SHORT_ROW or len(rendered.text) <= self._most:
            return rendered
        if self._settings.overflow == "split":
            raise self._too_long(where, len(rendered.text))
        most = self._most
        answers = [(begin, min(end, most)) for begin, end in rendered.answers if begin < most]
        forged = [span for span in rendered.forged if span[1] <= most]
        return replace(rendered, text=rendered.text[:most], forged=forged, answers=answers)

    def whole(self, encoded: Encoded, num_answers: int, where: str) -> Encoded:
        """A row that was cut, with its answers beyond the cut as empty spans after its last token.

        Raises:
            RowError: the row was cut within `max_length`.
        """
        if len(encoded.ids) <= self._settings.max_length:
            raise self._too_long(where, None)
        num_cut, end = num_answers - len(encoded.spans), len(encoded.ids)
        spans, is_prefix = encoded.spans + [(end, end)] * num_cut, encoded.is_prefix + [True] * num_cut
        return encoded._replace(spans=spans, is_prefix=is_prefix)

    def _too_long(self, where: str, num_characters: int | None) -> RowError:
        what = "the row is too long to be tokenised as a whole"
        return RowError(
            f"{where}: {what}",
            reason=what,
            seen=f"{num_characters:,} characters" if num_characters else f"more than {LONGEST_ROW:,} characters",
            allowed=f"{LONGEST_ROW:,} characters",
            change="write it as several rows, or set "
            + ("overflow: truncate" if self._settings.overflow == "split" else "a smaller max_length"),
        )


def _num_characters(record: Record) -> int:
    return len(record.text) + sum(len(m["content"]) + len(m.get("reasoning_content", "")) for m in record.messages)
