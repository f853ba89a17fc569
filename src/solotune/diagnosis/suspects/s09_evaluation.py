"""S9, the split and the evaluation: F43 to F48."""

from __future__ import annotations

import itertools
import math

import numpy as np

from solotune.diagnosis.arithmetic import is_ours, setting
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.subject import Subject, Trace
from solotune.diagnosis.suspects import rule, taken_over
from solotune.diagnosis.suspects.s13_schedule import lowest_and_last

RISE = 0.03
"""Nats by which held-out losses behind the lowest are above it, and twice their own scatter where that is known."""
FAR = 0.65
"""Of the held-out loss: a training loss below that is learned by heart."""


@rule("F43")
def evaluated_on_training(subject: Subject) -> list[Signal]:
    """F43: the evaluation's rows are training rows.

    Sees: held-out rows with the ids of training rows, half of them or more; the same file and split on both sides;
    held- out losses that follow the training loss to a hundredth although many passes were made.
    Why: the held-out loss is excellent and the answers are hollow: nothing shows memorising.
    Not: F44, a part of the rows; F46, which only a held-out loss can show, and which this hides.
    Fix: `validation_size: 0.05`, in groups.
    Wrong when: somebody else evaluates on other rows.
    Source: the walkthrough's article.
    """
    signals, get = taken_over(subject, "F43"), subject.settings.get
    fix = "remove eval_dataset, and validation_size: 0.05"
    ours, theirs = get("dataset"), get("eval_dataset")
    splits = get("dataset_split") or "train", get("eval_dataset_split") or "train"
    if not signals and ours and ours == theirs and splits[0] == splits[1]:
        says = f"training and evaluation read the same rows: {ours} {splits[0]}"
        signals.append(Signal("F43", "invariant", says, 0.9, {}, fix=fix))
    return signals


@rule("F44")
def leaked_passages(subject: Subject) -> list[Signal]:
    """F44: held-out rows have copies or near-copies among the training rows.

    Sees: held-out answers of which half of the passages of ten tokens stand in one to three training rows.
    Why: the held-out loss is too good by what was memorised: 6 % of leaked rows lifted a score from 72 to 80.
    Not: F43, where it is all rows; F46, which needs the gap that this hides; boilerplate, which is in many rows.
    Fix: duplicates removed before the split, and `split_by` a key that rows of one source share.
    Wrong when: both sides quote the same source on purpose.
    Source: a report on MinHash decontamination (80.4 to 72 % after removing 6 % of rows; secondary).
    """
    return taken_over(subject, "F44")


@rule("F45", probes=("P8",))
def evaluated_in_training_mode(subject: Subject) -> list[Signal]:
    """F45: the evaluation runs in training mode, with dropout or noise.

    Sees: two evaluations of the same rows without a step between them that differ by more than rounding (probe P8).
    Why: the held-out loss is worse than the model and jumps about; answers at temperature 0 are random.
    Not: kernels that add in another order, which differ by a thousandth; F48, where other rows make the difference;
    NEFTune itself, whose hook is inert in `eval()`.
    Fix: `model.eval()` before it.
    Wrong when: dropout at evaluation is meant (Monte Carlo dropout).
    Source: Karpathy's recipe; 5.81 and 5.86 instead of 5.8793 twice (measured).
    """
    return []  # nothing but running it twice shows it: the signal is the probe's


@rule("F46", needs=("trace",))
def memorised(subject: Subject) -> Signal | None:
    """F46: the training memorises its rows.

    Sees: a held-out loss that is higher after its lowest value, while the training loss goes on falling, far below it.
    Why: the adapter stores the rows; answers are copied or repeat themselves.
    Not: F44 and F43, which hide the rise; F67, whose training loss rises too; F47, where the gap is there from the
    beginning and does not grow; F39, where few different rows stand many times.
    Fix: fewer epochs, or the checkpoint of the lowest held-out loss.
    Wrong when: the rows are to be learned by heart.
    Source: "over-memorization": accuracy stays while the held-out perplexity rises.
    """
    trace = subject.trace
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
    epochs = setting(subject, "num_train_epochs") or (float(trace.epoch_S[-1]) if len(trace.epoch_S) else None)
    says = f"the held-out loss was lowest at step {step:,} ({low:.3f}) and is {last:.3f} now; training is at {end:.3f}"
    weight = min(0.9, 0.65 + 0.5 * rise / max(low, 0.1))
    fix = f"num_train_epochs: {max(1, round(epochs * step / max(trace.step_S[-1], 1)))}" if epochs else "fewer epochs"
    return Signal("F46", "measured", says, weight, {"lowest": low, "last": last, "training": end}, fix=fix)


