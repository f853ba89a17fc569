"""S13, the optimizer and the learning-rate schedule: F64 to F70."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import (
    is_lora,
    is_ours,
    is_scale_free,
    out_of_memory,
    planned_steps,
    setting,
    shape_of,
    warmup_steps,
)
from solotune.diagnosis.facts.out_of_memory import phase_of
from solotune.diagnosis.facts.step_size import (
    HALF,
    LEAST_STEPS,
    adapter_elements,
    diverges,
    mean_rate,
    odd_one,
    one_step,
    too_small,
)
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts, Trace

LOW_RATE = 3e-5
"""The best learning rates of LoRA are some ten times those of full fine-tuning (LoRA Without Regret), such as 2e-5."""
HIGH_RATE = 5e-3
"""Ten times the highest learning rate of recipes for adapters, for a hidden size of at least 1,000. Narrower models
allow higher rates, about in proportion: one with hidden size 128 was trained at 6e-3 without harm."""
TRIAL = 10
"""Steps of a run that only tries whether everything works."""
NOTHING = 1e-4
"""Share of the peak: cosine falls below it only in the last hundredth of a run, which is no early end."""
DECAYED = 5.0
"""Sum of learning rate x decay over the run: 2 cost 0.19 nats, 20 cost 2.2."""
HOLDS = 1.0
"""1 / decay is the largest weight that a step of Adam can hold against the decay; a decay of 0.1 allows 10."""
ENDED, FLOOR = 0.4, 0.02
"""Share of the run at a learning rate that no longer changes, below this share of its peak."""
LOST = 0.1
"""Share of its step that Adam keeps of a clipped gradient: element / (element + epsilon)."""
SGD_REACH = 0.05
"""Sum of learning rate x clipped norm over the run, the longest way of all adapters together; clean runs have 1 to 30.
"""


@rule("F64", needs=("settings",), probes=("P7",))
def rate_too_low(run_facts: RunFacts) -> Signal | None:
    """F64: the learning rate is too low.

    Sees: a run whose steps together cannot change a weight by as much as float16 rounds it (sum of the rates x scale x
    r below 1/1,024); a loss that does not fall in a run whose steps together can change a weight by less than 1/64. A
    learning rate for full fine-tuning, used for adapters, is a remark. The range test decides: at ten times the
    learning rate one batch is learned clearly better.
    Why: the loss falls slowly and steadily, and the run ends on a plateau ("2.4").
    Not: F54, where updates are lost by rounding (fewer elements change in a step); F61, where alpha / r is small (the
    evidence is the same: both are reported); F62, where no learning rate fits the batch; F65 and F66, where the log
    never shows the learning rate of the config; F38, where prompts do not help; a run of a few steps, which is judged
    as one of 100; a run that began at the lowest loss of its task.
    Fix: `learning_rate: 2e-4`.
    Wrong when: the adapter continues a run that was nearly finished. Control: recipes from 1e-5 on, with r / 2 to 4 r.
    Source: LoRA Without Regret (the best learning rate is some 10 times that of full fine-tuning); TRL's default is
    2e-5.
    """
    rate = setting(run_facts, "learning_rate")
    if rate is None or not is_lora(run_facts) or not is_scale_free(run_facts):
        return None
    if odd_one(run_facts, "F64") == "F64" and (found := too_small(run_facts)) is not None:
        kind, says, weight, numbers = found
        return Signal("F64", kind, f"learning_rate {rate:g}: {says}", weight, numbers, fix="learning_rate: 2e-4")
    if rate > LOW_RATE:
        return None
    says = f"learning_rate {rate:g} is one for full fine-tuning; adapters usually need 1e-4 to 5e-4"
    return Signal("F64", "remark", says, 0.3, {"learning_rate": rate}, fix="learning_rate: 2e-4")


@rule("F65", needs=("settings",))
def warmup_past_the_end(run_facts: RunFacts) -> Signal | None:
    """F65: the warm-up lasts longer than the run, or most of it.

    Sees: more warm-up steps than half of the planned steps.
    Why: the learning rate reaches its peak only at the end or never, so the loss flattens early.
    Not: F64, where the learning rate reaches its peak, which is too low; F66, where it falls too early; a warm-up of up
    to half of the run, which is unusual above a tenth and no harm; a run of less than 10 steps, which is a trial.
    Fix: `warmup_ratio: 0.03`, and `warmup_steps: 0` if it is set.
    Wrong when: the rest of the run follows later, from a checkpoint.
    Source: CAIL2020#1, prime-rl#968; transformers 5 reads `warmup_steps` below 1 as a share.
    """
    warmup, total = warmup_steps(run_facts), planned_steps(run_facts)
    if run_facts.settings.get("lr_scheduler_type") == "constant" or not warmup or not total or warmup <= total / 2:
        return None
    says = f"the warm-up takes {warmup:,.0f} of the {total:,} steps of the run"
    numbers, fix = {"warmup_steps": warmup, "steps": total}, _warmup_fix(run_facts)
    if total < TRIAL:
        return Signal("F65", "remark", f"{says}, which is a short trial", 0.3, numbers, fix=fix)
    return Signal("F65", "invariant", says, 0.95, numbers, fix=fix)


@rule("F65", needs=("trace",))
def rises_to_the_end(run_facts: RunFacts) -> Signal | None:
    """F65, from the log: the learning rate still rises in the second half of the run."""
    known = _rates(run_facts)
    if known is None:
        return None
    step, rate, total = known
    top = int(np.argmax(rate))
    is_rising = top >= len(rate) - 2 and bool((np.diff(rate[: top + 1]) > 0).all())
    if not is_rising or len(rate) < 4 or total < TRIAL or step[-1] < 0.6 * total:
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
    peak, or in every step; one that stays below 1/50 of its peak for two fifths of the run; a schedule that should
    decay to zero and is above half of its peak at the last step; a learning rate that rises after its lowest point in
    the same way as it fell, as a cosine past its end does.
    Why: with a learning rate of zero nothing is learned; without the decay the end of the run stays noisy.
    Not: F54, whose learning rate is above zero; F65, whose learning rate still rises; a run that was stopped early;
    schedules with a minimum or without decay; steps down to a tenth and a hundredth; warm restarts; a decay at the very
    end (WSD).
    Fix: let the trainer compute the number of steps, after gradient accumulation.
    Wrong when: several schedules follow each other on purpose.
    Source: transformers#671, CAIL2020#1 (divided by gradient accumulation twice).
    """
    known, trace = _rates(run_facts), run_facts.trace
    if trace is not None and (len(trace.step_S) >= TRIAL or trace.is_finished) and _is_never_above_zero(trace):
        count, fix = len(trace.step_S), _length_fix(planned_steps(run_facts))
        says = f"the logged learning rate is zero in all {count:,} logged steps"
        return Signal("F66", "invariant", says, 0.95, {"steps": count}, fix=fix, affected=1.0)
    if known is None:
        return None
    step, rate, total = known
    top = int(np.argmax(rate))
    dead = np.flatnonzero(rate[top:] <= NOTHING * rate[top]) + top
    numbers = {"steps": total, "peak": float(rate[top]), "peak_step": int(step[top]), "last": float(rate[-1])}
    if len(dead) >= 2 and step[-1] - step[dead[0]] > 0.05 * total:
        says = f"the logged learning rate is zero from step {step[dead[0]]:,} of {total:,} on"
        return _ended(says, int(step[dead[0]]), int(step[-1]), numbers, total)
    if (turn := mirrored_from(step, rate)) is not None:
        says = f"the logged learning rate is lowest at step {turn:,} and then rises as it fell: the schedule is for "
        says += f"{turn:,} steps, but the run has {total:,}"
        return _ended(says, turn, int(step[-1]), numbers, total)
    low = np.flatnonzero(rate > FLOOR * rate[top])[-1] + 1  # from here on it stays low
    if len(rate) - low >= 2 and step[-1] - step[low] > ENDED * total:
        says = f"from step {step[low]:,} of {total:,} on, the logged learning rate is below {FLOOR:.0%} of its peak"
        return _ended(says, int(step[low]), int(step[-1]), numbers, total)
    decays = str(run_facts.settings.get("lr_scheduler_type")) in ("cosine", "linear")
    is_over = step[-1] >= 0.98 * total and len(rate) >= 4 and top < len(rate) - 2
    if decays and is_over and rate[-1] > 0.5 * rate[top]:
        says = (
            f"the run ends at {rate[-1] / rate[top]:.0%} of the peak learning rate, but the schedule should end at zero"
        )
        return Signal("F66", "measured", says, 0.7, numbers, fix=_length_fix(total))
    return None


