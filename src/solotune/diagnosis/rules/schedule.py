"""S13, the optimizer and the learning-rate schedule: F64 to F70."""

from __future__ import annotations

import math

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import (
    has_error,
    is_lora,
    is_ours,
    is_scale_free,
    lora_layers,
    out_of_memory,
    planned_steps,
    setting,
    shape_of,
    warmup_steps,
)
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts, Trace

LOW_RATE = 3e-5
"""The best learning rates of LoRA are some ten times those of full fine-tuning (LoRA Without Regret), such as 2e-5."""
HIGH_RATE = 5e-3
"""Ten times the highest learning rate of recipes for adapters, for a hidden size of at least 1,000. Narrower models
allow higher rates, about in proportion: one with hidden size 128 was trained at 6e-3 without harm."""
NOTHING = 1e-4
"""Share of the peak: cosine falls below it only in the last hundredth of a run, which is no early end."""
SPIKE = 50
"""Largest gradient norm / median: 13 in clean runs, 84 at ten times the learning rate, 764 at fifty times."""
DECAYED = 5.0
"""Sum of learning rate x decay over the run: 2 cost 0.19 nats, 20 cost 2.2."""


@rule("F64", needs=("settings",), probes=("P7",))
def rate_too_low(run_facts: RunFacts) -> Signal | None:
    """F64: the learning rate is too low.

    Sees: a learning rate for full fine-tuning, used for adapters. This is only a hint. The range test decides: at ten
    times the learning rate one batch is learned clearly better.
    Why: the loss falls slowly and steadily, and the run ends on a plateau ("2.4").
    Not: F54, where updates are lost by rounding (fewer elements change in a step); F61, where alpha / r is small (the
    evidence is the same: both are reported); F62, where no learning rate fits the batch; F65 and F66, where the log
    never shows the learning rate of the config; F38, where prompts do not help.
    Fix: `learning_rate: 2e-4`.
    Wrong when: the adapter continues a run that was nearly finished.
    Source: LoRA Without Regret (the best learning rate is some 10 times that of full fine-tuning); TRL's default is
    2e-5.
    """
    rate = setting(run_facts, "learning_rate")
    if rate is None or rate > LOW_RATE or not is_lora(run_facts):
        return None
    weight = min(0.7, 0.4 + 0.15 * math.log10(LOW_RATE / max(rate, 1e-12)))
    says = f"learning_rate {rate:g} is one for full fine-tuning; adapters usually need 1e-4 to 5e-4"
    return Signal("F64", "measured", says, weight, {"learning_rate": rate}, fix="learning_rate: 2e-4")


@rule("F65", needs=("settings",))
def warmup_past_the_end(run_facts: RunFacts) -> Signal | None:
    """F65: the warm-up lasts longer than the run, or most of it.

    Sees: more warm-up steps than half of the planned steps.
    Why: the learning rate reaches its peak only at the end or never, so the loss flattens early.
    Not: F64, where the learning rate reaches its peak, which is too low; F66, where it falls too early.
    Fix: `warmup_ratio: 0.03`, and `warmup_steps: 0` if it is set.
    Wrong when: the rest of the run follows later, from a checkpoint.
    Source: CAIL2020#1, prime-rl#968; transformers 5 reads `warmup_steps` below 1 as a share.
    """
    warmup, total = warmup_steps(run_facts), planned_steps(run_facts)
    if run_facts.settings.get("lr_scheduler_type") == "constant" or not warmup or not total or warmup <= total / 2:
        return None
    says = f"the warm-up takes {warmup:,.0f} of the {total:,} steps of the run"
    return Signal("F65", "invariant", says, 0.95, {"warmup_steps": warmup, "steps": total}, fix=_warmup_fix(run_facts))


@rule("F65", needs=("trace",))
def rises_to_the_end(run_facts: RunFacts) -> Signal | None:
    """F65, from the log: the learning rate still rises in the second half of the run."""
    known = _rates(run_facts)
    if known is None:
        return None
    step, rate, total = known
    top = int(np.argmax(rate))
    is_rising = top >= len(rate) - 2 and bool((np.diff(rate[: top + 1]) > 0).all())
    if not is_rising or len(rate) < 4 or step[-1] < 0.6 * total:
        return None
    configured = setting(run_facts, "learning_rate")
    says = f"the logged learning rate still rises at step {step[-1]:,} of {total:,}"
    says += f" and is {rate[-1] / configured:.0%} of the configured {configured:g}" if configured else ""
    return Signal(
        "F65", "invariant", says, 0.9, {"last_rate": float(rate[-1]), "asked": configured}, fix=_warmup_fix(run_facts)
    )


