"""S11, numeric precision: F53 to F55."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import has_error, is_ours, is_scale_free, lora_layers, setting, shape_of
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts, Trace

if TYPE_CHECKING:
    import torch

SAFE_RATE = 2e-4
"""At this learning rate an Adam step changes every element of a default A in bfloat16; at 1e-5 a quarter (computed)."""
ROUNDS = 2**-8.5
"""bfloat16 loses a change of half a unit in the last place: 2^-8 to 2^-9 of the value."""
FEW = 0.1
"""Share of the elements of A that a step changes, below which nearly all is lost; at 1e-5 it is 0.12 for a width of
1,024, and more for wider models."""
SKIPS, SKIPPED = 5, 0.02
"""Steps at the start, and share of the later ones, that a loss scaler may skip while it looks for its factor."""
SAMPLE, LEVELS = 4096, 64
"""Elements that are read, and different values from which they are no constants."""
MEMORISED = 0.05
"""A loss below it may be logged as zero next: it is rounded."""


@rule("F53", needs=("settings",))
def fp16_overflow(run_facts: RunFacts) -> Signal | None:
    """F53: activations overflow the range of float16, or trainable parameters are float16.

    Sees: float16 training, and one of: losses that are not finite, or exactly zero after larger ones; more gradients
    that are not finite than a loss scaler makes; the error "Attempting to unscale FP16 gradients"; adapters that are
    trained in float16 with an epsilon of Adam that float16 rounds to zero, if no finite curve contradicts. A checkpoint
    that was trained in bfloat16, and adapters saved in float16, are remarks.
    Why: the largest float16 number is 65,504. Models trained in bfloat16 have larger activations: inf, then NaN.
    Not: F67, whose loss is NaN in float32 at the same learning rate too; steps that a loss scaler skips (up to 5 at the
    start, and 2 % later); a loss that is rounded to zero once all rows are memorised.
    Fix: `bf16: true` (in other tools also `fp16: false`), adapters in float32.
    Wrong when: the GPU has no bfloat16 (before Ampere): then use float32.
    Source: transformers#23165, Qwen-VL-Finetune#184, alignment-handbook#139.
    """
    fix = "bf16: true (in other tools also fp16: false)"
    if line := has_error(run_facts, r"unscale FP16 gradients"):
        return Signal("F53", "invariant", f"the run ended with this error: {line}", 0.95, {}, fix=fix)
    get = run_facts.settings.get
    narrow = [
        key for key in ("model_dtype", "adapter_dtype") if str(get(key)).rpartition(".")[2] in ("float16", "half")
    ]
    if get("fp16") is not True and not narrow:
        return None
    trace, numbers = run_facts.trace, {"fp16": get("fp16"), "float16": narrow}
    if trace is not None and (bad := overflows(trace)):
        says = f"{bad} of {len(trace.loss_S)} logged steps in float16 are not finite, or have a loss of exactly zero"
        share = bad / len(trace.loss_S)
        return Signal("F53", "measured", says, 0.85, {**numbers, "steps": bad}, fix=fix, affected=share)
    is_fine = trace is not None and len(trace.loss_S) >= 10
    epsilon = setting(run_facts, "adam_epsilon") or 1e-8
    if "adapter_dtype" in narrow and not is_fine and np.float16(epsilon) == 0 and is_scale_free(run_facts):
        says = f"the adapters are trained in float16, where Adam's epsilon {epsilon:g} is zero: it divides by zero"
        return Signal("F53", "invariant", says, 0.8, {**numbers, "epsilon": epsilon}, fix=fix)
    if "adapter_dtype" in narrow or is_half(run_facts):
        return Signal("F53", "remark", "the adapters are float16", 0.3, numbers, fix=fix)
    dtype = run_facts.model_config.get("dtype") or run_facts.model_config.get("torch_dtype")
    if str(dtype).rpartition(".")[2] != "bfloat16":
        return None
    return Signal("F53", "remark", "a bfloat16 checkpoint is trained in float16", 0.3, numbers, fix=fix)


def overflows(trace: Trace) -> int:
    """Logged steps with an overflow: a loss that is not finite, a zero after a larger one, gradients that are not
    finite beyond the steps that a loss scaler skips."""
    loss, norm = trace.loss_S, trace.grad_norm_S
    if not len(loss):
        return 0
    zero = np.flatnonzero(loss == 0)
    is_rounded = len(zero) > 0 and zero[0] > 0 and loss[zero[0] - 1] < MEMORISED
    lost = ~np.isfinite(loss) | ((loss == 0) & (not is_rounded))
    has_norms = bool(np.isfinite(norm).any())
    skipped = np.isinf(norm) | (np.isnan(norm) & has_norms)
    late = int(skipped[SKIPS:].sum())
    return max(int(lost.sum()), int(skipped.sum()) if late > max(1, SKIPPED * len(norm)) else 0)


def is_half(run_facts: RunFacts) -> bool:
    """Whether the saved adapter is float16."""
    dtypes = {str(part.dtype) for parts in lora_layers(run_facts).values() for part in parts.values()}
    return dtypes == {"torch.float16"}


@rule("F54", probes=("P6",))
def updates_lost(run_facts: RunFacts) -> Signal | None:
    """F54: small updates are lost by rounding, because the adapters are bfloat16.

    Sees: adapters in bfloat16, or whose saved values all are, and a learning rate at which a step changes less than a
    tenth of the elements of A, by the width of the model (1 / sqrt(inputs) is the size of an element, 1/256 of it what
    bfloat16 rounds). A rate below 2e-4 is a remark. Probe P6 decides by the share of elements whose stored value
    changes in one real step: 1.0 in float32, 0.4 to 0.6 if updates are lost.
    Why: bfloat16 has 8 bits of precision, so a step of 1/256 of the value or less changes nothing. Learning is slow,
    and the end of the schedule has no effect.
    Not: bfloat16 adapters at 2e-4 and above, which cost a few hundredths of a nat; adapters that were only saved in
    bfloat16; an optimizer that rounds at random or keeps a float32 copy; F64, where every element changes; F57, whose
    gradients are zero; F66, whose learning rate is zero.
    Fix: keep the adapters in float32.
    Wrong when: the adapter was trained in float32 and only saved in bfloat16.
    Source: trl#7268, trl#1644, torchtune#2254; trl 1.16 casts the adapters of a 4-bit model to bfloat16 itself.
    """
    rate, shape = setting(run_facts, "learning_rate"), shape_of(run_facts)
    is_narrow = str(run_facts.settings.get("adapter_dtype")).rpartition(".")[2] in ("bfloat16", "bf16")
    parts = [part for pair in lora_layers(run_facts).values() for part in pair.values()]
    is_saved = bool(parts) and all(map(_has_bfloat16_values, parts))
    if is_ours(run_facts) or rate is None or rate >= SAFE_RATE or not (is_narrow or is_saved):
        return None
    fix, share = "keep the adapters in float32", math.inf
    if shape and is_scale_free(run_facts):
        share = rate / ROUNDS * math.sqrt(shape["hidden"])
    numbers = {"learning_rate": rate, "share_changed": share}
    if (is_narrow or (is_saved and run_facts.trace is not None)) and share < FEW:
        says = f"the adapters {'are' if is_narrow else 'were saved as'} bfloat16: a step of {rate:g} changes about "
        says += f"{share:.0%} of the elements of A"
        return Signal("F54", "measured", says, 0.65, numbers, fix=fix, affected=1 - share)
    says = (
        f"the adapters are {'' if is_narrow else 'saved in '}bfloat16, where steps of {rate:g} may be lost by rounding"
    )
    return Signal("F54", "remark", says, 0.3, numbers, fix=fix)


def _has_bfloat16_values(part: torch.Tensor) -> bool:
    """Whether a tensor is bfloat16, or was: training in float32 fills the other bits."""
    import torch

    if part.dtype != torch.float32:
        return part.dtype == torch.bfloat16
    some = part.detach().flatten()[:SAMPLE]
    return len(torch.unique(some)) > LEVELS and torch.equal(some.bfloat16().float(), some)


@rule("F55", needs=("trace",))
def nan_hidden(run_facts: RunFacts) -> Signal | None:
    """F55: the log hides losses that are not finite.

    Sees: a finite logged loss together with a gradient norm or an evaluation that is not finite; losses that are
    exactly zero with gradients that are not finite.
    Why: `logging_nan_inf_filter` is on by default in transformers and logs the mean of the steps before: a smooth curve
    of a broken model.
    Not: the cause: F53, F67 or F25 makes the NaN; a log that shows the NaN.
    Fix: in transformers, `logging_nan_inf_filter: false`.
    Wrong when: a loss scaler skips more than 2 % of the steps and the run is fine.
    Source: trl#6668; transformers' default.
    """
    trace, get = run_facts.trace, run_facts.settings.get
    if trace is None or get("logging_nan_inf_filter") is False or is_ours(run_facts):
        return None
    norm_bad = np.isinf(trace.grad_norm_S) | (np.isnan(trace.grad_norm_S) & np.isfinite(trace.grad_norm_S).any())
    hidden = int((np.isfinite(trace.loss_S) & norm_bad).sum())
    evals = int((~np.isfinite(trace.eval_loss_E)).sum()) if np.isfinite(trace.loss_S).all() else 0
    spared = 0
    if get("fp16"):  # a loss scaler skips steps
        hidden, spared = int((np.isfinite(trace.loss_S) & norm_bad)[SKIPS:].sum()), max(1, int(SKIPPED * len(norm_bad)))
    if hidden <= spared and not evals:
        return None
    says = f"{hidden} steps have a finite logged loss but a gradient that is not finite" if hidden > spared else ""
    says = says or f"{evals} evaluations are not finite, but every logged loss is"
    numbers = {"steps": hidden, "evaluations": evals}
    share = hidden / len(trace.loss_S) if hidden > spared else evals / len(trace.eval_loss_E)
    fix = "logging_nan_inf_filter: false (transformers)"
    return Signal("F55", "measured", says, 0.85, numbers, fix=fix, affected=share)