def _ended(says: str, ended: int, last: int, numbers: dict[str, Any], total: int) -> Signal:
    """The schedule ended at this step, and the run went on to `last`."""
    numbers, affected = {**numbers, "zero_from": ended}, (last - ended) / max(last, 1)
    return Signal("F66", "invariant", says, 0.95, numbers, fix=_length_fix(total), affected=affected)


def _is_never_above_zero(trace: Trace) -> bool:
    return len(trace.learning_rate_S) >= 3 and bool((trace.learning_rate_S == 0).all())


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


def _length_fix(total: int | None) -> str:
    steps = f"the {total:,} steps" if total else "all steps"
    return f"make the schedule for {steps} of the run (transformers: num_training_steps={total or 'all steps'})"


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

    Sees: a step of Adam that changes a weight by half of its size (rate x scale x sqrt(r)); a loss that ends clearly
    above its lowest part, beyond its noise, together with a gradient norm above fifty times the median or with steps
    larger than any recipe's; losses that end in NaN in float32 or bfloat16. A learning rate above any recipe is a
    remark. The range test decides: at a tenth of the learning rate one batch is learned clearly better.
    Why: the loss jumps, then stays on a high plateau or is NaN, and answers repeat themselves.
    Not: F53 (finite in float32 at the same learning rate); F61 with a large alpha / r (the evidence is the same: both
    are reported); F37 and F42, where one batch causes the spike again after a resume; F77, whose jump is where the run
    was resumed; spikes from which the loss recovers; harder rows at the end (then the gradients have no spike).
    Fix: a tenth of the present `learning_rate`; 2e-4 is a usual value.
    Wrong when: the optimizer needs other learning rates (SGD). Control: four standard errors of the loss's own noise.
    Source: measured (a plateau at 4.7 with fifty times the learning rate).
    """
    rate = setting(run_facts, "learning_rate")
    shape = shape_of(run_facts)
    high = HIGH_RATE * max(1.0, 1024 / shape["hidden"]) if shape else 4 * HIGH_RATE
    if rate is None or not is_lora(run_facts) or not is_scale_free(run_facts):
        return None
    fix, change = "learning_rate: 2e-4", one_step(run_facts)
    if change is not None and change >= HALF and odd_one(run_facts, "F67") == "F67":
        says = f"learning_rate {rate:g}: one step of Adam changes a weight by {change:.1f} times its size"
        return Signal("F67", "invariant", says, 0.8, {"learning_rate": rate, "change_of_a_step": change}, fix=fix)
    if rate < high:
        return None
    says = f"learning_rate {rate:g} is far above those usual for adapters"
    return Signal("F67", "remark", says, 0.3, {"learning_rate": rate}, fix=fix)


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
        first = int(np.flatnonzero(finite)[-1]) + 1
        says = f"the loss is not finite from step {trace.step_S[first]:,} on"
        lost = (len(finite) - first) / len(finite)
        return Signal(
            "F67", "measured", says, 0.5, {"from_step": int(trace.step_S[first])}, fix=fix, affected=float(lost)
        )
    if odd_one(run_facts, "F67") != "F67" or (found := diverges(run_facts)) is None:
        return None
    kind, says, weight, numbers = found
    return Signal("F67", kind, says, weight, numbers, fix=fix)


@rule("F68", needs=("settings",))
def clipped_to_nothing(run_facts: RunFacts) -> Signal | None:
    """F68: gradients are clipped to almost zero.

    Sees: a limit at which an average element of the clipped gradient is at most a tenth of Adam's epsilon, so that a
    step loses nine tenths; or, with an optimizer whose step grows with the gradient (SGD), a limit far below the median
    gradient norm at a learning rate that does not make up for it.
    Why: the loss falls slowly, as with a tiny learning rate.
    Not: a small limit with Adam or similar, which divide by the size of the gradient: 1e-4 gives the same loss as 1.0.
    Fix: `max_grad_norm: 1.0`.
    Wrong when: the gradients are as small themselves.
    Source: measured (1e-8 with AdamW: 6.82 instead of 1.64; 1e-4 with SGD: 7.30 instead of 2.54).
    """
    clip, rate = setting(run_facts, "max_grad_norm"), mean_rate(run_facts)
    if clip is None or clip <= 0:  # 0: not clipped
        return None
    fix, numbers = "max_grad_norm: 1.0", {"max_grad_norm": clip}
    if is_scale_free(run_facts):
        epsilon = setting(run_facts, "adam_epsilon") or 1e-8
        element = clip / math.sqrt(adapter_elements(run_facts) or 10_000)
        kept = element / (element + epsilon)
        if kept > LOST:
            return None
        says = f"gradients are clipped to {clip:g}: an element is then {element:.1g}, and with Adam's epsilon "
        says += f"{epsilon:g} a step keeps {kept:.1%} of its size"
        return Signal("F68", "invariant", says, 0.9, {**numbers, "element": element, "epsilon": epsilon}, fix=fix)
    norms = run_facts.trace.grad_norm_S if run_facts.trace else np.zeros(0)
    norms = norms[np.isfinite(norms)]
    if not len(norms) or clip > 0.02 * float(np.median(norms)):
        return None
    median, steps = float(np.median(norms)), max(planned_steps(run_facts) or 0, LEAST_STEPS)
    if rate is not None and rate * clip * steps > SGD_REACH:
        return None
    says = f"gradients of norm {median:.2g} are clipped to {clip:g}, which makes this optimizer's steps smaller"
    clipped = float((norms > clip).mean())
    return Signal("F68", "measured", says, 0.85, {**numbers, "median_norm": median}, fix=fix, affected=clipped)


@rule("F69", needs=("settings",))
def decay_too_large(run_facts: RunFacts) -> Signal | None:
    """F69: weight decay pulls the adapters back to zero.

    Sees: a sum of learning rate x decay over the run above 5 (what was learned at the start is multiplied by e^-5),
    with a decay above 1, against which a step of Adam holds only weights below 1 / decay.
    Why: the adapters shrink, the loss stops falling, and the adapter changes the model less and less.
    Not: a decay of 0.1, however long the run is; 10 at a learning rate of 2e-3 over 200 steps, which does almost no
    harm (a remark); F64, whose adapters grow.
    Fix: `weight_decay: 0.0`.
    Wrong when: the optimizer does not decouple weight decay (Adam with L2).
    Source: measured (sum 2: 0.19 nats worse; sum 20: 2.2).
    """
    decay, total, mean = setting(run_facts, "weight_decay"), planned_steps(run_facts), mean_rate(run_facts)
    if not decay or not mean or not total or decay < HOLDS:
        return None
    pulled = mean * total * decay
    if pulled < DECAYED / 2:
        return None
    says = (
        f"weight_decay {decay:g} at a mean learning rate of {mean:.2g} over {total:,} steps multiplies the adapters by "
        f"e^-{pulled:.0f}"
    )
    kind, weight = ("invariant", 0.85) if pulled >= DECAYED else ("remark", 0.3)
    return Signal("F69", kind, says, weight, {"sum": pulled, "weight_decay": decay}, fix="weight_decay: 0.0")


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
    if is_ours(run_facts) or text is None or phase_of(text) != "step":
        return None
    says = "out of memory in the optimizer step: " + text.strip().splitlines()[-1][:120]
    return Signal("F70", "measured", says, 0.8, {}, fix="optim: adamw_8bit")
