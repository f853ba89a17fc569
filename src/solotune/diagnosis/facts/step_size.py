"""How large the steps of a run are: against the weights, against its loss.

one_step(run_facts)     change of a weight by one step of Adam, relative to its size
whole_run(run_facts)    the most that all steps can change it
too_small(run_facts)    why the steps are too small, as parts of a signal; diverges(run_facts): too large
odd_one(run_facts, of)  the learning rate or the scale, whichever is further from the usual
"""

from __future__ import annotations

import math

import numpy as np

from solotune.diagnosis.evidence import Kind
from solotune.diagnosis.facts.derived import (
    is_scale_free,
    linears,
    lora_layers,
    planned_steps,
    scale,
    setting,
    shape_of,
    targets,
)
from solotune.diagnosis.run_facts import RunFacts, Trace

HALF = 0.5
"""`one_step` from which learning fails: 0.57 did (4.6 instead of 1.8 nats), 0.18 did not; published recipes stay below
0.07, and narrow models below 0.15."""
UNMOVED = 2**-10
"""`whole_run` below which the run cannot change a weight to the next number of float16; recipes have more."""
HARDLY = 2**-6
"""`whole_run` below which a loss that does not fall has its cause in the size of the steps."""
LEAST_STEPS = 100
"""A shorter run is judged as if it had as many steps: that it is short is no fault of the learning rate."""
SPIKE = 50
"""Largest gradient norm / median: 13 in clean runs, 84 at ten times the learning rate, 764 at fifty times."""


def one_step(run_facts: RunFacts) -> float | None:
    """Change of a weight by one step of Adam, relative to its size: rate x scale x sqrt(r).

    A step moves every element of B by the rate. The elements of A and those of the weights are both about
    1 / sqrt(inputs), and r products of random signs add up to sqrt(r). A rank above 16 counts as 16, since large ranks
    train at the same rates.
    """
    rate = setting(run_facts, "learning_rate")
    if rate is None or not is_scale_free(run_facts):
        return None
    return rate * (scale(run_facts) or 1.0) * math.sqrt(min(setting(run_facts, "lora_r") or 8, 16))


def whole_run(run_facts: RunFacts) -> float | None:
    """The most that all steps can change a weight, relative to its size: sum of the rates x scale x r.

    As in `one_step`, if all steps have one direction and all r products one sign. An unknown scale counts as 2.
    """
    mean = mean_rate(run_facts)
    if mean is None or not is_scale_free(run_facts):
        return None
    steps = max(planned_steps(run_facts) or 0, LEAST_STEPS)
    return mean * steps * (scale(run_facts) or 2.0) * (setting(run_facts, "lora_r") or 16)


def mean_rate(run_facts: RunFacts) -> float | None:
    """The mean learning rate of the run: of its log if most of the run is in it, else by its schedule."""
    rate, trace = setting(run_facts, "learning_rate"), run_facts.trace
    logged = trace.learning_rate_S[np.isfinite(trace.learning_rate_S)] if trace is not None else np.zeros(0)
    if trace is not None and len(logged) >= 3 and 2 * trace.step_S[-1] > (planned_steps(run_facts) or 0):
        return float(logged.mean())
    flat = "constant" in str(run_facts.settings.get("lr_scheduler_type"))
    return None if rate is None else rate if flat else rate / 2


def odd_one(run_facts: RunFacts, of_rate: str) -> str:
    """Which of learning rate (`of_rate`) and scale (F61) is further from the usual, if their product is wrong."""
    rate, factor, shape = setting(run_facts, "learning_rate"), scale(run_facts), shape_of(run_facts)
    if not rate or not factor:
        return of_rate
    usual = 2e-4 * (max(1.0, 1024 / shape["hidden"]) if shape and of_rate == "F67" else 1.0)
    sign = 1 if of_rate == "F67" else -1
    return "F61" if sign * math.log(factor / 2) > sign * math.log(rate / usual) else of_rate


