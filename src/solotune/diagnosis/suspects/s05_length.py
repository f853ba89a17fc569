"""S5, sequence length and truncation: F24 to F26."""

from __future__ import annotations

import numpy as np

from solotune.diagnosis.arithmetic import mapping, setting
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.rows import examples_of
from solotune.diagnosis.subject import Subject
from solotune.diagnosis.suspects import rule, taken_over

SOME = 0.05
"""One row in twenty."""
MUCH = 0.25
"""Of the rows: without these it is another training."""
SAME = 0.95
"""Share of uncut rows that begin with the same token, from which the beginning belongs to the format."""


@rule("F24", probes=("P12",))
def answers_cut(subject: Subject) -> list[Signal]:
    """F24: `max_length` cuts the ends off long answers.

    Sees: rows that fill `max_length` and whose last learned token is no end of turn; rows dropped for their length.
    Why: what is cut is not learned, nor the end of turn; beyond a few rows the model learns to ramble or to break off.
    Not: F10, which is in all rows, whatever their length (where every row is cut, the same evidence: both are named); a
    few long rows; `overflow: split`, where the next part goes on; F33, where TRL's packing cuts.
    Fix: a `max_length` with room for 95 % of the long rows, or `overflow: drop`.
    Wrong when: long answers are meant to be learned in part.
    Source: the total form is F25.
    """
    if mapping(subject.settings.get("sft")).get("packing"):
        return []  # F33: it is TRL's packing that cuts
    return taken_over(subject, "F24")


@rule("F25")
def prompt_fills_window(subject: Subject) -> list[Signal]:
    """F25: prompts fill `max_length`, and nothing of the answer is left to learn.

    Sees: rows that fill `max_length` without a label; rows that were dropped because their answer begins behind it;
    fewer rows out than in.
    Why: the loss is 0 or NaN; in trl 1.16 the rows are gone in silence.
    Not: F21 and F18, whose rows have no label at any length.
    Fix: a larger `max_length`.
    Wrong when: very long rows were to be left out.
    Source: trl#6668, trl#6671, unsloth#11333 (which confused it with F21), FederatedScope#625.
    """
    signals = taken_over(subject, "F25")
    read, left = setting(subject, "rows_in"), setting(subject, "rows_out")
    if not signals and read and left is not None and left < (1 - SOME) * read:
        says = f"of {read:,.0f} rows {left:,.0f} are left after truncation"
        kind, weight = ("invariant", 0.9) if left < (1 - MUCH) * read else ("measured", 0.6)
        signals.append(Signal("F25", kind, says, weight, {"in": read, "out": left}, fix="a larger max_length"))
    return signals


@rule("F26")
def prompt_cut(subject: Subject) -> Signal | None:
    """F26: long rows lose their beginning, so answers stand without their question.

    Sees: truncation set to the left and rows that are longer than the limit; rows at the limit that do not begin with
    the token that all shorter rows begin with, and that end as those do.
    Why: the answer is learned without what it answers: the first loss is 8 times as high.
    Not: F38, whose prompts are there; F09, where short rows lack the beginning too; F24, whose ends are cut.
    Fix: `truncation_mode: keep_start`, or rows that are too long dropped.
    Wrong when: the last turns of long chats are to be learned with what fits before them.
    Source: trl has deprecated `keep_end`.
    """
    get, rows = subject.settings.get, examples_of(subject)
    fix = "truncation_mode: keep_start (truncation_side: right), or drop the rows that are too long"
    lengths = np.array([len(row.input_ids) for row in rows])
    limit = setting(subject, "max_length") or (lengths.max() if len(lengths) else 0)
    full = lengths >= limit
    keeps_end = get("truncation_side") == "left" or get("truncation_mode") == "keep_end"
    if not len(rows) or full.sum() < max(3, SOME * len(rows)):
        return None
    first = np.array([row.input_ids[0] if len(row.input_ids) else -1 for row in rows])
    begins = expected_first(subject, first[~full])
    if begins is not None:
        lost = int((first[full] != begins).sum())
        if lost >= max(3, 0.5 * full.sum()) and _ends_alike(rows, full):
            says = f"{lost} of {int(full.sum())} rows at the limit of {int(limit)} tokens lack the beginning of a row"
            return Signal("F26", "invariant", says, 0.85, {"rows": lost, "limit": int(limit)}, fix=fix)
    if not keeps_end:
        return None
    says = f"{int(full.sum())} rows reach the limit of {int(limit)} tokens, and are cut at their beginning"
    return Signal("F26", "measured", says, 0.8, {"rows": int(full.sum())}, fix=fix)


def expected_first(subject: Subject, seen: np.ndarray) -> int | None:
    """The token that rows begin with: that of the shorter rows, or else the template's own."""
    if len(seen) >= 3:
        found, counts = np.unique(seen, return_counts=True)
        return int(found[counts.argmax()]) if counts.max() >= SAME * len(seen) else None
    tokenizer = subject.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        return None
    try:
        texts = [tokenizer.apply_chat_template([{"role": "user", "content": word}], tokenize=False) for word in "ab"]
    except Exception:  # a template may refuse anything, in its own words
        return None
    first = [tokenizer.encode(str(text), add_special_tokens=False)[:1] for text in texts]
    return first[0][0] if first[0] and first[0] == first[1] else None


def _ends_alike(rows: list, full: np.ndarray) -> bool:
    """Whether rows at the limit end with tokens that few endings share, as whole rows do."""
    last = np.array([row.input_ids[-1] for row, is_full in zip(rows, full, strict=True) if is_full])
    _, counts = np.unique(last, return_counts=True)
    return bool(counts.max() >= 0.8 * len(last))
