"""Faults of runs on several GPUs: F79 and F80 of suspect S14, F81 of S15.

They return at once if nothing says that the run had several ranks. A *rank* is one process of the run, on its own GPU.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import linears, number, world_size
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RankCheckpoint, Ranks, RunFacts, Trace

UNLIKE = 1e-3
"""Relative difference of two copies of a tensor; rounding differs by less, also over a whole run."""
UNLIKE_LOGGED = 1e-4
"""Relative difference of two logged numbers, in half of all steps; what ranks get from one exchange is bit-equal."""
_SAME_EVERYWHERE = re.compile(
    r"(adapter|lora|param|parameter|weight|model)s?_(l2_?)?(norm|hash|sum|checksum|mean)|learning_rate|lr",
    re.IGNORECASE,
)
"""Logged values that every rank computes from the same adapter and the same schedule."""
_SCHEDULE = re.compile(r"learning_rate|lr")
_FEWEST = 3
"""Log entries on each side of a resume."""
_OTHER_BATCH = 1.1
"""Ratio of steps per epoch, before and after a resume, from which the global batch is another one."""
_SPREAD = 1.05
"""Ratio of label counts of two ranks from which tokens have different weights."""

_FIX_EXCHANGE = (
    "start all ranks with the same adapter, and average the gradients over the ranks in every step "
    "(DistributedDataParallel, or all_reduce before optimizer.step)"
)


@rule("F79", probes=("P15",))
def ranks_differ(run_facts: RunFacts) -> list[Signal]:
    """F79: the ranks (GPUs) of a run do not train the same adapter, because their gradients are not averaged.

    Sees: adapters saved or gathered from several ranks that differ; `lora_B` exactly zero on all ranks but some; logs
    of several ranks with another norm of the adapter, or another learning rate, in the same step; a gradient of rank 0
    that is that of its own rows alone (probe P15); DistributedDataParallel's error that the ranks have other models.
    Other gradient norms per rank are a remark: they differ in healthy runs if logged before the exchange.
    Why: each rank trains its own adapter on its own part of the rows, and only rank 0's is saved: N GPUs do the work of
    one. Common causes: the model is called past its wrapper (`model.module(...)`), `no_sync()` around every
    micro-batch, an all-reduce in a branch that one rank takes, adapters that start from another seed on each rank.
    Not: F58 and F75, where no rank has a trained adapter; losses that differ between ranks, which have different rows;
    files of shards (FSDP, tensor parallel), which are parts of one adapter and not copies.
    Fix: start with the same adapter everywhere, and average all gradients in every step.
    Wrong when: ranks are meant to differ between exchanges (local SGD, DiLoCo), are runs of their own, or log norms of
    their shard. Control: tensors of other names or shapes are not compared; differences by rounding are none.
    Source: DistributedDataParallel called as `model.module(...)`, or always in `no_sync()`, and a seed for each rank
    with an all-reduce by hand: other adapters on two ranks, no error (measured, torch 2.13).
    """
    ranks = run_facts.ranks
    if ranks is None:
        return []
    found = (_other_adapters(run_facts, ranks), _other_numbers(run_facts, ranks), _other_norms(ranks))
    return [signal for signal in found if signal is not None]


def _other_adapters(run_facts: RunFacts, ranks: Ranks) -> Signal | None:
    """F79 of adapters that should be copies of one another."""
    if len(ranks.adapters) < 2:
        return None
    first, *others = sorted(ranks.adapters)
    mine = ranks.adapters[first]
    if any(_shapes(ranks.adapters[rank]) != _shapes(mine) for rank in others) or _is_shard(run_facts, mine):
        return None
    dead = [rank for rank, tensors in ranks.adapters.items() if _is_untrained(tensors)]
    if dead and len(dead) < len(ranks.adapters):
        alive = next(rank for rank in ranks.adapters if rank not in dead)
        says = (
            f"all lora_B are exactly zero on {len(dead)} of {len(ranks.adapters)} ranks (rank {dead[0]}), and trained"
        )
        says += f" on rank {alive}"
        return Signal("F79", "invariant", says, 0.95, {"untrained": dead}, fix=_FIX_EXCHANGE)
    worst, rank, unlike = 0.0, first, 0
    for other in others:
        gaps = [_gap(tensor, ranks.adapters[other][name]) for name, tensor in mine.items()]
        if max(gaps) > worst:
            worst, rank, unlike = max(gaps), other, sum(gap > UNLIKE for gap in gaps)
    if worst <= UNLIKE:
        return None
    says = f"{unlike} of {len(mine)} tensors of the adapter differ between rank {first} and rank {rank}, by up to "
    says += f"{worst:.2g} of their norm"
    numbers = {"unlike": unlike, "tensors": len(mine), "largest": worst, "rank": rank}
    return Signal("F79", "invariant", says, 0.9, numbers, fix=_FIX_EXCHANGE)


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _is_shard(run_facts: RunFacts, tensors: Mapping[str, Any]) -> bool:
    """Whether these are parts of tensors: A and B do not fit together, or neither the saved adapter nor the model."""
    whole = run_facts.saved.adapter if run_facts.saved is not None else {}
    modules = linears(run_facts) or {}
    for name, tensor in tensors.items():
        path, _, part = name.partition(".lora_")
        other = tensors.get(f"{path}.lora_B{part[1:]}", tensor)
        if name in whole and whole[name].shape != tensor.shape:
            return True
        if not part.startswith("A") or tensor.dim() != 2 or other.dim() != 2:
            continue
        fits = modules.get(path.removeprefix("base_model.model."), (tensor.shape[1], other.shape[0]))
        if tensor.shape[0] != other.shape[1] or fits != (tensor.shape[1], other.shape[0]):
            return True
    return not tensors


def _is_untrained(tensors: Mapping[str, Any]) -> bool:
    B = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    return bool(B) and not any(bool(tensor.any()) for tensor in B)


def _gap(one: Any, other: Any) -> float:
    """The relative difference of two tensors; 1 if only one of them is finite."""
    one, other = one.float(), other.float()
    size = max(float(one.norm()), float(other.norm()))
    gap = float((one - other).norm())
    if not math.isfinite(gap):
        return float(bool(one.isfinite().all()) != bool(other.isfinite().all()))
    return gap / size if size else 0.0


class _Unequal(NamedTuple):
    """A value that two ranks logged in one step."""

    key: str
    step: int
    values: tuple[Any, Any]
    ranks: tuple[int, int]
    steps: int  # in which it differs


def _unequal(ranks: Ranks, keys: re.Pattern[str]) -> _Unequal | None:
    """The first value with such a name that differs between two ranks, if it does so in half of their steps."""
    if len(ranks.logs) < 2:
        return None
    first, *others = sorted(ranks.logs)
    mine = {entry.get("step"): entry for entry in ranks.logs[first]}
    shared: Counter[str] = Counter()
    found: dict[str, list[_Unequal]] = {}
    for rank in others:
        for entry in ranks.logs[rank]:
            step, twin = entry.get("step"), mine.get(entry.get("step"), {})
            if not isinstance(step, int):
                continue
            for key in (key for key in entry.keys() & twin.keys() if keys.fullmatch(key)):
                shared[key] += 1
                if _is_unlike(twin[key], entry[key]):
                    found.setdefault(key, []).append(_Unequal(key, step, (twin[key], entry[key]), (first, rank), 0))
    often = [(key, len(ones)) for key, ones in found.items() if len(ones) >= max(2, shared[key] / 2)]
    if not often:
        return None
    key = max(often, key=lambda counted: counted[1])[0]
    steps = len({one.step for one in found[key]})
    return min(found[key], key=lambda one: one.step)._replace(steps=steps)


def _is_unlike(one: Any, other: Any) -> bool:
    """Whether two numbers differ by more than rounding, or two texts at all."""
    if isinstance(one, str) and isinstance(other, str):
        return one != other
    a, b = number(one), number(other)
    return a is not None and b is not None and abs(a - b) > UNLIKE_LOGGED * max(abs(a), abs(b))


def _other_numbers(run_facts: RunFacts, ranks: Ranks) -> Signal | None:
    is_sharded = any(run_facts.settings.get(key) for key in ("fsdp", "deepspeed"))  # norms are those of a shard
    found = _unequal(ranks, _SCHEDULE if is_sharded else _SAME_EVERYWHERE)
    if found is None:
        return None
    says = f"{found.key} in step {found.step:,} is {_shown(found.values[0])} on rank {found.ranks[0]} and "
    says += f"{_shown(found.values[1])} on rank {found.ranks[1]}, and differs in {found.steps:,} steps"
    return Signal("F79", "measured", says, 0.8, {"key": found.key, "steps": found.steps}, fix=_FIX_EXCHANGE)


def _other_norms(ranks: Ranks) -> Signal | None:
    found = _unequal(ranks, re.compile(r"grad(ient)?_?norm", re.IGNORECASE))
    if found is None:
        return None
    says = f"ranks log another {found.key} in {found.steps:,} steps: right only if it is logged before the exchange"
    return Signal("F79", "remark", says, 0.3, {"key": found.key, "steps": found.steps}, fix=_FIX_EXCHANGE)


def _shown(value: Any) -> str:
    found = number(value)
    return str(value)[:16] if found is None else f"{found:.6g}"


@rule("F80", probes=("P15",))
def ranks_scaled(run_facts: RunFacts) -> Signal | None:
    """F80: with several GPUs, the loss is divided by the wrong number.

    Sees: a gradient of several ranks that is N times, or an N-th of, that of all their tokens, or a mean of the ranks'
    own means (probe P15). `average_tokens_across_devices: false` in a run of several ranks is a remark, with how much
    their loss tokens differ.
    Why: DistributedDataParallel averages what the ranks have divided already. If each divides by its own tokens, a
    token counts more on a rank with short answers than on one with long ones. If each divides by the tokens of all
    ranks, the average divides by N once more; Adam hides that, but not the logged loss.
    Not: F74, where it is the micro-batches of one rank that are averaged; ranks with equally many loss tokens (packed
    rows, all tokens learned), where both are the same.
    Fix: divide by the loss tokens of all ranks, and multiply by the number of ranks if gradients are averaged (in
    transformers: `average_tokens_across_devices: true`).
    Wrong when: every row is meant to count the same, whatever its length.
    Source: transformers#34191 and its option average_tokens_across_devices.
    """
    count = world_size(run_facts)
    if count < 2 or run_facts.settings.get("average_tokens_across_devices") is not False:
        return None
    labels = [int((batch["labels"][..., 1:] != -100).sum()) for batch in run_facts.batches if "labels" in batch]
    steps = [labels[i : i + count] for i in range(0, len(labels) - count + 1, count)]
    spreads = [max(step) / min(step) for step in steps if min(step)]
    says = f"each of {count} ranks divides its loss by its own tokens"
    if spreads:
        typical = float(np.median(spreads))
        if typical < _SPREAD:
            return None
        says += f", of which the ranks of one step have up to {typical:.1f} times as many as another"
    fix = "average_tokens_across_devices: true (transformers)"
    return Signal("F80", "remark", says, 0.3, {"world_size": count, "labels": labels[:8]}, fix=fix)


@rule("F81")
def resumed_with_other_batch(run_facts: RunFacts) -> Signal | None:
    """F81: the run was resumed with another number of GPUs, and so with another global batch.

    Sees: checkpoints with files of another number of ranks (`rng_state_0.pth` ...) and with another number of rows in a
    step; an epoch that has another number of steps from some step on, where the counter was set to what it would be if
    all steps before had been like those after. Another number of ranks with the same rows in a step is a remark.
    Why: trainers compute the position in the data and in the schedule from the number of steps. With another global
    batch both are wrong: rows are left out or seen twice, the learning rate jumps, and the rate fits another batch. The
    random numbers of ranks that are new, or gone, do not continue.
    Not: F77, where files of the checkpoint are missing; a log of an iterable dataset, whose epoch jumps to a whole
    number at its end, and then goes on as fast as before.
    Fix: keep GPUs x per_device_train_batch_size x gradient_accumulation_steps as it was.
    Wrong when: the batch should grow during the run, and the position in the data does not matter.
    Source: OpenTau PR #180 (accelerate skips the files of random numbers without a word); transformers' Trainer,
    resumed on 2 ranks instead of 4, halved its count of epochs (measured, transformers 5.24).
    """
    if (signal := _other_ranks(run_facts.ranks)) is not None and signal.kind != "remark":
        return signal
    counted = None if run_facts.trace is None else recounted(run_facts.trace)
    if counted is None:
        return signal
    step, before, after = counted
    says = (
        f"an epoch has {before:,.0f} steps until step {step:,}, and {after:,.0f} after it, counted from the start: the "
    )
    says += f"global batch is {before / after:.2g} times as large, and the position in the data is another one"
    numbers = {"step": step, "steps_per_epoch": [before, after]}
    return Signal("F81", "invariant", says, 0.85, numbers, fix=_fix_batch(None))


def _fix_batch(batch: int | None) -> str:
    kept = f"at {batch:,} rows" if batch else "as it was"
    return f"resume with GPUs x per_device_train_batch_size x gradient_accumulation_steps {kept}"


def _other_ranks(ranks: Ranks | None) -> Signal | None:
    """F81 of checkpoints: an accusation if their global batches differ, a remark if only their ranks do."""
    known = [one for one in ranks.checkpoints if one.world_size] if ranks is not None else []
    for one, other in pairwise(known):
        if one.world_size == other.world_size:
            continue
        says = (
            f"the run had {one.world_size} ranks until step {one.step:,}, and {other.world_size} at step {other.step:,}"
        )
        numbers = {"world_sizes": [one.world_size, other.world_size], "batches": [one.batch, other.batch]}
        times = _times_as_large(one, other)
        if times is not None and max(times, 1 / times) > _OTHER_BATCH:
            rows = f" ({one.batch:,} rows, then {other.batch:,})" if one.batch and other.batch else ""
            says += f": a step has {times:.2g} times as many rows{rows}"
            return Signal("F81", "invariant", says, 0.9, numbers, fix=_fix_batch(one.batch))
        says += "; random numbers do not continue" if times is not None else "; the rows of a step are not known"
        return Signal("F81", "remark", says, 0.3, numbers, fix=_fix_batch(one.batch))
    return None


def _times_as_large(one: RankCheckpoint, other: RankCheckpoint) -> float | None:
    """The ratio of the rows of a step; None if it is not known."""
    if one.batch and other.batch:
        return other.batch / one.batch
    if one.epoch and other.epoch and one.step and other.step:
        return (other.epoch / other.step) / (one.epoch / one.step)
    return None


def recounted(trace: Trace) -> tuple[int, float, float] | None:
    """(last step before, steps per epoch before, after), if the epoch was counted again with another number of steps.

    In both parts the epoch is the step divided by one number, from step 0 on; no run does so without being resumed. Its
    rounding to two digits, and an epoch's last step, which may be smaller, are allowed for.
    """
    has = np.isfinite(trace.epoch_S) & (trace.epoch_S > 0) & (trace.step_S > 0)
    step, epoch = trace.step_S[has].astype(float), trace.epoch_S[has]
    if len(step) < 2 * _FEWEST or (np.diff(step) <= 0).any():
        return None
    steps_per_epoch = step / epoch
    at = int(np.abs(np.diff(np.log(steps_per_epoch))).argmax()) + 1
    if min(at, len(step) - at) < _FEWEST:
        return None
    rate = []  # epochs per step
    for part in (slice(0, at), slice(at, None)):
        steps = float(np.median(steps_per_epoch[part]))
        if (np.abs(steps_per_epoch[part] / steps - 1) > 1e-3 + 1.5 / step[part] + 0.006 / epoch[part]).any():
            return None
        rate.append(1 / steps)
    spans = step[at - 1], step[-1] - step[at]
    rises = epoch[at - 1], epoch[-1] - epoch[at]
    apart = abs(rate[0] - rate[1])
    for span, rise, slope in zip(spans, rises, rate, strict=True):
        unsure = 2 * max(rate) + 0.012
        if apart * span < 2 * unsure or abs(rise - slope * span) > unsure:
            return None
    ratio = rate[1] / rate[0]
    return (int(step[at - 1]), 1 / rate[0], 1 / rate[1]) if max(ratio, 1 / ratio) > _OTHER_BATCH else None
