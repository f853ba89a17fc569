"""Do answers speak of what their prompts ask? Seen from words alone, without a model.

A word that few prompts hold and few answers use, in an answer, points at the prompts that hold it. Where rows are whole
it points at the answer's own prompt far more often than chance would; where answers were shuffled it points anywhere.
Data whose answers share no words with prompts (labels, another script) points nowhere, and nothing is said.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

RARE = 0.05  # of the rows: a word in more of them points at nothing
LEAST_ROWS = 40
MOST_LINKED = 0.5  # of the rows, for rows to be called shuffled: there the answers do take up what prompts say
DISTINCT = 0.5  # of the answers; labels and constant answers point by accident
_WORD = re.compile(r"[^\W\d_]{3,}")  # numbers meet by accident


@dataclass(frozen=True)
class Alignment:
    """How often answers point at their own prompt; N rows."""

    rows: int
    linked: int  # answers that point at some prompt
    own: int  # of them, at their own
    by_chance: float  # expected of shuffled rows

    @property
    def is_whole(self) -> bool:
        """Far more own prompts than chance gives: five standard deviations."""
        return self.own > 0.2 * self.linked and self.own > self.by_chance + 5 * math.sqrt(self.by_chance + 1)

    @property
    def is_shuffled(self) -> bool:
        """Answers point at prompts, and at their own no more often than chance gives."""
        is_linked = self.linked >= max(LEAST_ROWS, MOST_LINKED * self.rows)
        return is_linked and self.own < 0.2 * self.linked and self.own <= self.by_chance + 2 * math.sqrt(self.by_chance)


def alignment_of(pairs: Sequence[tuple[str, str]]) -> Alignment | None:
    """Of (prompt, answer) texts; None where there are few, or most answers are alike."""
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
