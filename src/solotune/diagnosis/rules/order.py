"""S8, the order and the lengths of the rows: F40 to F42."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import (
    is_ours,
    mapping,
    number,
    out_of_memory,
    planned_steps,
    row_lengths,
    setting,
    steps_of_an_epoch,
    steps_of_epochs,
)
from solotune.diagnosis.facts.row_order import FEWEST, LENGTHS, order_of, read_in_order
from solotune.diagnosis.facts.rows import examples_of
from solotune.diagnosis.facts.texts import Batches
from solotune.diagnosis.rules import rule
from solotune.diagnosis.rules.loop import last_step, tail_decides
from solotune.diagnosis.run_facts import RunFacts

SORTED = 0.7
"""Rank correlation of position and length (or answer); a shuffled file of a hundred rows reaches it with probability
1e-15."""
CHANCE = 4.0
"""Standard deviations of the rank correlation in random order."""
ONE_PASS = 1.2
"""Epochs, up to which an order from short to long rows is a curriculum."""
AGAIN, SURELY_AGAIN = 0.05, 0.4
"""Share of the rows in the batches of one epoch that came before: more than a few, and every second one."""
WHOLE_PASS = 1.5
"""Times the steps that the rows make, without an end of the epoch."""
MOSTLY_ONCE = 0.9
"""Different rows / rows of data whose rows are there once."""
LONG_TAIL, ALONE = 5.0, 4.0
"""The longest row divided by the 95th percentile (real chats have 3 to 5), and by the fourth longest: the tail of real
data goes on, so its longest rows are near each other."""
TWICE = 2.0
"""Both limits times this for solotune, which plans the memory of its longest batch: 500 real chats reach 7.8 and 6."""


@rule("F40", needs=("settings",))
def sorted_rows(run_facts: RunFacts) -> Signal | None:
    """F40: the rows are sorted, and are trained on in that order.

    Sees: a file whose order follows the length of the rows, their answers or what they are about (sources one after
    another); and that rows were read in this order: no shuffling in the settings, batches whose rows follow the file, a
    loss with the same ups and downs in every epoch.
    Why: the loss goes up and down with the file; the final model is biased to the last part of the file.
    Not: sorted files with a sampler that shuffles, which is the Trainer's default: the sampler matters, not the file;
    F77, which repeats rows after a resume only.
    Fix: shuffle the training rows.
    Wrong when: the order is a curriculum (one that the settings ask for is not reported; from short to long in one
    epoch it is a remark). Control: rows in random order, whose rank correlation has a standard deviation of
    1 / sqrt(rows); epochs with other batches each, whose losses do not correlate.
    Source: Karpathy's recipe; 1.94 instead of 1.72 (measured).
    """
    rows = examples_of(run_facts)
    if is_ours(run_facts) or len(rows) < FEWEST or _is_curriculum(run_facts):
        return None
    what, found = order_of(run_facts)
    if found < max(SORTED, CHANCE / math.sqrt(len(rows))) or not (how := read_in_order(run_facts)):
        return None
    says = f"{how}, and the order of the file follows {what} ({found:.2f}; a random order has 0)"
    numbers, fix = {"correlation": found}, "shuffle the training rows"
    epochs = (planned_steps(run_facts) or 0) / (steps_of_an_epoch(run_facts) or 1)
    if what in LENGTHS and epochs <= ONE_PASS and run_facts.settings.get("shuffle") is not False:
        return Signal("F40", "remark", f"{says}, as in a curriculum", 0.3, numbers, fix=fix)
    return Signal("F40", "measured", says, 0.85, numbers, fix=fix)


def _is_curriculum(run_facts: RunFacts) -> bool:
    """Whether the settings ask for an order: `curriculum_sampling` (Axolotl) and the like."""
    return any("curriculum" in str(key).lower() and value for key, value in run_facts.settings.values.items())


@rule("F41", needs=("settings",))
def repeated_by_workers(run_facts: RunFacts) -> Signal | None:
    """F41: every data loader worker reads all of the data.

    Sees: rows that come again in the batches before all rows came, though the data has them once, with several workers;
    a run of N times the planned steps; an epoch of the log that is longer than its rows make it.
    Why: an epoch is N times as long, and rows are memorised.
    Not: F39, where the file repeats the rows; several epochs.
    Fix: shard the iterable dataset by worker (`torch.utils.data.get_worker_info`).
    Wrong when: rows are repeated on purpose (a sampler with weights or replacement, if the settings name it, is asked
    nothing). Control: batches of one epoch at most; the steps that the epochs make, unless `max_steps` sets them.
    Source: datasets#3423, pytorch#30599.
    """
    workers = setting(run_facts, "dataloader_num_workers") or 0
    if is_ours(run_facts) or workers < 2:
        return None
    fix = "shard the iterable dataset by worker (torch.utils.data.get_worker_info), or dataloader_num_workers: 0"
    get = run_facts.settings.get
    if not any(get(key) for key in ("replacement", "weighted_sampler", "sampler_weights", "group_by_length")):
        again, rows = _again_in_one_epoch(run_facts)
        if rows >= 8 and again >= max(3, AGAIN * rows):
            says = f"{again} of the first {rows} rows repeat an earlier one before all rows came, with {workers:.0f} "
            says += "workers; in the data each is there once"
            kind, weight = ("invariant", 0.9) if again >= SURELY_AGAIN * rows else ("measured", 0.75)
            numbers = {"again": again, "rows": rows, "workers": workers}
            return Signal("F41", kind, says, weight, numbers, fix=fix, affected=again / rows)
    total, planned = planned_steps(run_facts), steps_of_epochs(run_facts)
    is_set = (setting(run_facts, "max_steps") or 0) > 0
    if total and planned and not is_set and abs(total / planned / workers - 1) < 0.1:
        says = f"the run has {total:,} steps instead of the {planned:,} for its rows, with {workers:.0f} workers"
        return Signal("F41", "measured", says, 0.8, {"steps": total, "planned": planned}, fix=fix)
    if (longer := _epoch_in_the_log(run_facts)) is not None and longer[0] >= WHOLE_PASS * longer[1]:
        says = f"an epoch of the log has at least {longer[0]:,} steps, though the rows make {longer[1]:,}; "
        says += f"{workers:.0f} workers read them"
        return Signal("F41", "measured", says, 0.75, {"steps": longer[0], "planned": longer[1]}, fix=fix)
    is_stream = get("iterable") is True or get("streaming") is True
    if is_stream and get("sharded") is False:
        says = f"{workers:.0f} workers read an iterable dataset that is not sharded"
        return Signal("F41", "invariant", says, 0.85, {"workers": workers}, fix=fix)
    return None


def _again_in_one_epoch(run_facts: RunFacts) -> tuple[int, int]:
    """(rows that came more often than they are in the data, rows) of the batches of at most one epoch."""
    if "batches" in run_facts.missing:
        return 0, 0  # they are not the trainer's
    own = Counter(row.input_ids.astype(np.int64).tobytes() for row in run_facts.train)
    documents = Batches.of(run_facts).documents[: len(run_facts.train) or None]
    seen = Counter(document.ids.astype(np.int64).tobytes() for document in documents)
    if own and len(own) <= MOSTLY_ONCE * own.total():
        return 0, 0
    return sum(max(count - own.get(key, 1), 0) for key, count in seen.items()), seen.total()


def _epoch_in_the_log(run_facts: RunFacts) -> tuple[int, int] | None:
    """(steps of an epoch by the log at least, steps that the rows make); None if either is not known."""
    trace, planned = run_facts.trace, steps_of_an_epoch(run_facts)
    if trace is None or len(trace.step_S) < 3 or not planned or not np.isfinite(trace.epoch_S).all():
        return None
    slope = np.diff(trace.epoch_S) / np.maximum(np.diff(trace.step_S), 1)
    usual = float(np.median(slope))
    if usual <= 0:
        return None
    jumps = np.flatnonzero(slope > 2 * usual)  # an iterable data set has no length: only its end counts as an epoch
    last = int(trace.step_S[jumps[0]] if len(jumps) else trace.step_S[-1])
    is_counted = abs(usual * trace.step_S[-1] - 1) > 0.02 and not len(jumps)  # not steps / all steps
    return (round(1 / usual), planned) if is_counted else (last, planned)


@rule("F42", probes=("P11",))
def long_tail(run_facts: RunFacts) -> Signal | None:
    """F42: a few very long rows set the peak memory, and may come late in the run.

    Sees: rows with more tokens than the model has positions (`max_position_embeddings`); a longest row that is many
    times the 95th percentile, and one of: an out-of-memory error after the first steps; a GPU with enough memory for
    all rows but the longest; no other row that is nearly as long.
    Why: the run crashes at the step in which the long row comes, or the model reads positions that it has never seen.
    Not: F71 and F72, which crash at once; a memory leak, which grows at constant length; packing, whose sequences have
    one length.
    Fix: set `max_length` to the 95th or 99th percentile, and try the longest batch first.
    Wrong when: something else used the memory. Control: the rows next in length. A long tail that goes on is usual for
    chats, and a remark.
    Source: litgpt#159, LlamaFactory#3668, transformers#11388.
    """
    lengths = row_lengths(run_facts)
    limit = setting(run_facts, "max_length")
    if len(lengths) and (beyond := _beyond_positions(run_facts, lengths)):
        return beyond
    if len(lengths) < 20 or run_facts.settings.get("packing"):
        return None
    if limit:
        lengths = np.minimum(lengths, limit)
    usual, longest, others = float(np.quantile(lengths, 0.95)), float(lengths.max()), float(np.sort(lengths)[-4])
    ratio = longest / max(usual, 1)
    fix, numbers = f"max_length: {int(-(-usual * 1.25 // 64) * 64)}", {"longest": longest, "p95": usual}
    affected = float((lengths > 2 * usual).mean())
    if out_of_memory(run_facts) is not None and last_step(run_facts) > 3 and ratio > 2:
        says = (
            f"out of memory after step {last_step(run_facts):,}; the longest row has {longest:,.0f} tokens, 95 % "
            f"of the rows at most {usual:,.0f}"
        )
        return Signal("F42", "measured", says, 0.85, numbers, fix=fix, affected=affected)
    if ratio > 2 and tail_decides(run_facts):
        says = f"the longest row has {longest:,.0f} tokens and does not fit; 95 % have at most {usual:,.0f} and fit"
        return Signal("F42", "measured", says, 0.8, numbers, fix=fix, affected=affected)
    if ratio < LONG_TAIL:
        return None
    says = f"the longest row has {longest:,.0f} tokens, {ratio:.0f} times the 95th percentile"
    sure = TWICE if is_ours(run_facts) else 1.0
    if ratio < sure * LONG_TAIL or longest < sure * ALONE * others:
        return Signal("F42", "remark", says, 0.3, numbers, fix=fix, affected=affected)
    says += f", and {longest / others:.0f} times the fourth longest: its batch needs as many times the memory"
    return Signal("F42", "measured", says, 0.7, numbers, fix=fix, affected=affected)


def _beyond_positions(run_facts: RunFacts, lengths: np.ndarray) -> Signal | None:
    """Rows, or whole packs, that are longer than the model's positions; scaled ones count as what they reach."""
    config = run_facts.model_config.get("text_config") or run_facts.model_config
    found = (number(config.get(name)) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    positions = next((int(value) for value in found if value is not None and value > 0), 0)
    scaling = mapping(config.get("rope_scaling") or config.get("rope_parameters"))
    original = number(scaling.get("original_max_position_embeddings"))
    if factor := number(scaling.get("factor")):
        positions = max(positions, int(factor * (original or positions)))
    limit = setting(run_facts, "max_length")
    rows = np.minimum(lengths, limit) if limit else lengths
    if not positions or run_facts.settings.get("packing") or not (rows > positions).any():
        return None
    count = int((rows > positions).sum())
    says = (
        f"{count:,} of {len(rows):,} rows are longer than the model's {positions:,} positions: up to {rows.max():,.0f}"
    )
    numbers = {"rows": count, "longest": int(rows.max()), "positions": positions}
    return Signal("F42", "invariant", says, 0.9, numbers, fix=f"max_length: {positions}", affected=count / len(rows))
