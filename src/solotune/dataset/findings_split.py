"""Static rules on the two sides of the split (S9).

Every rule's docstring says: *Sees*, *Why* it matters, *Not* (its look-alikes, and what tells them apart), *Fix*, and
*Wrong when*.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from solotune.dataset.findings_facts import MIN_ROWS, Facts, Finding, Side, is_pattern, percent
from solotune.dataset.findings_labels import said_in_labels, said_in_training

MOST = 0.5
"""A split is on the training rows if half of it is."""
SOME = 0.05
"""6 % of leaked rows lifted a benchmark from 71 to 80 % (cited in the catalogue)."""
GRAM = 10
"""Tokens in a row: eight words of English, the length that overlaps are usually judged by."""
CONTAINED = 0.5
"""Share of a row's own passages that training has too: half, as for 8-grams elsewhere."""
LEAST_GRAMS = 16
"""Passages that a row needs of its own (a sentence or two), or its share says nothing."""
COMMON = 3
"""A passage in more training rows than that is the format's or the system prompt's, not a leak of one row."""
LEAST_VALIDATION = 10
"""Rows under which an error bar is wider than most effects: per-row losses differ by about 0.5 nats, so 0.5 / sqrt(n)
is 0.16 at ten rows and 0.3 at three."""
MANY = 100
"""Training rows from which ten rows for validation are not too much to ask."""
DRIFT = 3.0
"""Ratio of median answer lengths; the two sides of a random split of 20 rows are within a factor of 2."""

_S9 = partial(Finding, suspect="S9")


def evaluated_on_training(facts: Facts) -> Finding | None:
    """F43: validation rows are training rows, or there are none.

    Sees: rows with equal ids on both sides; no validation rows.
    Why: the held-out loss follows the training loss, and nothing shows memorising.
    Not: a part of the rows known (F44).
    Fix: let a part be held out.
    Wrong when: all rows are to be trained on and somebody else evaluates: hence only an info without rows.
    """
    train, validation = facts.whole
    rows, same = validation.rows, np.flatnonzero(np.isin(validation.hashes, train.hashes))
    evidence = {"validation_rows": len(rows), "also_in_training": len(same), "rows": validation.places(same)}
    if not rows:
        return _S9(
            "F43",
            "no-held-out-rows",
            severity="info",
            message="No rows are held out, so nothing will tell learning from memorising.",
            evidence=evidence,
            fix="validation_size: 0.05, or eval_dataset: a file of your own",
        )
    if not is_pattern(len(same), len(rows), MOST):
        return None
    return _S9(
        "F43",
        "evaluated-on-training",
        severity="error",
        message=f"{len(same):,} of {len(rows):,} validation rows are training rows.",
        evidence=evidence,
        fix="remove eval_dataset and let a part be held out (validation_size: 0.05), or remove its rows from dataset",
    )


def leaked_passages(facts: Facts) -> Finding | None:
    """F44: validation answers consist of passages that training has.

    Sees: for each validation row the share of the runs of ten tokens in its labels that occur in the labels of one to
    three training rows.
    Why: the held-out loss is too good by what was memorised. Rows that are equal or near-duplicates as a whole never
    get here (the split keeps them together, your own file is refused); this finds a long shared part of different
    rows: pieces of one conversation, one answer under many questions.
    Not: boilerplate of many answers (in more than three rows, so not counted); prompts, documents and tool definitions
    that rows share (not learned, so not looked at); short answers; rows of F43.
    Fix: groups.
    Wrong when: both sides quote the same source on purpose.
    """
    rows, asked = _grams(facts.validation)
    held, _ = _distinct(asked)
    counts = np.zeros(len(held), np.int64)  # training rows that each is in
    for side in facts.stretches() if len(held) else ():
        of, grams = _grams(side)
        places = np.minimum(np.searchsorted(held, grams), len(held) - 1)
        is_held = held[places] == grams
        once, _ = _distinct(of[is_held] * len(held) + places[is_held])  # a row counts once
        np.add.at(counts, once % len(held), 1)
    own, common = held[(counts > 0) & (counts <= COMMON)], held[counts > COMMON]
    leaked = []
    judged = 0
    rows, sizes = _distinct(rows)
    for row, grams in zip(rows, np.split(asked, np.cumsum(sizes)[:-1]), strict=False):  # of none, split makes one
        grams, _ = _distinct(grams)
        grams = grams[~_is_in(grams, common)]
        if len(grams) < LEAST_GRAMS:
            continue
        judged += 1
        if _is_in(grams, own).mean() >= CONTAINED:
            leaked.append(int(row))
    total = len(facts.validation.rows)
    if not is_pattern(len(leaked), total, SOME):
        return None
    return _S9(
        "F44",
        "leaked-passages",
        severity="warning",
        message=f"{len(leaked):,} of {total:,} validation rows ({percent(len(leaked), total)}) have answers that are "
        "made of passages of training answers, by half or more.",
        evidence={"rows_with": len(leaked), "rows_judged": judged, "rows": facts.validation.places(leaked)},
        fix="split_by: a key that rows of one source share (a document or conversation id)",
    )


