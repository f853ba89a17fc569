"""S8, the answers of the rows: F34 and F35.

`roles` has F36, `text` F37, `misaligned` F38, `duplicates` F39, `order` F40 to F42.

The second rule of a fault judges conversations that could not be rendered (no tokenizer, no model, roles that
`solotune data` refuses).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from solotune.dataset.chat.formats import EMPTY_ANSWER
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.conversations import answers_of, chats_of
from solotune.diagnosis.facts.row_arrays import MIN_ROWS, is_pattern, percent, squeezed
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

MOST = 0.5
"""The whole file, not some rows: severity error."""
SOME = 0.05
"""One row in twenty."""
FEW = 0.01
"""One row in a hundred: more than texts about the thing itself (placeholders)."""
ENOUGH_ROWS = 10
"""With fewer rows, the frequency of an answer means nothing."""
CONSTANT = 0.98
"""Share of one answer: 95 : 5 is normal with a rare class; two different rows in a hundred teach nothing."""
ALIKE = 0.25
"""Of the words of two answers, if they are classes in one sentence."""
CONSTANT_SENTENCE = 0.9
"""Share of one sentence, if the other answers are free texts."""
OVERUSED = 0.2
"""Share of one sentence among free texts: if it is one answer in five, it is boilerplate or a refusal."""
OVERUSED_LABEL = 0.5
"""The same for an answer of one to three words: `unanswerable` is a third of SQuAD 2."""

_EMPTY_CELLS = {"nan", "#n/a", "<na>"}
_EXPORTED = _EMPTY_CELLS | {"undefined"}
_PLACEHOLDERS = _EXPORTED | {"null", "none", "n/a", "[]", "{}", "todo", "tbd"}
LONG_ANSWER, EXTRACTED = 6, 0.2
"""Words of free answers beside which `none` is no extracted value, and its share from which it is no odd row."""


@rule("F34", needs=("rows",), probes=("P1",))
def empty_answers(facts: RowFacts) -> Finding | None:
    """F34: answers are empty, invisible, or a placeholder of the export.

    Sees: answers without a visible character; `nan` and the like among free texts; `none`, `...` and the like in a
    fifth of the rows or more, if the other answers are free texts of several words; rows that were dropped for this
    reason.
    Why: the model learns to answer with its end of turn at once; a batch of such rows has a NaN loss.
    Not: F25, whose answers exist before truncation; `none` as one class among a few; one or two odd rows; questions of
    a log that nobody answered, which are left out: up to a fifth of the rows is a remark.
    Fix: correct the export, or remove these rows.
    Wrong when: `null` is a real answer. Control: `none`, `n/a`, `{}` are what extraction finds where there is nothing,
    so they are a remark beside short answers; `nan`, `undefined` and `<na>` are written by programs only.
    Source: FederatedScope#625 (NaN), trl#1225; the first loss is 16 times the normal one (measured).
    """
    dropped = facts.dropped(EMPTY_ANSWER)
    invisible = [row for row, text in facts.answers if not any(c.isprintable() and not c.isspace() for c in text)]
    folded = [(row, text.strip().casefold()) for row, text in facts.answers]
    known = _Fillers.of([text for _, text in folded])
    unseen = set(invisible)
    filler = [row for row, text in folded if known.has(text) and row not in unseen]
    exported = known.exported
    found, total = dropped + len(invisible) + len(filler), len(folded) + len(facts.validation.rows) + dropped
    if not is_pattern(len(invisible) + len(filler), len(folded), FEW) and not is_pattern(dropped, total, SOME):
        return None
    return Finding.of(
        "F34",
        "error" if _are_lost(len(invisible) + exported, len(folded), dropped, total) else "warning",
        message=f"{found:,} of {total:,} rows ({percent(found, total)}) have an empty answer or a placeholder.",
        evidence={
            "dropped_as_empty": dropped,
            "invisible": len(invisible),
            "placeholders": len(filler),
            "rows": facts.train.places(invisible + filler),
        },
        fix="in the data, check the export of the answer column, or remove these rows",
        affected=found / total,
    )


class _Fillers(NamedTuple):
    """Which answers stand where there is none: placeholders, and answers without a letter or digit."""

    is_free: bool
    exported: int
    """Those that no person wrote: a program's words, or any filler beside long free texts, in many rows."""

    @classmethod
    def of(cls, folded: Sequence[str]) -> _Fillers:
        visible = [text for text in folded if any(c.isprintable() and not c.isspace() for c in text)]
        rest = [text for text in visible if not (text in _PLACEHOLDERS or _is_wordless(text))]
        is_free = bool(rest) and len(set(rest)) > MOST * len(rest)
        exported = sum(text in _EXPORTED for text in visible)
        fillers = len(visible) - len(rest)
        words = sorted(len(text.split()) for text in rest)
        is_text = is_free and words[len(words) // 2] >= LONG_ANSWER
        if is_text and is_pattern(fillers, len(folded), EXTRACTED):
            exported = fillers
        if not is_free:  # among labels, only what a table writes for an empty cell; among numbers it may be a result
            is_number = sum(any(c.isdigit() for c in text) for text in rest) > MOST * len(rest)
            exported = 0 if is_number or not rest else sum(text in _EMPTY_CELLS for text in visible)
        return cls(is_free, exported)

    def has(self, text: str) -> bool:
        is_cell = self.exported > 0 and text in _EMPTY_CELLS
        return is_cell or (self.is_free and (text in _PLACEHOLDERS or _is_wordless(text)))


def _is_wordless(text: str) -> bool:
    """Whether a text has signs of punctuation only; emoji and signs of mathematics may be answers."""
    return bool(text) and all(unicodedata.category(c)[0] in "PZC" for c in text)


def _are_lost(learned: int, answers: int, dropped: int, total: int) -> bool:
    """Whether empty answers are a fault: one in twenty that are trained on, or one in five that were left out."""
    return is_pattern(learned, answers, SOME) or is_pattern(dropped, total, OVERUSED)


@rule("F34", otherwise=True)
def chats_without_answers(run_facts: RunFacts) -> Signal | None:
    """F34, of conversations that could not be rendered."""
    answers = answers_of(chats_of(run_facts))
    empty = sum(not text.strip() for text in answers)
    empty += _Fillers.of([text.strip().casefold() for text in answers]).exported
    if not is_pattern(empty, len(answers), FEW):
        return None
    says = f"{empty:,} of {len(answers):,} answers are empty or a placeholder"
    fix = "in the data, remove the rows without an answer"
    kind, weight = ("invariant", 0.9) if is_pattern(empty, len(answers), SOME) else ("remark", 0.3)
    return Signal("F34", kind, says, weight, {"empty": empty}, fix=fix, affected=empty / len(answers))


@rule("F35", needs=("rows",), probes=("P10",))
def constant_answers(facts: RowFacts) -> Finding | None:
    """F35: nearly all answers are the same.

    Sees: one answer in all rows; one sentence in nine of ten rows, where the others are free texts.
    Why: the loss falls to almost zero, and the model gives this answer to every prompt.
    Not: F44 and F46, whose answers differ and are copied; F38, where answers differ and the prompts do not matter; a
    refusal or a short `unanswerable` in a part of the rows, which is a remark.
    Fix: remove or rebalance the repeated answer.
    Wrong when: the data has one class on purpose. Control: the other answers. If they are few classes too, the data has
    classes of which one is frequent (99 of 100 are no fraud), and the share of a class is no fault.
    Source: one answer for all rows: 1.88 in training, 6.46 held out (measured).
    """
    found = _constant([text for _, text in facts.answers])
    if found is None or not found.answer:  # empty: F34
        return None
    return Finding.of(
        "F35",
        "error" if found.is_fault else "warning",
        message=found.says + ".",
        evidence={
            "most_frequent": found.count,
            "answers": len(facts.answers),
            "distinct": found.distinct,
            "rows": facts.train.places([row for row, text in facts.answers if squeezed(text) == found.answer]),
        },
        fix="in the data, check that the answers come from the right column; if so, keep only some of these rows",
        affected=found.count / len(facts.answers),
        is_statistic=found.distinct > 1,
    )


@rule("F35", otherwise=True)
def chats_with_one_answer(run_facts: RunFacts) -> Signal | None:
    """F35, of conversations that could not be rendered."""
    answers = answers_of(chats_of(run_facts))
    found = _constant(answers)
    if found is None or not found.answer:
        return None
    kind, weight = ("measured", 0.8) if found.is_fault else ("remark", 0.3)
    fix, affected = "in the data, remove or rebalance the repeated answer", found.count / len(answers)
    return Signal("F35", kind, found.says, weight, {"count": found.count}, fix=fix, affected=affected)


class _Constant(NamedTuple):
    """The most frequent answer, if it is too frequent."""

    answer: str
    """squeezed"""
    count: int
    distinct: int
    is_fault: bool
    says: str


def _constant(texts: Sequence[str]) -> _Constant | None:
    if len(texts) < ENOUGH_ROWS:
        return None
    answers = [squeezed(text) for text in texts]
    counts = Counter(answers)
    top, count = counts.most_common(1)[0]
    rest = len(answers) - count
    shown = next(text for text, answer in zip(texts, answers, strict=True) if answer == top).strip()
    is_label = len(shown.split()) <= 3 and len(top) <= 20
    is_free = rest > 0 and len(counts) - 1 > MOST * rest
    share = count / len(answers)
    if share < CONSTANT and not (is_free and share >= (OVERUSED_LABEL if is_label else OVERUSED)):
        return None
    others = [_alike(text, shown) for text, answer in zip(texts, answers, strict=True) if answer != top]
    is_one_class = rest < MIN_ROWS and sum(others) > ALIKE * rest  # "It is in order." beside "It is suspicious."
    is_sentence = not is_label and share >= CONSTANT_SENTENCE and (is_free or rest < MIN_ROWS) and not is_one_class
    is_fault = (rest == 0 and count >= 2 * ENOUGH_ROWS) or is_sentence
    says = f"{count:,} of {len(answers):,} answers ({percent(count, len(answers))}) are the same: {shown[:60]!r}"
    return _Constant(top, count, len(counts), is_fault, says)


def _alike(text: str, other: str) -> float:
    """The share of words that two texts have in common."""
    a, b = (set(one.casefold().split()) for one in (text, other))
    return len(a & b) / max(len(a | b), 1)
