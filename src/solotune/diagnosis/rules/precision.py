"""S11, numeric precision: F53 to F55."""

from __future__ import annotations

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import has_error, is_ours, lora_layers, setting
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

SAFE_RATE = 2e-4
"""At this learning rate an Adam step changes every element of a default A in bfloat16; at 1e-5 a quarter (computed)."""


@rule("F53", needs=("settings",))
def fp16_overflow(run_facts: RunFacts) -> Signal | None:
    """F53: activations overflow the range of float16, or trainable parameters are float16.

    Sees: float16 training, and one of: losses that are not finite or exactly zero; the error "Attempting to unscale
    FP16 gradients"; adapters in float16; as a weaker sign, a checkpoint that was trained in bfloat16.
    Why: the largest float16 number is 65,504. Models trained in bfloat16 have larger activations: inf, then NaN.
    Not: F67, whose loss is NaN in float32 at the same learning rate too.
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
    if trace is not None and len(trace.loss_S):
        bad = int((~np.isfinite(trace.loss_S)).sum() + (trace.loss_S == 0).sum())
        bad = max(
            bad, int(np.isinf(trace.grad_norm_S).sum() + (np.isnan(trace.grad_norm_S) & (trace.loss_S == 0)).sum())
        )
        if bad:
            says = f"{bad} of {len(trace.loss_S)} logged losses in float16 are not finite, or exactly zero"
            return Signal("F53", "measured", says, 0.85, {**numbers, "steps": bad}, fix=fix)
    if "adapter_dtype" in narrow or is_half(run_facts):
        return Signal("F53", "measured", "the adapters are float16", 0.8, numbers, fix=fix)
    dtype = run_facts.model_config.get("dtype") or run_facts.model_config.get("torch_dtype")
    if str(dtype).rpartition(".")[2] != "bfloat16":
        return None
    return Signal("F53", "measured", "a bfloat16 checkpoint is trained in float16", 0.55, numbers, fix=fix)


def is_half(run_facts: RunFacts) -> bool:
    """Whether the saved adapter is float16."""
    dtypes = {str(part.dtype) for parts in lora_layers(run_facts).values() for part in parts.values()}
    return dtypes == {"torch.float16"}


@rule("F54", probes=("P6",))
def updates_lost(run_facts: RunFacts) -> Signal | None:
    """F54: small updates are lost by rounding, because the adapters are bfloat16.

    Sees: adapters in bfloat16 with a learning rate below 2e-4. This is only a hint. Probe P6 decides by the share of
    elements whose stored value changes in one real step: 1.0 in float32, 0.4 to 0.6 if updates are lost.
    Why: bfloat16 has 8 bits of precision, so a step of 1/256 of the value or less changes nothing. Learning is slow,
    and the end of the schedule has no effect.
    Not: bfloat16 adapters at 2e-4 and above, which cost a few hundredths of a nat; F64, where every element changes;
    F57, whose gradients are zero; F66, whose learning rate is zero.
    Fix: keep the adapters in float32.
    Wrong when: the adapter was trained in float32 and only saved in bfloat16.
    Source: trl#7268, trl#1644, torchtune#2254; trl 1.16 casts the adapters of a 4-bit model to bfloat16 itself.
    """
    rate = setting(run_facts, "learning_rate")
    parts = [part for pair in lora_layers(run_facts).values() for part in pair.values()]
    saved = bool(parts) and all(str(part.dtype) == "torch.bfloat16" for part in parts)
    is_narrow = saved or str(run_facts.settings.get("adapter_dtype")).rpartition(".")[2] == "bfloat16"
    if is_ours(run_facts) or not is_narrow or rate is None or rate >= SAFE_RATE:
        return None
    says = f"the adapters are bfloat16, and steps of {rate:g} are too small to change many of their elements"
    weight = 0.6 if rate < SAFE_RATE / 4 else 0.35
    return Signal("F54", "measured", says, weight, {"learning_rate": rate}, fix="keep the adapters in float32")


@rule("F55", needs=("trace",))
def nan_hidden(run_facts: RunFacts) -> Signal | None:
    """F55: the log hides losses that are not finite.

    Sees: a finite logged loss together with a gradient norm or an evaluation that is not finite; losses that are
    exactly zero with gradients that are not finite.
    Why: `logging_nan_inf_filter` is on by default in transformers and logs the mean of the steps before: a smooth curve
    of a broken model.
    Not: the cause: F53, F67 or F25 makes the NaN; a log that shows the NaN.
    Fix: in transformers, `logging_nan_inf_filter: false`.
    Wrong when: a loss scaler skipped one step (as float16 training does at its start).
    Source: trl#6668; transformers' default.
    """
    trace, get = run_facts.trace, run_facts.settings.get
    if trace is None or get("logging_nan_inf_filter") is False or is_ours(run_facts):
        return None
    norm_bad = np.isinf(trace.grad_norm_S) | (np.isnan(trace.grad_norm_S) & np.isfinite(trace.grad_norm_S).any())
    hidden = int((np.isfinite(trace.loss_S) & norm_bad).sum())
    evals = int((~np.isfinite(trace.eval_loss_E)).sum()) if np.isfinite(trace.loss_S).all() else 0
    spared = 1 if get("fp16") else 0
    if hidden <= spared and not evals:
        return None
    says = f"{hidden} steps have a finite logged loss but a gradient that is not finite" if hidden > spared else ""
    says = says or f"{evals} evaluations are not finite, but every logged loss is"
    numbers = {"steps": hidden, "evaluations": evals}
    return Signal("F55", "measured", says, 0.85, numbers, fix="logging_nan_inf_filter: false (transformers)")
