"""S9, the split and the evaluation: F43 to F48."""

from __future__ import annotations

import itertools
import math

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import is_ours, setting
from solotune.diagnosis.facts.row_arrays import MIN_ROWS, Side, is_pattern, percent
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.facts.row_labels import said_in_labels, said_in_training
from solotune.diagnosis.facts.step_size import lowest_and_last
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts, Trace

MOST = 0.5
"""A split counts as training rows if half of its rows are."""
SOME = 0.05
"""6 % of leaked rows raised a benchmark from 72 to 80 % (source: F44)."""
GRAM = 10
"""Length of a passage in tokens: eight English words, a usual length for finding overlaps."""
CONTAINED = 0.5
"""Share of a row's passages that training rows have too: half, as others use for 8-grams."""
LEAST_GRAMS = 16
"""Passages that a row needs (a sentence or two) for its share to be meaningful."""
COMMON = 3
"""A passage in more training rows than this belongs to the format or system prompt, and is not a leak."""
LEAST_VALIDATION = 10
"""Rows below which the error bar is wider than most effects: per-row losses vary by about 0.5 nats, so 0.5 / sqrt(n)
is 0.16 for ten rows and 0.3 for three."""
MANY = 100
"""Training rows from which ten validation rows can be expected."""
DRIFT = 3.0
"""Ratio of median answer lengths; the two sides of a random split of 20 rows are within a factor of 2."""
RISE = 0.03
"""Nats by which held-out losses after the lowest are above it; also twice their own scatter, if known."""
FAR = 0.65
"""Share of the held-out loss: a training loss below this is memorised."""


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
    return Signal("F43", "invariant", says, 0.9, {}, fix=fix)


@rule("F44", needs=("rows",))
def leaked_passages(facts: RowFacts) -> Finding | None:
    """F44: held-out rows have copies or near-copies in the training rows.

    Sees: held-out answers in which half of the passages of ten tokens also occur in one to three training rows.
    Why: memorised passages make the held-out loss too good: 6 % of leaked rows raised a score from 72 to 80.
    Not: F43, where all rows leak; F46, which needs the gap that this hides; boilerplate, which is in many rows; prompts
    and documents that rows share, which are not trained on.
    Fix: remove duplicates before the split, and set `split_by` to a column that rows of one source share.
    Wrong when: both sides quote the same source on purpose.
    Source: a report on MinHash decontamination (80.4 to 72 % after removing 6 % of rows; a secondary source).
    """
    rows, validation_grams = _grams(facts.validation)
    distinct, _ = _distinct(validation_grams)
    counts = np.zeros(len(distinct), np.int64)  # training rows that contain each passage
    for side in facts.stretches() if len(distinct) else ():
        of, grams = _grams(side)
        places = np.minimum(np.searchsorted(distinct, grams), len(distinct) - 1)
        is_shared = distinct[places] == grams
        once, _ = _distinct(of[is_shared] * len(distinct) + places[is_shared])  # a row counts once
        np.add.at(counts, once % len(distinct), 1)
    own, common = distinct[(counts > 0) & (counts <= COMMON)], distinct[counts > COMMON]
    leaked = []
    judged = 0
    rows, sizes = _distinct(rows)
    for row, grams in zip(
        rows, np.split(validation_grams, np.cumsum(sizes)[:-1]), strict=False
    ):  # split of none makes one
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
    return Finding.of(
        "F44",
        "warning",
        message=f"{len(leaked):,} of {total:,} validation rows ({percent(len(leaked), total)}) have answers of which "
        "at least half of the passages are also in training answers.",
        evidence={"rows_with": len(leaked), "rows_judged": judged, "rows": facts.validation.places(leaked)},
        fix="split_by: a column that rows of one source share (a document or conversation id)",
    )


