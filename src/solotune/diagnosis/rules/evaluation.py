"""S9, the evaluation: F45 to F48; `leaks` has F43 and F44."""

from __future__ import annotations

import itertools
import math

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import is_ours, setting
from solotune.diagnosis.facts.row_arrays import MIN_ROWS
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.facts.row_labels import said_in_labels, said_in_training
from solotune.diagnosis.facts.step_size import lowest_and_last
from solotune.diagnosis.findings import Finding
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts, Trace

MOST = 0.5
"""Of the rows: labels of two kinds."""
LEAST_VALIDATION = 10
"""Rows below which the error bar is wider than most effects: per-row losses vary by about 0.5 nats, so 0.5 / sqrt(n)
is 0.16 for ten rows and 0.3 for three."""
MANY = 100
"""Training rows from which ten validation rows can be expected."""
DRIFT = 3.0
"""Ratio of median answer lengths; the two sides of a random split of 20 rows are within a factor of 2."""
RISE = 0.03
"""Nats by which held-out losses after the lowest are above it; also twice their own scatter, if known."""
FAR, BY_HEART = 0.65, 0.25
"""Share of the held-out loss: a training loss below this is memorised, if the held-out loss rises or stands still."""
MANY_EPOCHS = 8
"""Epochs after which rows can be memorised."""
ROUGH = 0.03
"""Of the held-out loss: changes from one evaluation to the next that are no rounding."""
STANDS = 0.99
"""Of the held-out loss in the middle of the run: it stands still from there."""
FEW_VALIDATION = 4
"""Rows that no split by our default leaves: 5 % of a hundred rows are five."""


@rule("F45", probes=("P8",))
def evaluated_in_training_mode(run_facts: RunFacts) -> list[Signal]:
    """F45: the evaluation runs in training mode, with dropout or noise.

    Sees: two evaluations of the same rows, without a step between them, that differ by more than rounding (probe P8).
    Why: the held-out loss is worse than the model and jumps; answers at temperature 0 are random.
    Not: kernels that add in a different order, which differ by a thousandth; F48, where other rows make the difference;
    NEFTune itself, whose noise is off in `eval()`.
    Fix: call `model.eval()` before the evaluation.
    Wrong when: dropout at evaluation is wanted (Monte Carlo dropout). Control: the same two evaluations in evaluation
    mode, which are equal.
    Source: Karpathy's recipe; 5.81 and 5.86 in training mode, 5.8793 both times in eval mode (measured).
    """
    return []  # only two evaluations show it: the probe makes the signal


@rule("F46", needs=("trace",))
def memorised(run_facts: RunFacts) -> Signal | None:
    """F46: the model memorises its training rows (overfitting).

    Sees: a held-out loss that rises after its lowest value, while the training loss keeps falling, far below it; or
    that no longer falls, while the training loss fell to a small part of it over many epochs.
    Why: the adapter stores the rows; answers are copies of them or repeat themselves.
    Not: F44 and F43, which hide the rise; F67, whose training loss rises too; F47, where the gap exists from the start
    and does not grow; F39, where a few different rows are repeated many times.
    Fix: lower `num_train_epochs`, or use the checkpoint with the lowest held-out loss.
    Wrong when: the model should memorise the rows. Control: the scatter of the held-out loss itself, and its fall: a
    deterministic task also ends near 0, on both sides.
    Source: "over-memorization": accuracy stays while the held-out perplexity rises.
    """
    trace = run_facts.trace
    held = trace.eval_loss_E[np.isfinite(trace.eval_loss_E)] if trace is not None else np.zeros(0)
    if trace is None or len(held) < 2 or not len(trace.loss_S):
        return None
    low, last, after = float(held.min()), float(held[-1]), held[int(held.argmin()) + 1 :]
    _, end = lowest_and_last(trace)
    if end <= 0:
        return None
    if not len(after) or (len(held) < 3 and end > BY_HEART * last):
        return _by_heart(run_facts, held, end)
    scatter = float(np.abs(np.diff(np.diff(held))).mean() / math.sqrt(6)) if len(held) >= 4 else 0.0
    rise = float(after.mean()) - low
    if rise < max(RISE, 0.02 * low, 2 * scatter) or end > FAR * last:
        return _by_heart(run_facts, held, end)
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