def _warmup_fix(run_facts: RunFacts) -> str:
    has_steps = (setting(run_facts, "warmup_steps") or 0) >= 1
    return "warmup_steps: 0, warmup_ratio: 0.03" if has_steps else "warmup_ratio: 0.03"


@rule("F66", needs=("trace",))
def schedule_of_another_length(run_facts: RunFacts) -> Signal | None:
    """F66: the learning-rate schedule is made for a different number of steps than the run has.

    Sees: a logged learning rate of zero (below 1/10,000 of its peak) for more than a twentieth of the run, after the
    peak; a schedule that should decay to zero and is above half of its peak at the last step; a learning rate that
    rises after its lowest point in the same way as it fell, as a cosine past its end does.
    Why: with a learning rate of zero nothing is learned; without the decay the end of the run stays noisy.
    Not: F54, whose learning rate is above zero; F65, whose learning rate still rises; a run that was stopped early;
    schedules with a minimum or without decay.
    Fix: let the trainer compute the number of steps, after gradient accumulation.
    Wrong when: several schedules follow each other on purpose.
    Source: transformers#671, CAIL2020#1 (divided by gradient accumulation twice).
    """
    known = _rates(run_facts)
    if known is None:
        return None
    step, rate, total = known
    top = int(np.argmax(rate))
    dead = np.flatnonzero(rate[top:] <= NOTHING * rate[top]) + top
    numbers = {"steps": total, "peak": float(rate[top]), "peak_step": int(step[top]), "last": float(rate[-1])}
    if len(dead) >= 2 and step[-1] - step[dead[0]] > 0.05 * total:
        says = f"the logged learning rate is zero from step {step[dead[0]]:,} of {total:,} on"
        return Signal(
            "F66", "invariant", says, 0.95, {**numbers, "zero_from": int(step[dead[0]])}, fix=_length_fix(total)
        )
    if (turn := mirrored_from(step, rate)) is not None:
        says = f"the logged learning rate is lowest at step {turn:,} and then rises as it fell: the schedule is for "
        says += f"{turn:,} steps, but the run has {total:,}"
        return Signal("F66", "invariant", says, 0.95, {**numbers, "zero_from": turn}, fix=_length_fix(total))
    decays = str(run_facts.settings.get("lr_scheduler_type")) in ("cosine", "linear")
    is_over = step[-1] >= 0.98 * total and len(rate) >= 4 and top < len(rate) - 2
    if decays and is_over and rate[-1] > 0.5 * rate[top]:
        says = (
            f"the run ends at {rate[-1] / rate[top]:.0%} of the peak learning rate, but the schedule should end at zero"
        )
        return Signal("F66", "measured", says, 0.7, numbers, fix=_length_fix(total))
    return None


def mirrored_from(step: np.ndarray, rate: np.ndarray) -> int | None:
    """The step from which the learning rate mirrors its values before it: a cosine that ran past its end.

    A resume or a restart jumps; this one passes its lowest point without a jump.
    """
    change = np.diff(rate)
    fell = np.flatnonzero(change < 0)
    if not len(fell):
        return None
    top = int(fell[0])  # the end of the warm-up
    rises = np.flatnonzero(change[top:] > 0)
    low = top + int(rises[0]) if len(rises) else top
    after = step > step[low]
    if low - top < 2 or after.sum() < 2 or rate[low] > 0.05 * rate[top]:
        return None
    for turn in np.linspace(step[low - 1], step[low + 1], 41):  # it may be between two logged steps
        seen = after & (2 * turn - step >= step[top])  # before that there was the warm-up
        before = np.interp(2 * turn - step[seen], step[top : low + 1], rate[top : low + 1])
        if seen.sum() >= 2 and np.abs(before - rate[seen]).max() < 0.03 * rate[top]:
            return round(float(turn))
    return None


def _length_fix(total: int) -> str:
    return f"make the schedule for the {total:,} steps of the run (num_training_steps={total})"