def hardly_falls(trace: Trace | None) -> tuple[float, float] | None:
    """(mean loss of the first tenth, of the last tenth) of a run of at least 50 steps, if the loss did not fall."""
    losses = trace.loss_S[np.isfinite(trace.loss_S)] if trace is not None else np.zeros(0)
    if trace is None or len(losses) < 10 or trace.step_S[-1] < 50 or trace.seams:
        return None
    tenth = max(2, len(losses) // 10)
    first, last = float(losses[:tenth].mean()), float(losses[-tenth:].mean())
    return (first, last) if 0.97 * first < last < 1.1 * first else None


def too_small(run_facts: RunFacts) -> tuple[Kind, str, float, dict[str, float]] | None:
    """Kind, words, weight and numbers of a signal that all steps together are too small; for F64 or F61."""
    reach = whole_run(run_facts)
    if reach is None:
        return None
    numbers = {"largest_change": reach}
    if reach < UNMOVED:
        says = f"all steps together can change a weight by at most {reach:.2g} of its size, less than float16 rounds it"
        return "invariant", says, 0.85, numbers
    if reach < HARDLY and (flat := hardly_falls(run_facts.trace)) is not None:
        says = f"all steps together can change a weight by at most {reach:.2g} of its size, and the loss stays at "
        says += f"{flat[1]:.2f} (first {flat[0]:.2f})"
        return "measured", says, 0.65, {**numbers, "first_loss": flat[0], "last_loss": flat[1]}
    return None


def diverges(run_facts: RunFacts) -> tuple[Kind, str, float, dict[str, float]] | None:
    """Kind, words, weight and numbers of a signal that the loss jumped and stays high; for F67 or F61.

    Without a jump of the gradient, and with steps of a usual size, it is only a symptom: the rows may be harder there.
    """
    trace = run_facts.trace
    if trace is None or len(trace.loss_S) < 8 or trace.seams:
        return None
    low, end = lowest_and_last(trace)
    norms = trace.grad_norm_S[np.isfinite(trace.grad_norm_S)]
    spike = float(norms.max() / np.median(norms)) if len(norms) >= 8 and np.median(norms) > 0 else 0.0
    if end < max(1.15 * low + 0.05, low + 4 * _noise(trace)) or (spike < SPIKE and end < 1.5 * low + 0.5):
        return None
    says = f"the loss ends at {end:.2f}, after it had reached {low:.2f}"
    says += f"; the largest gradient norm is {spike:.0f} times the median" if spike else ""
    is_large = spike >= SPIKE or (one_step(run_facts) or 0.0) > HALF / 8
    kind: Kind = "measured" if is_large else "curve"
    return kind, says, 0.65 if is_large else 0.4, {"lowest": low, "last": end, "spike": spike}


def _noise(trace: Trace) -> float:
    """Standard error of the difference between two means of a tenth of the logged losses."""
    losses = trace.loss_S[np.isfinite(trace.loss_S)]
    changes = np.diff(losses)
    if len(changes) < 4:
        return 0.0
    deviation = 1.48 * float(np.median(np.abs(changes - np.median(changes)))) / math.sqrt(2)  # spikes do not count
    return deviation * math.sqrt(2 / max(3, len(losses) // 10))


def lowest_and_last(trace: Trace) -> tuple[float, float]:
    """The lowest mean loss over a tenth of the logged steps, and that of the last tenth."""
    losses = trace.loss_S[np.isfinite(trace.loss_S)]
    width = max(3, len(losses) // 10)
    if len(losses) < width:
        return 0.0, 0.0
    means = np.convolve(losses, np.ones(width) / width, mode="valid")
    return float(means.min()), float(means[-1])


def adapter_elements(run_facts: RunFacts) -> int | None:
    """Elements of all adapters: of the saved ones, else by rank and targets; None if unknown."""
    if saved := sum(part.numel() for parts in lora_layers(run_facts).values() for part in parts.values()):
        return saved
    rank, names, modules = setting(run_facts, "lora_r"), targets(run_facts), linears(run_facts)
    if not rank or not modules or not names or (isinstance(names, str) and names != "all-linear"):
        return None
    sizes = [sum(size) for path, size in modules.items() if names == "all-linear" or path.rpartition(".")[2] in names]
    return int(rank * sum(sizes)) or None
