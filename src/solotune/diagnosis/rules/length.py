"""S5, sequence length and truncation: F24 to F26."""

from __future__ import annotations

import numpy as np

from solotune.dataset.data_report import ANSWER_PAST_MAX_LENGTH, LONGER_THAN_MAX_LENGTH
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import mapping, setting
from solotune.diagnosis.facts.rendered_chats import rendered
from solotune.diagnosis.facts.row_arrays import is_pattern, percent
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.facts.rows import examples_of
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

SOME = 0.05
"""One row in twenty: a few long rows are normal, and lose less than a twentieth of the labels."""
FEW = 0.01
"""One row in a hundred, for faults that should never happen."""
MOST = 0.5
"""From here the fault is of the whole data, not of some rows: severity error."""
MUCH = 0.25
"""Share of the rows without which the run is a different one."""
SAME = 0.95
"""Share of complete rows with the same first token, from which this token belongs to the format."""


def is_packed_by_trl(run_facts: RunFacts) -> bool:
    """Whether TRL's packing truncates the rows: F33."""
    return bool(mapping(run_facts.settings.get("sft")).get("packing"))


@rule("F24", needs=("rows",), probes=("P12",), unless=is_packed_by_trl)
def answers_cut(facts: RowFacts) -> Finding | None:
    """F24: long answers are truncated at `max_length`.

    Sees: rows that fill `max_length` and whose last loss token is not an end of turn; rows dropped because they are too
    long.
    Why: the truncated text and the end of turn are not trained on. If this happens in more than a few rows, the model
    learns to ramble or to stop in the middle.
    Not: F10, which is in all rows of any length (if every row is truncated, the evidence is the same and both are
    reported); a few long rows; `overflow: split`, where the next part continues; F33, where TRL's packing truncates.
    Fix: a `max_length` that is enough for 95 % of the long rows, or `overflow: drop`.
    Wrong when: long answers should be trained on in part.
    Source: the extreme form is F25.
    """
    side, dropped = facts.train, facts.dropped(LONGER_THAN_MAX_LENGTH)
    is_split = facts.settings.overflow == "split"
    rows = np.flatnonzero(facts.is_cut(side) & side.loss_mask[side.starts[1:] - 1] & (not is_split))
    total = len(side.rows) + dropped
    if not is_pattern(len(rows) + dropped, total, SOME):
        return None
    limit = facts.settings.max_length
    tokens = np.asarray(facts.report.labels.row_tokens)
    long = tokens[tokens > limit]
    wanted = int(-(-np.quantile(long, 0.95) // 64) * 64) if len(long) else 2 * limit
    lost = len(rows) + dropped
    return Finding.of(
        "F24",
        "error" if lost >= MOST * total else "warning",
        message=f"{lost:,} of {total:,} rows ({percent(lost, total)}) are "
        + (
            f"longer than max_length {limit} and dropped."
            if dropped > len(rows)
            else f"truncated at max_length {limit}, inside an answer."
        ),
        evidence={"answers_cut": len(rows), "dropped": dropped, "max_length": limit, "rows": side.places(rows)},
        fix=f"max_length: {wanted}"
        + (" (enough for 95 % of the long rows)" if len(long) else "")
        + ("" if dropped > len(rows) else ", or overflow: drop to drop these rows"),
    )


@rule("F25", needs=("rows",))
def prompt_fills_window(facts: RowFacts) -> Finding | None:
    """F25: prompts fill `max_length`, so nothing of the answer is left to train on.

    Sees: rows that fill `max_length` and have no label; rows that were dropped because their answer begins after it;
    fewer rows after truncation than before.
    Why: the loss is 0 or NaN; trl 1.16 drops such rows silently.
    Not: F21 and F18, whose rows have no label with any max_length.
    Fix: a larger `max_length`.
    Wrong when: very long rows should be left out.
    Source: trl#6668, trl#6671, unsloth#11333 (which confused it with F21), FederatedScope#625.
    """
    side, dropped = facts.train, facts.dropped(ANSWER_PAST_MAX_LENGTH)
    rows = np.flatnonzero((side.num_labels == 0) & facts.is_cut(side))
    total = len(side.rows) + len(facts.validation.rows) + dropped
    if not is_pattern(len(rows) + dropped, total, FEW):
        return None
    length, lost = facts.settings.max_length, len(rows) + dropped
    return Finding.of(
        "F25",
        "error" if lost >= MOST * total else "warning",
        message=f"{lost:,} of {total:,} rows ({percent(lost, total)}) have nothing to train on: their prompt "
        f"alone fills max_length ({length}).",
        evidence={
            "dropped": dropped,
            "rows_without_labels": len(rows),
            "max_length": length,
            "rows": side.places(rows),
        },
        fix=f"max_length: {2 * length} or more, or shorten the prompts of these rows",
    )


@rule("F25", otherwise=True)
def rows_gone_in_truncation(run_facts: RunFacts) -> Signal | None:
    """F25, of a trainer that counts its rows: fewer rows after truncation than before."""
    read, left = setting(run_facts, "rows_in"), setting(run_facts, "rows_out")
    if not read or left is None or left >= (1 - SOME) * read:
        return None
    says = f"only {left:,.0f} of {read:,.0f} rows are left after truncation"
    kind, weight = ("invariant", 0.9) if left < (1 - MUCH) * read else ("measured", 0.6)
    return Signal("F25", kind, says, weight, {"in": read, "out": left}, fix="a larger max_length")


@rule("F26")
def prompt_cut(run_facts: RunFacts) -> Signal | None:
    """F26: long rows are truncated at the start, so the answer has no question.

    Sees: left truncation and rows longer than the limit; rows at the limit that do not begin with the first token of
    all shorter rows, and that end like them.
    Why: the answer is trained on without its question: the first loss is 8 times as high.
    Not: F38, whose rows have prompts; F09, where short rows lack the beginning too; F24, where the ends are truncated.
    Fix: in TRL, `truncation_mode: keep_start`; or drop rows that are too long (in solotune: `overflow: drop`).
    Wrong when: the last turns of long chats should be trained on with as much context as fits.
    Source: trl has deprecated `keep_end`.
    """
    get, rows = run_facts.settings.get, examples_of(run_facts)
    fix = "truncate at the end (in TRL: truncation_mode: keep_start), or drop rows that are too long"
    lengths = np.array([len(row.input_ids) for row in rows])
    limit = setting(run_facts, "max_length") or (lengths.max() if len(lengths) else 0)
    full = lengths >= limit
    keeps_end = get("truncation_side") == "left" or get("truncation_mode") == "keep_end"
    if not len(rows) or full.sum() < max(3, SOME * len(rows)):
        return None
    first = np.array([row.input_ids[0] if len(row.input_ids) else -1 for row in rows])
    begins = expected_first(run_facts, first[~full])
    if begins is not None:
        lost = int((first[full] != begins).sum())
        if lost >= max(3, 0.5 * full.sum()) and _ends_alike(rows, full):
            says = f"{lost} of {int(full.sum())} rows at the limit of {int(limit)} tokens have lost their beginning"
            return Signal("F26", "invariant", says, 0.85, {"rows": lost, "limit": int(limit)}, fix=fix)
    if not keeps_end:
        return None
    says = f"{int(full.sum())} rows reach the limit of {int(limit)} tokens and are truncated at the start"
    return Signal("F26", "measured", says, 0.8, {"rows": int(full.sum())}, fix=fix)


def expected_first(run_facts: RunFacts, seen: np.ndarray) -> int | None:
    """The token that rows begin with: the first token of the shorter rows, or else of the template."""
    if len(seen) >= 3:
        found, counts = np.unique(seen, return_counts=True)
        return int(found[counts.argmax()]) if counts.max() >= SAME * len(seen) else None
    tokenizer = run_facts.tokenizer
    if tokenizer is None or not tokenizer.chat_template:
        return None
    texts = [rendered(run_facts, [{"role": "user", "content": word}]) for word in "ab"]
    first = [tokenizer.encode(text, add_special_tokens=False)[:1] for text in texts if text is not None]
    if len(first) < 2:
        return None
    return first[0][0] if first[0] and first[0] == first[1] else None


def _ends_alike(rows: list, full: np.ndarray) -> bool:
    """Whether rows at the limit share a few last tokens, as complete rows do."""
    last = np.array([row.input_ids[-1] for row, is_full in zip(rows, full, strict=True) if is_full])
    _, counts = np.unique(last, return_counts=True)
    return bool(counts.max() >= 0.8 * len(last))
