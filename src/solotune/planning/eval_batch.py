"""Fewer rows in an evaluation pass where the default number would not fit beside training.

Held-out losses are those of the same rows, whatever number of them is computed at a time, but for rounding. So training
comes first: its settings are chosen with one row in a pass, and then the pass gets as many rows as fit, by halves of
the default. A number that somebody wrote is kept, and counts like the rest of the run. But answers are generated in
halves of it where memory is short (`evaluation.generation`), so of them only one has to fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from solotune.config.run_config import Choice, RunConfig
from solotune.config.settings import EVAL_ROWS, MemorySettings
from solotune.planning.gpus import Card
from solotune.planning.layer_profile import ModelShape, Workload
from solotune.planning.memory import footprint
from solotune.planning.peak_memory import PeakMemory
from solotune.planning.plan import SAFETY, Budget, Candidate
from solotune.planning.throughput import seconds
from solotune.units import format_bytes


def with_fewest_rows(settings: MemorySettings, work: Workload) -> Workload:
    """The work that training settings are chosen for: with one row in an evaluation pass, if the plan may choose."""
    return work.with_eval_rows(1) if settings.eval_rows_are_open else work.with_answers(1)


def with_most_rows(
    settings: MemorySettings, option: Candidate, shape: ModelShape, work: Workload, card: Card, budget: Budget
) -> tuple[Candidate, dict[str, object]]:
    """An option that fits with the fewest rows, with as many as fit; and the key that the plan sets."""
    is_open = settings.eval_rows_are_open
    most = work.eval_batch[0] if is_open else work.answers[0]
    if most < 2:
        return option, {}
    for rows in (most, *_halves(most)):
        fewer = work.with_eval_rows(rows) if is_open else work.with_answers(rows)
        used = footprint(shape, option.knobs, fewer, card)
        if budget.holds(used):
            break
    chosen = replace(option, footprint=used, seconds=seconds(shape, option.knobs, fewer, card))
    return chosen, {EVAL_ROWS: rows} if is_open and rows < most else {}


def fewest_rows(settings: MemorySettings, work: Workload) -> dict[str, object]:
    """The key that the plan sets where nothing fits."""
    return {EVAL_ROWS: 1} if settings.eval_rows_are_open and work.eval_batch[0] > 1 else {}


def eval_choices(
    config: RunConfig, resolved: RunConfig, option: Candidate, shape: ModelShape, work: Workload, card: Card, fits: bool
) -> list[Choice]:
    """Why a pass has fewer rows than the config's default."""
    rows, default = resolved.per_device_eval_batch_size, config.per_device_eval_batch_size
    if rows == default:
        return []
    because = "it needs the least memory"
    if fits:
        peaks = footprint(shape, option.knobs, work, card).peaks
        what, together = "an evaluation", work.eval_batch[0]
        if peaks.answers > peaks.evaluation:
            what, together = "generating answers", work.answers[0]
        needed = format_bytes(max(peaks.evaluation, peaks.answers))
        because = f"{what} with {together} rows at a time would need {needed}; the losses are the same"
    return [Choice(EVAL_ROWS, rows, because)]


def eval_changes(
    settings: MemorySettings, work: Workload, used: PeakMemory, budget: Budget
) -> Iterator[dict[str, object]]:
    """Single changes that lower the peak of evaluations and answers, if that is more than the budget."""
    if max(used.peaks.evaluation, used.peaks.answers) * SAFETY <= budget.bytes:
        return
    if not settings.eval_rows_are_open:
        for rows in _halves(work.eval_batch[0]):
            yield {EVAL_ROWS: rows}
    if used.peaks.answers * SAFETY > budget.bytes:
        for new_tokens in _halves(work.answers[2]):
            yield {"max_new_tokens": new_tokens}


def _halves(number: int) -> Iterator[int]:
    while number > 1:
        number //= 2
        yield number