def _rates(run_facts: RunFacts) -> tuple[np.ndarray, np.ndarray, int] | None:
    """(steps, learning rates, all steps), if learning rates were logged and the planned length is known."""
    trace, total = run_facts.trace, planned_steps(run_facts)
    if trace is None or not len(trace.step_S) or (total is None and not trace.is_finished):
        return None
    has = np.isfinite(trace.learning_rate_S)
    step, rate = trace.step_S[has], trace.learning_rate_S[has]
    if len(rate) < 3 or rate.max() <= 0:
        return None
    return step, rate, int(total or step[-1])


@rule("F67", needs=("settings",), probes=("P7",))
def rate_too_high(run_facts: RunFacts) -> Signal | None:
    """F67: the learning rate is too high.

    Sees: a learning rate far above any recipe; a gradient norm above fifty times the median, with a loss that ends
    clearly above its lowest part; losses that end in NaN in float32 or bfloat16. The range test decides: at a tenth of
    the learning rate one batch is learned clearly better.
    Why: the loss jumps, then stays on a high plateau or is NaN, and answers repeat themselves.
    Not: F53 (finite in float32 at the same learning rate); F61 with a large alpha / r (the evidence is the same: both
    are reported); F37 and F42, where one batch causes the spike again after a resume; F77, whose jump is where the run
    was resumed.
    Fix: a tenth of the present `learning_rate`; 2e-4 is a usual value.
    Wrong when: the optimizer needs other learning rates (SGD).
    Source: measured (a plateau at 4.7 with fifty times the learning rate).
    """
    rate = setting(run_facts, "learning_rate")
    shape = shape_of(run_facts)
    high = HIGH_RATE * max(1.0, 1024 / shape["hidden"]) if shape else 4 * HIGH_RATE
    if rate is None or rate < high or not is_lora(run_facts) or not is_scale_free(run_facts):
        return None
    weight = min(0.8, 0.35 + 0.3 * math.log10(rate / high))
    return Signal("F67", "measured", f"learning_rate {rate:g} is far above those usual for adapters", weight,
                  {"learning_rate": rate}, fix="learning_rate: 2e-4")  # fmt: skip