def _grams(side: Side) -> tuple[np.ndarray, np.ndarray]:
    """Rows int64 (G,), ascending, and hashes uint64 (G,) of all runs of GRAM tokens that end in a label.

    The hash is a polynomial over 64 bits with overflow: two different runs have the same hash with probability 2**-64.
    """
    if len(side.ids) < GRAM:
        return np.zeros(0, np.int64), np.zeros(0, np.uint64)
    hashes = np.zeros(len(side.ids) - GRAM + 1, np.uint64)
    with np.errstate(over="ignore"):
        for offset in range(GRAM):
            hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + side.ids[offset : offset + len(hashes)].astype(np.uint64)
            hashes ^= hashes >> np.uint64(29)  # else small ids would cancel out
    begins = np.flatnonzero(side.loss_mask[GRAM - 1 :])
    rows = np.searchsorted(side.starts, begins, side="right") - 1
    is_inside = begins + GRAM <= side.starts[rows + 1]
    return rows[is_inside], hashes[begins[is_inside]]


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sorted distinct values and their counts; `np.unique` takes three times as long, because it hashes."""
    values = np.sort(values)
    begins = np.flatnonzero(np.concatenate((np.ones(min(len(values), 1), bool), values[1:] != values[:-1])))
    return values[begins], np.diff(begins, append=len(values))


def _is_in(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    if not len(ordered):
        return np.zeros(len(values), bool)
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values


@rule("F45", probes=("P8",))
def evaluated_in_training_mode(run_facts: RunFacts) -> list[Signal]:
    """F45: the evaluation runs in training mode, with dropout or noise.

    Sees: two evaluations of the same rows, without a step between them, that differ by more than rounding (probe P8).
    Why: the held-out loss is worse than the model and jumps; answers at temperature 0 are random.
    Not: kernels that add in a different order, which differ by a thousandth; F48, where other rows make the difference;
    NEFTune itself, whose noise is off in `eval()`.
    Fix: call `model.eval()` before the evaluation.
    Wrong when: dropout at evaluation is wanted (Monte Carlo dropout).
    Source: Karpathy's recipe; 5.81 and 5.86 in training mode, 5.8793 both times in eval mode (measured).
    """
    return []  # only two evaluations show it: the probe makes the signal


@rule("F46", needs=("trace",))
def memorised(run_facts: RunFacts) -> Signal | None:
    """F46: the model memorises its training rows (overfitting).

    Sees: a held-out loss that rises after its lowest value, while the training loss keeps falling, far below it.
    Why: the adapter stores the rows; answers are copies of them or repeat themselves.
    Not: F44 and F43, which hide the rise; F67, whose training loss rises too; F47, where the gap exists from the start
    and does not grow; F39, where a few different rows are repeated many times.
    Fix: lower `num_train_epochs`, or use the checkpoint with the lowest held-out loss.
    Wrong when: the model should memorise the rows.
    Source: "over-memorization": accuracy stays while the held-out perplexity rises.
    """
    trace = run_facts.trace
    held = trace.eval_loss_E[np.isfinite(trace.eval_loss_E)] if trace is not None else np.zeros(0)
    if trace is None or len(held) < 3 or not len(trace.loss_S):
        return None
    low, last, after = float(held.min()), float(held[-1]), held[int(held.argmin()) + 1 :]
    if not len(after):
        return None
    scatter = float(np.abs(np.diff(np.diff(held))).mean() / math.sqrt(6)) if len(held) >= 4 else 0.0
    _, end = lowest_and_last(trace)
    rise = float(after.mean()) - low
    if rise < max(RISE, 0.02 * low, 2 * scatter) or end > FAR * last or end <= 0:
        return None
    step = int(trace.eval_step_E[np.isfinite(trace.eval_loss_E)][held.argmin()])
    epochs = setting(run_facts, "num_train_epochs") or (float(trace.epoch_S[-1]) if len(trace.epoch_S) else None)
    says = (
        f"the held-out loss was lowest at step {step:,} ({low:.3f}) and is now {last:.3f}; the training loss: {end:.3f}"
    )
    weight = min(0.9, 0.65 + 0.5 * rise / max(low, 0.1))
    fix = (
        f"num_train_epochs: {max(1, round(epochs * step / max(trace.step_S[-1], 1)))}"
        if epochs
        else "a smaller num_train_epochs"
    )
    return Signal("F46", "measured", says, weight, {"lowest": low, "last": last, "training": end}, fix=fix)


@rule("F46", needs=("trace",))
def staircase(run_facts: RunFacts) -> Signal | None:
    """F46, from the training loss alone: it falls in steps at the start of each epoch."""
    trace = run_facts.trace
    drops = _drops_at_epochs(trace) if trace is not None else None
    if drops is None or len(drops) < 2 or min(drops) < 0.15:
        return None
    says = f"the training loss falls by {', '.join(f'{drop:.0%}' for drop in drops[:3])} at the start of an epoch"
    return Signal("F46", "curve", says, 0.4, {"drops": drops}, fix="a smaller num_train_epochs")


def _drops_at_epochs(trace: Trace) -> list[float] | None:
    """The share of the loss lost at the start of each epoch, minus its usual fall within the epoch."""
    epoch = np.floor(np.nan_to_num(trace.epoch_S) - 1e-9)
    has = np.isfinite(trace.loss_S)
    if not len(epoch) or not epoch.max() < len(epoch):  # a damaged log: every epoch has several steps
        return None
    parts = [trace.loss_S[has & (epoch == number)] for number in range(int(epoch.max()) + 1)]
    if len(parts) < 3 or min(map(len, parts)) < 6:
        return None
    drops = []
    for before, after in itertools.pairwise(parts):
        width = max(2, len(before) // 4)
        inside = abs(before[-2 * width : -width].mean() - before[-width:].mean())
        drops.append(
            float((before[-width:].mean() - after[:width].mean() - inside) / max(before[-width:].mean(), 1e-9))
        )
    return drops


@rule("F47", needs=("rows",), probes=("P1",))
def different_labels(facts: RowFacts) -> Finding | None:
    """F47: the training loss and the held-out loss count different kinds of tokens.

    Sees: prompts that count in the loss on one side and not on the other; a different packing, max_length or mask for
    the evaluation.
    Why: the two losses differ from the first step on, and no training closes the gap.
    Not: F46, whose gap grows; F48, where the rows differ.
    Fix: build the labels of both with the same function.
    Wrong when: all tokens are trained on, only answers are evaluated, and the gap is known.
    Source: trl's `eval_packing`.
    """
    prompted, _, judged = facts.once(said_in_training)
    other, _, other_judged = said_in_labels(facts, facts.validation)
    if min(judged, other_judged) < MIN_ROWS:
        return None
    shares = len(prompted) / judged, len(other) / other_judged
    if abs(shares[0] - shares[1]) < MOST or (facts.settings.assistant_only_loss and shares[0] > shares[1]):
        return None  # the second case is F20
    return Finding.of(
        "F47",
        "error",
        message="Training and held-out loss cannot be compared: prompts count in the loss in "
        f"{shares[0]:.0%} of the training rows and in {shares[1]:.0%} of the validation rows.",
        evidence={
            "training_rows_with_prompt": len(prompted),
            "training_rows_read": judged,
            "validation_rows_with_prompt": len(other),
            "validation_rows_read": other_judged,
            "rows": facts.validation.places(other or range(len(facts.validation.rows))),
        },
        fix="mask validation rows like training rows (`assistant_only_loss` applies to both)",
    )


@rule("F47")
def evaluated_by_other_settings(run_facts: RunFacts) -> list[Signal]:
    """F47, from the settings: packing, max_length or mask differ for the evaluation."""
    signals, get = [], run_facts.settings.get
    for key in ("packing", "max_length", "assistant_only_loss"):
        training, evaluation = get(key), get(f"eval_{key}")
        if training is not None and evaluation is not None and training != evaluation and not is_ours(run_facts):
            says = f"{key} is {training} for training and {evaluation} for evaluation"
            weight = 0.8 if key == "assistant_only_loss" else 0.5
            signals.append(
                Signal("F47", "measured", says, weight, {}, fix=f"use {key}: {training} for the evaluation too")
            )
    return signals


@rule("F48", needs=("rows",))
def weak_validation(facts: RowFacts) -> Finding | None:
    """F48: there are too few held-out rows, or they are of another kind.

    Sees: fewer than ten held-out rows with a hundred or more training rows; held-out answers three times as long or as
    short as in training.
    Why: the loss of one row varies by half a nat, so three rows measure it to within 0.3: the held-out loss is mostly
    chance.
    Not: F45, where the same rows give different numbers; a small dataset, where no more rows can be held out.
    Fix: a larger `validation_size`.
    Wrong when: the validation file is another task on purpose.
    Source: unsloth#2771 (a split of 487 to 3).
    """
    rows, many = (len(whole.rows) for whole in reversed(facts.whole))
    if 0 < rows < LEAST_VALIDATION and many >= MANY:
        wanted = max(2 * LEAST_VALIDATION, round(0.05 * (many + rows)))
        return Finding.of(
            "F48",
            "warning",
            message=f"{rows} validation rows for {many:,} training rows: the held-out loss will be mostly chance.",
            evidence={"validation_rows": rows, "training_rows": many},
            fix=f"validation_size: {wanted}"
            if facts.settings.eval_dataset is None
            else "use an eval_dataset with more rows",
        )
    if min(rows, many) < 2 * LEAST_VALIDATION:
        return None
    medians = [float(np.median(side.num_labels)) for side in (facts.train, facts.validation)]
    if min(medians) <= 0 or max(medians) < DRIFT * min(medians):
        return None
    return Finding.of(
        "F48",
        "warning",
        message=f"Validation rows are of another kind: their median number of loss tokens is {medians[1]:.0f}, that of "
        f"training rows {medians[0]:.0f}.",
        evidence={"median_training_labels": medians[0], "median_validation_labels": medians[1]},
        fix="hold out a random part instead (remove eval_dataset, validation_size: 0.05)"
        if facts.settings.eval_dataset is not None
        else "a larger validation_size; one group may be most of the held-out rows",
    )


@rule("F48", otherwise=True)
def few_validation_rows(run_facts: RunFacts) -> Signal | None:
    """F48, if only the number of rows is known."""
    rows, many = setting(run_facts, "validation_rows"), setting(run_facts, "train_rows")
    if rows is None or many is None or not 0 < rows < LEAST_VALIDATION or many < MANY:
        return None
    says = f"{rows:.0f} held-out rows for {many:,.0f} training rows"
    fix = f"validation_size: {max(20, round(0.05 * many))}"
    return Signal("F48", "measured", says, 0.7, {"rows": rows}, fix=fix)


@rule("F48", otherwise=True)
def rough_held_out_loss(run_facts: RunFacts) -> Signal | None:
    """F48, from the loss curve: the held-out loss varies by more than it changes over the run."""
    trace = run_facts.trace
    held = trace.eval_loss_E[np.isfinite(trace.eval_loss_E)] if trace is not None else np.zeros(0)
    if len(held) < 6:
        return None
    turns = np.diff(np.sign(np.diff(held)))
    rough = float(np.abs(np.diff(held, 2)).mean() / max(abs(held[0] - held[-1]), 1e-3))
    if (turns != 0).mean() <= 0.7 or rough <= 1:
        return None
    says = "the held-out loss varies by more than it changes over the whole run"
    return Signal("F48", "curve", says, 0.4, {"rough": rough}, fix="a larger validation_size")
