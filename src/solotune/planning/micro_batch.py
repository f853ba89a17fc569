"""A larger micro-batch where the frozen base is streamed or sharded: each copy of the layers then serves more rows.

    4 rows x 8 micro-batches     16 copies of each streamed layer in a step (forward and backward of each)
    8 rows x 4 micro-batches      8 copies, and the same 32 rows

The gradient is that of the same rows, so only rounding (and dropout masks) differ. It pays where a copy takes longer
than a layer computes. Keys that somebody wrote are kept; a note then says what the change would give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from solotune.config.run_config import Choice, RunConfig
from solotune.planning.layer_profile import Workload
from solotune.planning.plan import Candidate
from solotune.units import format_bytes

MIN_GAIN = 1.03
"""Fewer tokens a second more are not worth another micro-batch."""
NEARLY_BEST = 0.99
"""Of the sizes that reach this share of the best speed, the smallest is taken: it needs the least memory."""

Best = Callable[[RunConfig, Workload], tuple[Candidate, RunConfig, bool]]
Workloads = Callable[[RunConfig], Workload]


class MicroBatch(NamedTuple):
    """A plan with other rows per micro-batch, and the same rows a step."""

    option: Candidate
    resolved: RunConfig
    work: Workload

    def in_words(self, before: Candidate) -> str:
        """`1,210 tokens/s instead of 640`."""
        speeds = [option.seconds.tokens_per_second for option in (self.option, before)]
        return f"{speeds[0]:,.0f} tokens/s instead of {speeds[1]:,.0f}"

    def choices(self, before: Candidate) -> list[Choice]:
        rows, accumulation = self.resolved.per_device_train_batch_size, self.resolved.gradient_accumulation_steps
        used = before.footprint
        copied = format_bytes(used.host.layers or used.peers_bytes)
        how = "streamed" if used.host.layers else "sharded"
        because = f"each micro-batch copies {copied} of {how} layers twice: {self.in_words(before)}"
        rows_per_step = rows * accumulation * self.resolved.ranks
        return [
            Choice("per_device_train_batch_size", rows, because),
            Choice("gradient_accumulation_steps", accumulation, f"the same {rows_per_step} rows a step"),
        ]

    def note(self, before: Candidate) -> str:
        rows, accumulation = self.resolved.per_device_train_batch_size, self.resolved.gradient_accumulation_steps
        change = f"per_device_train_batch_size: {rows} with gradient_accumulation_steps: {accumulation}"
        how = "streamed" if before.footprint.host.layers else "sharded"
        return f"copies of {how} layers set the pace: {change}, the same rows a step, gives {self.in_words(before)}"


def larger_micro_batch(
    config: RunConfig, before: Candidate, work: Workload, best: Best, workloads: Workloads | None
) -> MicroBatch | None:
    """The micro-batch that makes a plan with streamed or sharded layers faster; None if none does by much or fits.

    None on a CPU too: there is no link.

    Args:
        before: the plan with the config's own micro-batch.
        best: plans a config for a work of the step.
        workloads: the work of the step of a config; None: rows and tokens as in `work`.
    """
    if before.knobs.device == "cpu" or not before.knobs.copies_base:
        return None
    rows, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    found: list[MicroBatch] = []
    for factor in (factor for factor in range(2, accumulation + 1) if accumulation % factor == 0):
        sizes = {"per_device_train_batch_size": rows * factor, "gradient_accumulation_steps": accumulation // factor}
        larger = config.replaced("plan", **sizes)
        other = replace(work, rows=rows * factor, accumulation=accumulation // factor)
        if workloads is not None:
            other = workloads(larger)
        option, resolved, fits = best(larger, other)
        if not fits:
            break
        found.append(MicroBatch(option, resolved, other))
    speeds = [one.option.seconds.tokens_per_second for one in found]
    if not found or max(speeds) < MIN_GAIN * before.seconds.tokens_per_second:
        return None
    return next(one for one, speed in zip(found, speeds, strict=True) if speed >= NEARLY_BEST * max(speeds))