@rule("F67", needs=("trace",))
def diverged(run_facts: RunFacts) -> Signal | None:
    """F67, from the log: gradients jump, and the loss stays high after that."""
    trace = run_facts.trace
    if trace is None or len(trace.loss_S) < 8 or trace.seams:
        return None
    rate = setting(run_facts, "learning_rate")
    fix = f"learning_rate: {rate / 10:g}" if rate else "a tenth of the present learning_rate"
    finite = np.isfinite(trace.loss_S)
    if finite[: len(finite) // 2].any() and not finite[-1] and not run_facts.settings.get("fp16"):
        first = int(trace.step_S[np.flatnonzero(~finite)[0]])
        says = f"the loss is not finite from step {first:,} on"
        return Signal("F67", "measured", says, 0.5, {"from_step": first}, fix=fix)
    low, end = lowest_and_last(trace)
    norms = trace.grad_norm_S[np.isfinite(trace.grad_norm_S)]
    spike = float(norms.max() / np.median(norms)) if len(norms) >= 8 and np.median(norms) > 0 else 0.0
    if end < 1.15 * low + 0.05 or (spike < SPIKE and end < 1.5 * low + 0.5):
        return None
    says = f"the loss ends at {end:.2f}, after it had reached {low:.2f}"
    says += f"; the largest gradient norm is {spike:.0f} times the median" if spike else ""
    return Signal("F67", "measured", says, 0.65, {"lowest": low, "last": end, "spike": spike}, fix=fix)


def lowest_and_last(trace: Trace) -> tuple[float, float]:
    """The lowest mean loss over a tenth of the logged steps, and that of the last tenth."""
    losses = trace.loss_S[np.isfinite(trace.loss_S)]
    width = max(3, len(losses) // 10)
    if len(losses) < width:
        return 0.0, 0.0
    means = np.convolve(losses, np.ones(width) / width, mode="valid")
    return float(means.min()), float(means[-1])


@rule("F68", needs=("settings",))
def clipped_to_nothing(run_facts: RunFacts) -> Signal | None:
    """F68: gradients are clipped to almost zero.

    Sees: a limit at which an average element of the clipped gradient is at most Adam's epsilon; or, with an optimizer
    whose step grows with the gradient (SGD), a limit far below the median gradient norm.
    Why: the loss falls slowly, as with a tiny learning rate.
    Not: a small limit with Adam or similar, which divide by the size of the gradient: 1e-4 gives the same loss as 1.0.
    Fix: `max_grad_norm: 1.0`.
    Wrong when: the learning rate of SGD was raised to compensate.
    Source: measured (1e-8 with AdamW: 6.82 instead of 1.64; 1e-4 with SGD: 7.30 instead of 2.54).
    """
    clip = setting(run_facts, "max_grad_norm")
    if clip is None or clip <= 0:  # 0: not clipped
        return None
    fix, numbers = "max_grad_norm: 1.0", {"max_grad_norm": clip}
    if is_scale_free(run_facts):
        epsilon = setting(run_facts, "adam_epsilon") or 1e-8
        count = sum(part.numel() for parts in lora_layers(run_facts).values() for part in parts.values()) or 10_000
        element = clip / math.sqrt(count)
        if element > epsilon:
            return None
        says = (
            f"gradients are clipped to {clip:g}: an element is then {element:.1g}, not above Adam's epsilon {epsilon:g}"
        )
        return Signal("F68", "invariant", says, 0.9, {**numbers, "element": element, "epsilon": epsilon}, fix=fix)
    norms = run_facts.trace.grad_norm_S if run_facts.trace else np.zeros(0)
    norms = norms[np.isfinite(norms)]
    median = float(np.median(norms)) if len(norms) else 0.3  # a usual gradient norm of adapters
    if clip > 0.02 * median:
        return None
    says = f"gradients of norm {median:.2g} are clipped to {clip:g}, which makes this optimizer's steps smaller"
    return Signal("F68", "measured", says, 0.85, {**numbers, "median_norm": median}, fix=fix)


@rule("F69", needs=("settings",))
def decay_too_large(run_facts: RunFacts) -> Signal | None:
    """F69: weight decay pulls the adapters back to zero.

    Sees: a sum of learning rate x decay over the run above 5: what was learned at the start is multiplied by e^-5.
    Why: the adapters shrink, the loss stops falling, and the adapter changes the model less and less.
    Not: a decay of 0.1, or even 10 at a learning rate of 2e-3 over 200 steps, which does almost no harm; F64, whose
    adapters grow.
    Fix: `weight_decay: 0.0`.
    Wrong when: the optimizer does not decouple weight decay (Adam with L2).
    Source: measured (sum 2: 0.19 nats worse; sum 20: 2.2).
    """
    decay, rate, total = (
        setting(run_facts, "weight_decay"),
        setting(run_facts, "learning_rate"),
        planned_steps(run_facts),
    )
    if not decay or not rate or not total:
        return None
    rates = run_facts.trace.learning_rate_S if run_facts.trace else np.zeros(0)
    rates = rates[np.isfinite(rates)]
    flat = "constant" in str(run_facts.settings.get("lr_scheduler_type"))
    mean = float(rates.mean()) if len(rates) else rate if flat else rate / 2
    pulled = mean * total * decay
    if pulled < DECAYED / 2:
        return None
    says = (
        f"weight_decay {decay:g} at a mean learning rate of {mean:.2g} over {total:,} steps multiplies the adapters by "
        f"e^-{pulled:.0f}"
    )
    weight = 0.85 if pulled >= DECAYED else 0.45
    return Signal("F69", "measured", says, weight, {"sum": pulled, "weight_decay": decay}, fix="weight_decay: 0.0")


@rule("F70", needs=("trace",), probes=("P11",))
def optimizer_memory(run_facts: RunFacts) -> Signal | None:
    """F70: the optimizer state does not fit into GPU memory, or moves between host and GPU all the time.

    Sees: an out-of-memory error inside the optimizer step, at the first step.
    Why: the optimizer state is created at the first step, after forward and backward worked.
    Not: F71 and F72, which fail before the optimizer step. Adapters of an 8B model have states of 109 MB, which are
    rarely the cause.
    Fix: `optim: adamw_8bit`.
    Wrong when: the memory was nearly full already, and any allocation would have failed.
    Source: bitsandbytes#962, litgpt#391, torchtune#1576 (LoRA needs no paging).
    """
    text = out_of_memory(run_facts)
    if (
        is_ours(run_facts)
        or text is None
        or not has_error(run_facts, r"optimizer\.step|in step\b|exp_avg|optim/.*\.py|_init_group")
    ):
        return None
    says = "out of memory in the optimizer step: " + text.strip().splitlines()[-1][:120]
    return Signal("F70", "measured", says, 0.8, {}, fix="optim: adamw_8bit")