@rule("F46", needs=("trace",))
def staircase(subject: Subject) -> Signal | None:
    """F46, of the training loss alone: it falls in steps where each pass begins."""
    trace = subject.trace
    drops = _drops_at_epochs(trace) if trace is not None else None
    if drops is None or len(drops) < 2 or min(drops) < 0.15:
        return None
    says = f"the training loss falls by {', '.join(f'{drop:.0%}' for drop in drops[:3])} where a new pass begins"
    return Signal("F46", "curve", says, 0.4, {"drops": drops}, fix="fewer epochs")


def _drops_at_epochs(trace: Trace) -> list[float] | None:
    """How much of its loss is gone at each epoch's first steps, beyond what it falls in the epoch's inside."""
    epoch = np.floor(np.nan_to_num(trace.epoch_S) - 1e-9)
    has = np.isfinite(trace.loss_S)
    parts = [trace.loss_S[has & (epoch == number)] for number in range(int(epoch.max()) + 1)] if len(epoch) else []
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


@rule("F47", probes=("P1",))
def different_labels(subject: Subject) -> list[Signal]:
    """F47: training and evaluation losses are not over the same kind of tokens.

    Sees: prompts that are learned on one side and not scored on the other; packing, length or mask set otherwise for
    the evaluation.
    Why: a gap between the two losses that is there from the first step and that no training closes.
    Not: F46, whose gap grows; F48, where the rows differ.
    Fix: one function that builds both.
    Wrong when: only answers are to be scored although all is learned, and the gap is known.
    Source: trl's `eval_packing`.
    """
    signals, get = taken_over(subject, "F47"), subject.settings.get
    for key in ("packing", "max_length", "assistant_only_loss"):
        mine, theirs = get(key), get(f"eval_{key}")
        if mine is not None and theirs is not None and mine != theirs and not is_ours(subject):
            says = f"{key} is {mine} for training and {theirs} for evaluation"
            weight = 0.8 if key == "assistant_only_loss" else 0.5
            signals.append(Signal("F47", "measured", says, weight, {}, fix=f"eval_{key}: {mine}"))
    return signals


@rule("F48")
def weak_validation(subject: Subject) -> list[Signal]:
    """F48: the held-out rows are too few, or of another kind, to show the difference.

    Sees: fewer than ten rows beside a hundred or more; answers three times as long or short as in training.
    Why: a loss per row scatters by half a nat, so three rows know it to 0.3: the held-out loss is chance.
    Not: F45, where the same rows give another number; a small data set, where more cannot be held out.
    Fix: a larger `validation_size`.
    Wrong when: the validation file is another task on purpose.
    Source: unsloth#2771 (a split of 487 to 3).
    """
    signals, trace = taken_over(subject, "F48"), subject.trace
    rows, many = setting(subject, "validation_rows"), setting(subject, "train_rows")
    if not signals and rows is not None and many is not None and 0 < rows < 10 and many >= 100:
        says = f"{rows:.0f} held-out rows beside {many:,.0f} training rows"
        fix = f"validation_size: {max(20, round(0.05 * many))}"
        signals.append(Signal("F48", "measured", says, 0.7, {"rows": rows}, fix=fix))
    held = trace.eval_loss_E[np.isfinite(trace.eval_loss_E)] if trace is not None else np.zeros(0)
    if not signals and len(held) >= 6:
        turns = np.diff(np.sign(np.diff(held)))
        rough = float(np.abs(np.diff(held, 2)).mean() / max(abs(held[0] - held[-1]), 1e-3))
        if (turns != 0).mean() > 0.7 and rough > 1:
            says = "the held-out loss goes up and down by more than it changes over the whole run"
            signals.append(Signal("F48", "curve", says, 0.4, {"rough": rough}, fix="a larger validation_size"))
    return signals
