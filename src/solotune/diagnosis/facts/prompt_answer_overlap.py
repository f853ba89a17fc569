"""Detect shuffled answers by the words that answers share with prompts, without a model.

A rare word in an answer links it to the prompts that have the same word. In correct data it links to the answer's own
prompt far more often than by chance; if answers were shuffled, it links to any prompt. Data whose answers share no
words with prompts (labels, another script) has no links, and no result.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

RARE = 0.05  # of the rows: a more frequent word makes no links
LEAST_ROWS = 40
MOST_LINKED = 0.5  # of the rows: with fewer links, rows are not called shuffled
DISTINCT = 0.5  # of the answers; labels and constant answers link by accident
_WORD = re.compile(r"[^\W\d_]{3,}")  # numbers match by accident


@dataclass(frozen=True)
class Alignment:
    """How often answers link to their own prompt."""

    rows: int
    linked: int  # answers that link to some prompt
    own: int  # of them, to their own
    by_chance: float  # expected for shuffled rows

    @property
    def is_whole(self) -> bool:
        """Far more links to own prompts than by chance: five standard deviations."""
        return self.own > 0.2 * self.linked and self.own > self.by_chance + 5 * math.sqrt(self.by_chance + 1)

    @property
    def is_shuffled(self) -> bool:
        """Answers link to prompts, but to their own no more often than by chance."""
        is_linked = self.linked >= max(LEAST_ROWS, MOST_LINKED * self.rows)
        return is_linked and self.own < 0.2 * self.linked and self.own <= self.by_chance + 2 * math.sqrt(self.by_chance)


def alignment_of(pairs: Sequence[tuple[str, str]]) -> Alignment | None:
    """Alignment of (prompt, answer) texts; None if there are few, or most answers are equal."""
    if len(pairs) < LEAST_ROWS or len({answer for _, answer in pairs}) < DISTINCT * len(pairs):
        return None
    prompts, answers = ([set(_WORD.findall(text.casefold())) for text in texts] for texts in zip(*pairs, strict=True))
    most = max(2, RARE * len(pairs))
    asked, answered = (Counter(word for words in side for word in words) for side in (prompts, answers))
    rows_of: dict[str, set[int]] = {}
    for i, words in enumerate(prompts):
        for word in words:
            if asked[word] <= most and answered[word] <= most:
                rows_of.setdefault(word, set()).add(i)
    pointed = [set[int]().union(*(rows_of.get(word, ()) for word in words)) for words in answers]
    return Alignment(
        rows=len(pairs),
        linked=sum(bool(rows) for rows in pointed),
        own=sum(i in rows for i, rows in enumerate(pointed)),
        by_chance=sum(len(rows) for rows in pointed) / len(pairs),
    )