def _grams(side: Side) -> tuple[np.ndarray, np.ndarray]:
    """int64 (G,) rows, ascending, and uint64 (G,) hashes of the runs of GRAM tokens that end in a label of them.

    A polynomial over 64 bits, wrapping: two different runs meet with probability 2**-64 each.
    """
    if len(side.ids) < GRAM:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    hashes = np.zeros(len(side.ids) - GRAM + 1, np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(GRAM):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + side.ids[offset : offset + len(hashes)].astype(np.uint64)
            hashes ^= hashes >> np.uint64(29)  # else small ids would cancel out
    begins = np.flatnonzero(side.supervised[GRAM - 1 :])
    rows = np.searchsorted(side.starts, begins, side="right") - 1
    is_inside = begins + GRAM <= side.starts[rows + 1]
    return rows[is_inside], hashes[begins[is_inside]]


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted, each once, and how often each occurs; `np.unique` hashes, which takes three times as long."""
    values = np.sort(values)
    begins = np.flatnonzero(np.concatenate((np.ones(min(len(values), 1), bool), values[1:] != values[:-1])))
    return values[begins], np.diff(begins, append=len(values))


def _is_in(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    if not len(ordered):
        return np.zeros(len(values), bool)
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values


def different_labels(facts: Facts) -> Finding | None:
    """F47: training and validation do not learn and score the same tokens.

    Sees: the share of rows whose prompt stands in the labels, on each side.
    Why: a constant gap between the two losses that no training closes.
    Not: prompts learned on both sides (F20, or as asked for); different rows with different lengths (F48).
    Fix: one way to build both.
    Wrong when: the sides differ in roles and not in masks.
    """
    prompted, _, judged = facts.once(said_in_training)
    other, _, other_judged = said_in_labels(facts, facts.validation)
    if min(judged, other_judged) < MIN_ROWS:
        return None
    shares = len(prompted) / judged, len(other) / other_judged
    if abs(shares[0] - shares[1]) < MOST or (facts.config.assistant_only_loss and shares[0] > shares[1]):
        return None  # the second: F20 says it
    return _S9(
        "F47",
        "different-labels",
        severity="error",
        message="The two losses are not comparable: prompts are learned in "
        f"{shares[0]:.0%} of the training rows and scored in {shares[1]:.0%} of the validation rows.",
        evidence={
            "training_rows_with_prompt": len(prompted),
            "training_rows_read": judged,
            "validation_rows_with_prompt": len(other),
            "validation_rows_read": other_judged,
            "rows": facts.validation.places(other or range(len(facts.validation.rows))),
        },
        fix="mask validation rows as training rows are (`assistant_only_loss` holds for both)",
    )


def weak_validation(facts: Facts) -> Finding | None:
    """F48: too few validation rows, or others than training has.

    Sees: fewer than ten rows beside a hundred or more; medians of supervised tokens per row that differ by a factor
    of three, with twenty rows or more on each side.
    Why: the held-out loss is noise, or of another task.
    Not: a small data set, where more cannot be held out.
    Fix: more rows, or a random part.
    Wrong when: the validation file is another task on purpose.
    """
    rows, many = (len(whole.rows) for whole in reversed(facts.whole))
    if 0 < rows < LEAST_VALIDATION and many >= MANY:
        wanted = max(2 * LEAST_VALIDATION, round(0.05 * (many + rows)))
        return _S9(
            "F48",
            "weak-validation",
            severity="warning",
            message=f"{rows} validation rows beside {many:,} training rows: the held-out loss will be mostly chance.",
            evidence={"validation_rows": rows, "training_rows": many},
            fix=f"validation_size: {wanted}" if facts.config.eval_dataset is None else "give eval_dataset more rows",
        )
    if min(rows, many) < 2 * LEAST_VALIDATION:
        return None
    medians = [float(np.median(side.num_labels)) for side in (facts.train, facts.validation)]
    if min(medians) <= 0 or max(medians) < DRIFT * min(medians):
        return None
    return _S9(
        "F48",
        "weak-validation",
        severity="warning",
        message=f"Validation rows are of another kind: half of them have more than {medians[1]:.0f} learned tokens, of "
        f"the training rows {medians[0]:.0f}.",
        evidence={"median_training_labels": medians[0], "median_validation_labels": medians[1]},
        fix="hold out a random part instead (remove eval_dataset, validation_size: 0.05)"
        if facts.config.eval_dataset is not None
        else "validation_size: a larger share; one group may make up most of the held-out rows",
    )


RULES = (evaluated_on_training, leaked_passages, different_labels, weak_validation)