def _by_heart(run_facts: RunFacts, held: np.ndarray, end: float) -> Signal | None:
    """Many epochs after which only the training rows have a small loss: the held-out loss stands still, far above."""
    trace = run_facts.trace
    if trace is None or len(held) < 3 or not len(trace.epoch_S) or not np.nanmax(trace.epoch_S) >= MANY_EPOCHS:
        return None
    middle, last = float(held[len(held) // 2 - 1]), float(held[-1])
    if end > BY_HEART * last or last < STANDS * middle:
        return None
    epochs = float(np.nanmax(trace.epoch_S))
    says = f"after {epochs:.0f} epochs the training loss is {end:.3f}, and the held-out loss stands still at {last:.3f}"
    return Signal(
        "F46", "measured", says, 0.7, {"last": last, "training": end}, fix=f"num_train_epochs: {epochs / 2:.0f}"
    )


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
    Wrong when: all tokens are trained on, only answers are evaluated, and the gap is known. Control: the labels of both
    sides, row by row; another packing or length for the evaluation alone is a remark.
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
        affected=abs(shares[0] - shares[1]),
    )


@rule("F47")
def evaluated_by_other_settings(run_facts: RunFacts) -> list[Signal]:
    """F47, from the settings: packing, max_length or mask differ for the evaluation."""
    signals, get = [], run_facts.settings.get
    for key in ("packing", "max_length", "assistant_only_loss"):
        training, evaluation = get(key), get(f"eval_{key}")
        if training is not None and evaluation is not None and training != evaluation and not is_ours(run_facts):
            says = f"{key} is {training} for training and {evaluation} for evaluation"
            kind, weight = ("measured", 0.8) if key == "assistant_only_loss" else ("remark", 0.3)
            fix = f"use {key}: {training} for the evaluation too"
            signals.append(Signal("F47", kind, says, weight, {}, fix=fix, affected=1.0))
    return signals


@rule("F48", needs=("rows",))
def weak_validation(facts: RowFacts) -> Finding | None:
    """F48: there are too few held-out rows, or they are of another kind.

    Sees: at most four held-out rows with a hundred or more training rows; fewer than ten, and held-out answers three
    times as long or as short as in training, are a remark.
    Why: the loss of one row varies by half a nat, so three rows measure it to within 0.3: the held-out loss is mostly
    chance.
    Not: F45, where the same rows give different numbers; a small dataset, where no more rows can be held out.
    Fix: a larger `validation_size`.
    Wrong when: the validation file is another task on purpose. Control: our own default, which holds out 5 % of the
    rows and so never fewer than five of a hundred.
    Source: unsloth#2771 (a split of 487 to 3).
    """
    rows, many = (len(whole.rows) for whole in reversed(facts.whole))
    if 0 < rows < LEAST_VALIDATION and many >= MANY:
        wanted = max(2 * LEAST_VALIDATION, round(0.05 * (many + rows)))
        is_default = facts.settings.eval_dataset is None and rows > FEW_VALIDATION
        return Finding.of(
            "F48",
            "error" if rows <= FEW_VALIDATION else "info" if is_default else "warning",
            message=f"{rows} validation rows for {many:,} training rows: the held-out loss will be mostly chance.",
            evidence={"validation_rows": rows, "training_rows": many},
            fix=f"validation_size: {wanted}"
            if facts.settings.eval_dataset is None
            else "use an eval_dataset with more rows",
            affected=1.0,
            is_statistic=True,
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
        affected=1.0,
    )


@rule("F48", otherwise=True)
def few_validation_rows(run_facts: RunFacts) -> Signal | None:
    """F48, if only the number of rows is known."""
    rows, many = setting(run_facts, "validation_rows"), setting(run_facts, "train_rows")
    if rows is None or many is None or not 0 < rows < LEAST_VALIDATION or many < MANY:
        return None
    says = f"{rows:.0f} held-out rows for {many:,.0f} training rows"
    fix = f"validation_size: {max(20, round(0.05 * many))}"
    kind, weight = ("measured", 0.7) if rows <= FEW_VALIDATION else ("remark", 0.3)
    return Signal("F48", kind, says, weight, {"rows": rows}, fix=fix, affected=1.0)


@rule("F48", otherwise=True)
def rough_held_out_loss(run_facts: RunFacts) -> Signal | None:
    """F48, from the loss curve: the held-out loss varies by more than it changes over the run."""
    trace = run_facts.trace
    held = trace.eval_loss_E[np.isfinite(trace.eval_loss_E)] if trace is not None else np.zeros(0)
    if len(held) < 6:
        return None
    turns = np.diff(np.sign(np.diff(held)))
    rough = float(np.abs(np.diff(held, 2)).mean() / max(abs(held[0] - held[-1]), 1e-3))
    is_small = float(np.abs(np.diff(held, 2)).mean()) < ROUGH * abs(float(held.mean()))  # a run that has converged
    if (turns != 0).mean() <= 0.7 or rough <= 1 or is_small:
        return None
    says = "the held-out loss varies by more than it changes over the whole run"
    return Signal("F48", "curve", says, 0.4, {"rough": rough}, fix="a larger validation_size")
