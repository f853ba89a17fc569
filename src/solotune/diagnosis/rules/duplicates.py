"""S8, rows that are in the data many times: F39."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.conversations import answers_of, chats_of
from solotune.diagnosis.facts.derived import is_ours
from solotune.diagnosis.facts.row_arrays import MIN_ROWS, is_pattern, percent
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.facts.rows import examples_of
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

SOME = 0.05
"""One row in twenty."""
REPEATED = 0.3
"""Share of (near-)duplicates that is reported; data made from templates has many, so it is not a warning."""
HALF = 0.45
"""Share of copies of a file that was merged with itself, up to the rows that were held out."""
MANY_COPIES = 5.0
"""Of each row on average: so few different rows are memorised."""
LEAST_TOKENS = 6
"""Of an answer in free words: answers of fewer tokens are labels, which repeat naturally."""
REGULAR = 0.5
"""Variance of the number of copies by that of rows that are drawn at random (a Poisson distribution without zeros)."""
CHANCE = 1e-3
"""Of files of rows drawn at random that are as even."""
OFTEN, MOSTLY = 10, 0.5
"""Copies of one row in free words, and the share of the rows that such rows make up."""


class Copies(NamedTuple):
    """How often the rows of a file repeat."""

    rows: int
    again: int
    """rows that repeat an earlier one"""
    is_beyond_chance: bool
    is_whole_again: bool = False
    """The whole file repeats: every row is there as often as the others, two times or more."""

    @classmethod
    def of(cls, keys: Sequence[str | int], answers: Sequence[str | bytes], sizes: Sequence[int]) -> Copies:
        """Counts of equal keys; `answers` and their `sizes` in tokens or words, one for each row."""
        counts = np.array(list(Counter(keys).values()), float)
        again = len(keys) - len(counts)
        if not len(keys) or again < HALF * len(keys):
            return cls(len(keys), again, False)
        mean = len(keys) / len(counts)
        evenness = counts.var() / _variance_at_random(mean)
        is_regular = evenness < REGULAR and _as_even(evenness, len(counts)) < CHANCE
        is_free = len(set(answers)) > len(counts) / 2 and float(np.median(sizes)) >= LEAST_TOKENS
        often = float(counts[counts >= OFTEN].sum())  # a few rows are most of the data, the others are there once
        is_few = mean >= MANY_COPIES or often >= MOSTLY * len(keys)
        is_whole = (
            counts.min() >= 2
            and counts.max() - counts.min() <= max(mean >= MANY_COPIES, SOME * mean)
            and len(counts) >= MIN_ROWS
        )
        return cls(len(keys), again, bool(is_regular or (is_few and is_free)), bool(is_whole))


def _as_even(ratio: float, count: int) -> float:
    """The probability that the variance of `count` random numbers is at most this part of its mean (chi-square, by
    Wilson and Hilferty)."""
    scale = 2 / (9 * max(count - 1, 1))
    return 0.5 * math.erfc((1 - scale - ratio ** (1 / 3)) / math.sqrt(2 * scale))


def _variance_at_random(mean: float) -> float:
    """Of a Poisson distribution without zeros that has this mean."""
    rate = mean
    for _ in range(50):
        rate = mean * (1 - math.exp(-rate))
    return mean * (1 + rate - mean)


@rule("F39", needs=("rows",))
def duplicates(facts: RowFacts) -> Finding | None:
    """F39: the same rows are in the data many times.

    Sees: rows with equal ids, or equal chats, of which half or more are copies: every row the same number of times, as
    in a file that was merged with itself; so few different rows that each is there five times or more; a few rows that
    make up half of the data, ten times or more each.
    Why: these rows are memorised, the data has fewer different rows than it seems, and held-out rows have copies in
    training.
    Not: F46, many epochs over different rows; F41, where data loader workers repeat rows that are in the file once;
    fewer copies, rows of a template, short rows and labels, which repeat naturally: a remark or a note.
    Fix: remove duplicates before the split.
    Wrong when: rows are repeated to give them more weight; with dataset_exact_deduplication: false that is a note,
    unless every row is there equally often, which gives none more weight.
    Control: rows that are drawn at random from few different ones are there an uneven number of times.
    Source: common guides on deduplication.
    """
    train, report = facts.whole[0], facts.report
    order = np.argsort(train.hashes, kind="stable")
    same = np.sort(order[1:][train.hashes[order[1:]] == train.hashes[order[:-1]]])
    total = len(train.rows)
    evidence = {
        "equal_after_truncation": len(same),
        "copies_removed": report.num_exact_duplicates,
        "near_duplicates": report.num_near_duplicates,
        "rows": train.places(same),
    }
    if report.num_copies_kept:
        return _kept(facts, evidence)
    if is_pattern(len(same), total, SOME):
        side = facts.train
        learned = [row.input_ids[row.loss_mask].tobytes() for row in side.rows]
        known = Copies.of([int(one) for one in train.hashes], learned, side.num_labels.tolist())
        is_cut = bool(facts.is_cut(side).mean() >= HALF)  # equal beginnings of different rows
        return Finding.of(
            "F39",
            "error" if known.is_beyond_chance and not facts.is_sample and not is_cut else "warning",
            message=f"{len(same):,} of {total:,} rows have the same tokens as an earlier row.",
            evidence=evidence,
            fix=f"if only their beginnings are equal, raise max_length above {facts.settings.max_length}; "
            "else remove the copies from the data",
            affected=len(same) / total,
            is_statistic=True,
        )
    return _removed(facts, evidence)


def _kept(facts: RowFacts, evidence: dict[str, object]) -> Finding:
    """Copies that the config keeps. Some rows more often than others have more weight, on purpose; all rows equally
    often have none, and only make the epoch longer."""
    train, kept = facts.whole[0], facts.report.num_copies_kept
    known = Copies.of([int(one) for one in train.hashes], [b""] * len(train.rows), [0] * len(train.rows))
    is_fault = known.is_whole_again and not facts.is_sample and not bool(facts.is_cut(facts.train).mean() >= HALF)
    times = len(train.rows) / max(len(train.rows) - known.again, 1)
    return Finding.of(
        "F39",
        "error" if is_fault else "info",
        message=f"{kept:,} rows are exact copies of an earlier one, and were kept"
        + (f": every row is there {times:.0f} times, so that none has more weight than another." if is_fault else "."),
        evidence={**evidence, "copies_kept": kept},
        fix="remove dataset_exact_deduplication: false; for more passes over the rows, raise num_train_epochs"
        if is_fault
        else "nothing to do if they are meant; else remove dataset_exact_deduplication: false",
        affected=kept / len(train.rows),
        is_statistic=True,
    )


def _removed(facts: RowFacts, evidence: dict[str, object]) -> Finding | None:
    """Copies that solotune removed: harmless, unless so little is left that the file was not what it seemed."""
    report = facts.report
    whole = report.num_train + report.num_validation + report.num_exact_duplicates
    alike = report.num_exact_duplicates + report.num_near_duplicates
    if not is_pattern(alike, whole, REPEATED):
        return None
    left = whole - report.num_exact_duplicates
    learned = {row.input_ids[row.loss_mask].tobytes() for row in facts.train.rows}
    is_free = len(learned) > len(facts.train.rows) / 2 and float(np.median(facts.train.num_labels)) >= LEAST_TOKENS
    is_fault = whole >= MANY_COPIES * (left - report.num_validation * bool(facts.settings.eval_dataset)) and is_free
    return Finding.of(
        "F39",
        "error" if is_fault else "warning" if report.num_exact_duplicates >= whole / 2 else "info",
        message=f"{percent(alike, whole)} of the rows repeat an earlier one: {report.num_exact_duplicates:,} exactly "
        f"(removed) and {report.num_near_duplicates:,} nearly (kept, on one side of the split).",
        evidence=evidence,
        fix="nothing to do if the rows are made from a template; if copies are meant, set "
        "dataset_exact_deduplication: false or give the row a higher weight; else look for a file that was added twice",
        affected=alike / whole,
        is_statistic=True,
    )


@rule("F39")
def repeated_rows(run_facts: RunFacts) -> Signal | None:
    """F39, of rows that another trainer made, or of conversations that could not be rendered.

    The conversations are as they are in the file: a trainer that is not ours trains on the copies, too.
    """
    rows = examples_of(run_facts) if run_facts.train else []
    if rows and is_ours(run_facts):
        return None
    chats = chats_of(run_facts)
    if len(chats) > len(rows):
        answers = answers_of(chats)
        known = Copies.of([repr(chat) for chat in chats], answers, _sizes(run_facts, answers))
    else:
        learned = [row.input_ids[row.loss_mask] for row in rows]
        known = Copies.of(
            [hash(row.input_ids.tobytes()) for row in rows], [ids.tobytes() for ids in learned], list(map(len, learned))
        )
    if known.again < max(3, 0.2 * known.rows):
        return None
    says, affected = f"{known.again:,} of {known.rows:,} rows repeat an earlier one", known.again / known.rows
    kind, weight = ("measured", 0.8) if known.is_beyond_chance else ("remark", 0.3)
    fix = "in the data, remove duplicates before the split"
    return Signal("F39", kind, says, weight, {"again": known.again}, fix=fix, affected=affected)


def _sizes(run_facts: RunFacts, texts: Sequence[str]) -> list[int]:
    """Of texts, in tokens; without a tokenizer in words."""
    tokenizer = run_facts.tokenizer
    return [len(text.split()) if tokenizer is None else len(tokenizer.encode(text)) for text in texts]
