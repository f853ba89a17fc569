"""S9, held-out rows that are not held out: F43 and F44."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from solotune.dataset.split.holdout import CHANCE, probability_of_share
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.row_arrays import MIN_ROWS, evenly, is_pattern, percent
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.facts.rows import text_of
from solotune.diagnosis.facts.text_overlap import KnownTexts
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

if TYPE_CHECKING:
    from solotune.dataset import Example

MOST = 0.5
"""A split counts as training rows if half of its rows are."""
SOME = 0.05
"""6 % of leaked rows raised a benchmark from 72 to 80 % (source: F44)."""
CONTAINED = 0.5
"""Share of a row that a training row has too: half, as others use for 8-grams."""
SAME = 0.97
"""Share from which two rows are the same but for a letter."""
LEAST_PAIRS = 24
"""Pairs of words of a long passage: values that fill a template are fewer."""
LEAST_CONTROL = 20
"""Training rows of a control."""
NUM_HELD_OUT, NUM_COMPARED, NUM_CONTROL, NUM_IDS = 200, 10_000, 150, 512
"""Held-out rows and training rows that are compared, training rows for the control, and tokens of a row of ids."""


@rule("F43", needs=("rows",))
def evaluated_on_training(facts: RowFacts) -> Finding | None:
    """F43: the evaluation rows are training rows.

    Sees: held-out rows with the ids of training rows, at least half of them; the same file and split for both; held-out
    losses within a hundredth of the training loss after many epochs. If no rows are held out, a note says so; that is
    not a fault.
    Why: the held-out loss is excellent although the answers are poor: nothing shows overfitting.
    Not: F44, where only some of the rows leak; F46, which needs a real held-out loss to be seen, and which this hides.
    Fix: `validation_size: 0.05`, with `split_by` if rows belong to groups.
    Wrong when: the real evaluation is done elsewhere, on other rows.
    Source: the article behind examples/walkthrough.yaml.
    """
    train, validation = facts.whole
    rows, same = validation.rows, np.flatnonzero(np.isin(validation.hashes, train.hashes))
    evidence = {"validation_rows": len(rows), "also_in_training": len(same), "rows": validation.places(same)}
    if not rows:
        return Finding.of(
            "F43",
            "info",
            slug="no-held-out-rows",
            message="No rows are held out, so overfitting cannot be seen.",
            evidence=evidence,
            fix="validation_size: 0.05, or eval_dataset: a file with other rows",
        )
    if not is_pattern(len(same), len(rows), MOST):
        return None
    return Finding.of(
        "F43",
        "error",
        message=f"{len(same):,} of {len(rows):,} validation rows are training rows.",
        evidence=evidence,
        fix="remove eval_dataset and hold rows out (validation_size: 0.05), or remove its rows from dataset",
        affected=len(same) / len(rows),
    )


@rule("F43", otherwise=True)
def same_file_on_both_sides(run_facts: RunFacts) -> Signal | None:
    """F43, from the settings: training and evaluation read the same split of the same data."""
    get = run_facts.settings.get
    fix = "remove eval_dataset, and set validation_size: 0.05"
    ours, theirs = get("dataset"), get("eval_dataset")
    splits = get("dataset_split") or "train", get("eval_dataset_split") or "train"
    if not ours or ours != theirs or splits[0] != splits[1]:
        return None
    says = f"training and evaluation read the same rows: {ours} {splits[0]}"
    return Signal("F43", "invariant", says, 0.9, {}, fix=fix, affected=1.0)


@rule("F44", needs=("rows",))
def leaked_rows(facts: RowFacts) -> Finding | None:
    """F44: held-out rows have copies or near-copies in the training rows.

    Sees: held-out rows, or their answers, that are nearer to a training row than training rows are to each other; long
    passages, half of an answer or more, that only one to three training rows have. Case, spaces and punctuation do not
    count.
    Why: memorised passages make the held-out loss too good: 6 % of leaked rows raised a score from 72 to 80.
    Not: F43, where half of the rows leak or all; F46, which needs the gap that this hides; templates, classes, JSON
    and greetings, which all rows share; prompts and documents that rows share, which are not trained on.
    Fix: remove duplicates before the split, and set `split_by` to a column that rows of one source share.
    Wrong when: both sides quote the same source on purpose. Control: each training row against the other training
    rows: rows of a templated task are as near to each other as held-out rows are to them.
    Source: a report on MinHash decontamination (80.4 to 72 % after removing 6 % of rows; a secondary source).
    """
    train, validation = facts.whole
    if not validation.rows or not train.rows:
        return None
    held = evenly(range(len(validation.rows)), NUM_HELD_OUT)
    known = [train.rows[row] for row in evenly(range(len(train.rows)), NUM_COMPARED)]
    rows = [validation.rows[row] for row in held]
    copies = np.isin(validation.hashes[held], train.hashes)
    nearer, passages = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    for what, texts, others in zip(("answers", "rows"), _spoken(facts, rows), _spoken(facts, known), strict=True):
        one = KnownTexts(others)
        nearest, usual = one.nearest(texts), one.nearest_of_own(NUM_CONTROL)
        nearer |= _nearer_than_usual(nearest.shares, usual.shares)
        if what == "answers":  # a passage of the prompts is not trained on
            passages = (nearest.rare >= LEAST_PAIRS) & (nearest.rare >= CONTAINED * nearest.uncommon)
    leaked = np.flatnonzero(nearer | passages if is_pattern(int(passages.sum()), len(rows), SOME) else nearer)
    if not is_pattern(len(leaked), len(rows), SOME):
        return None
    return Finding.of(
        "F44",
        "error",
        message=f"{len(leaked):,} of {len(rows):,} validation rows ({percent(len(leaked), len(rows))}) are copies or "
        "near-copies of training rows, far nearer to them than training rows are to each other."
        if nearer.any()
        else f"{len(leaked):,} of {len(rows):,} validation rows ({percent(len(leaked), len(rows))}) have answers of "
        "which at least half is also in an answer of one to three training rows.",
        evidence={
            "rows_with": len(leaked),
            "rows_compared": len(rows),
            "equal_rows": int(copies.sum()),
            "rows": validation.places([held[row] for row in leaked]),
        },
        fix="split_by: a column that rows of one source share (a document or conversation id)"
        if facts.settings.eval_dataset is None
        else "eval_dataset: a file without the training rows, or remove these rows from it",
        affected=len(leaked) / len(rows),
        is_statistic=True,
    )


def _nearer_than_usual(shares: np.ndarray, usual: np.ndarray) -> np.ndarray:
    """bool, one per held-out row: nearer to its training row than training rows are to theirs; none if too few are.

    The bound lies above the 99th percentile of the training rows by half of its distance from their median, for rows
    of one task are spread widely. Then the count must be far above that of the training rows (Fisher's exact test).
    """
    usual, is_judged = usual[np.isfinite(usual)], np.isfinite(shares)
    if len(usual) < LEAST_CONTROL or is_judged.sum() < MIN_ROWS:
        return np.zeros(len(shares), bool)
    middle, top = np.quantile(usual, [0.5, 0.99])
    bound = max(CONTAINED, min(top + (top - middle) / 2, SAME))
    found = np.where(is_judged, shares, 0.0) >= bound
    hits, usual_hits = int(found.sum()), int((usual >= bound).sum())
    is_beyond = probability_of_share(hits, int(is_judged.sum()), usual_hits, len(usual)) < CHANCE
    return found & (is_beyond and is_pattern(int(found.sum()), len(shares), SOME))


def _spoken(facts: RowFacts, rows: Sequence[Example]) -> tuple[list[str], list[str]]:
    """The answers of some rows, and all that user and assistant say in them; of rows without a chat their tokens."""
    answers, whole = [], []
    for row in rows:
        if row.messages:
            said = [(m["role"], text_of(m.get("content"))) for m in row.messages if m["role"] in ("user", "assistant")]
            answers.append("\n".join(text for role, text in said if role == "assistant"))
            whole.append("\n".join(text for _, text in said))
        else:
            answers.append(facts.decode(row.input_ids[row.loss_mask][:NUM_IDS]))
            whole.append(facts.decode(row.input_ids[:NUM_IDS]))
    return answers, whole
