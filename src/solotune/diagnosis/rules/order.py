"""S8, the order and the lengths of the rows: F40 to F42."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.conversations import answers_of, chats_of
from solotune.diagnosis.facts.derived import (
    is_ours,
    mapping,
    number,
    out_of_memory,
    planned_steps,
    row_lengths,
    setting,
    steps_of_epochs,
)
from solotune.diagnosis.facts.rows import examples_of, rows_of
from solotune.diagnosis.rules import rule
from solotune.diagnosis.rules.loop import last_step, tail_decides
from solotune.diagnosis.run_facts import RunFacts

SORTED = 0.7
"""Rank correlation of position and length (or answer); a shuffled file of a hundred rows reaches it with probability
1e-15."""
CHANCE = 4.0
"""Standard deviations of the rank correlation in random order."""
LONG_TAIL, ALONE = 5.0, 4.0
"""The longest row divided by the 95th percentile (real chats have 3 to 5), and by the fourth longest: the tail of real
data goes on, so its longest rows are near each other."""


@rule("F40", needs=("settings",))
def sorted_rows(run_facts: RunFacts) -> Signal | None:
    """F40: the rows are sorted, and are trained on in that order.

    Sees: no shuffling, and rows whose position in the file shows their length or their answer; batches whose rows
    follow the order of the file.
    Why: the loss goes up and down with the file; the final model is biased to the last part of the file.
    Not: sorted files with a sampler that shuffles, which is the Trainer's default: the sampler matters, not the file;
    F77, which repeats rows after a resume only.
    Fix: shuffle the training rows.
    Wrong when: the order is a curriculum. Control: rows in random order, whose rank correlation has a standard
    deviation of 1 / sqrt(rows).
    Source: Karpathy's recipe; 1.94 instead of 1.72 (measured).
    """
    get = run_facts.settings.get
    if is_ours(run_facts) or get("shuffle") is not False:
        return None
    rows = examples_of(run_facts)
    if len(rows) < 20:
        return None
    what, found = order_of(run_facts)
    if found < max(SORTED, CHANCE / math.sqrt(len(rows))):
        return None
    says = f"rows are not shuffled, and their order in the file follows {what} (rank correlation {found:.2f})"
    return Signal("F40", "measured", says, 0.85, {"correlation": found}, fix="shuffle the training rows")


def order_of(run_facts: RunFacts) -> tuple[str, float]:
    """The property that the order of the rows follows most, and the absolute rank correlation of both."""
    rows, answers = examples_of(run_facts), answers_of(chats_of(run_facts))
    length = np.array([len(row.input_ids) for row in rows], float)
    learned = np.array([int(row.loss_mask.sum()) for row in rows], float)
    first = np.array([int(row.input_ids[row.loss_mask][0]) if row.loss_mask.any() else -1 for row in rows], float)
    keys = {"their length": length, "the length of their answers": learned, "how their answers begin": first}
    if len(answers) == len(rows):
        keys["their answers"] = np.unique(answers, return_inverse=True)[1].astype(float)
    found = {what: abs(_rank_correlation(values)) for what, values in keys.items()}
    if len(answers) == len(rows):
        found["their answers"] = max(found["their answers"], _run_share(answers))
    best = max(found, key=lambda what: found[what])
    return best, found[best]


def _rank_correlation(values: np.ndarray) -> float:
    _, ranks, counts = np.unique(values, return_inverse=True, return_counts=True)
    if len(counts) < 3:
        return 0.0
    middle = (np.cumsum(counts) - (counts - 1) / 2)[ranks]
    return float(np.corrcoef(middle, np.arange(len(values)))[0, 1])


def _run_share(answers: list[str]) -> float:
    """The share of repeated answers that are next to an equal one: near 1 only if the file is grouped by answer."""
    counts = Counter(answers)
    repeated = sum(count - 1 for count in counts.values())
    neighbours = sum(a == b for a, b in itertools.pairwise(answers))
    expected = sum((count / len(answers)) ** 2 for count in counts.values())
    enough = repeated >= 0.5 * len(answers) and len(counts) >= 2 and expected < 0.5
    return neighbours / repeated if enough else 0.0


@rule("F41", needs=("settings",))
def repeated_by_workers(run_facts: RunFacts) -> Signal | None:
    """F41: every data loader worker reads all of the data.

    Sees: rows that are N times in the batches and once in the data, with N workers; a run of N times the planned steps.
    Why: an epoch is N times as long, and rows are memorised.
    Not: F39, where the file repeats the rows; several epochs.
    Fix: shard the iterable dataset by worker (`torch.utils.data.get_worker_info`).
    Wrong when: rows are repeated on purpose. Control: batches of one epoch at most; the steps that the epochs make,
    unless `max_steps` sets them.
    Source: datasets#3423, pytorch#30599.
    """
    workers = setting(run_facts, "dataloader_num_workers") or 0
    if is_ours(run_facts) or workers < 2:
        return None
    fix = "shard the iterable dataset by worker (torch.utils.data.get_worker_info), or dataloader_num_workers: 0"
    seen = [row.input_ids.tobytes() for batch in run_facts.batches for row in rows_of(batch)]
    own = [row.input_ids.tobytes() for row in run_facts.train]
    again = 1 - len(set(seen)) / len(seen) if seen else 0.0
    is_one_epoch = not own or len(seen) <= len(own)
    if len(seen) >= 8 and again >= 0.4 and is_one_epoch and (not own or len(set(own)) > 0.9 * len(own)):
        says = f"{again:.0%} of the rows in the batches repeat an earlier row, with {workers:.0f} workers"
        return Signal("F41", "invariant", says, 0.9, {"again": again, "workers": workers}, fix=fix, affected=again)
    is_stream = run_facts.settings.get("iterable") is True or run_facts.settings.get("streaming") is True
    total, planned = planned_steps(run_facts), steps_of_epochs(run_facts)
    is_set = (setting(run_facts, "max_steps") or 0) > 0
    if total and planned and not is_set and abs(total / planned / workers - 1) < 0.1:
        says = f"the run has {total:,} steps instead of the {planned:,} for its rows, with {workers:.0f} workers"
        return Signal("F41", "measured", says, 0.8, {"steps": total, "planned": planned}, fix=fix)
    if is_stream and run_facts.settings.get("sharded") is False:
        says = f"{workers:.0f} workers read an iterable dataset that is not sharded"
        return Signal("F41", "invariant", says, 0.85, {"workers": workers}, fix=fix)
    return None


@rule("F42", probes=("P11",))
def long_tail(run_facts: RunFacts) -> Signal | None:
    """F42: a few very long rows set the peak memory, and may come late in the run.

    Sees: rows with more tokens than the model has positions (`max_position_embeddings`); a longest row that is many
    times the 95th percentile, and one of: an out-of-memory error after the first steps; a GPU with enough memory for
    all rows but the longest; no other row that is nearly as long.
    Why: the run crashes at the step in which the long row comes, or the model reads positions that it has never seen.
    Not: F71 and F72, which crash at once; a memory leak, which grows at constant length.
    Fix: set `max_length` to the 95th or 99th percentile, and try the longest batch first.
    Wrong when: something else used the memory. Control: the rows next in length. A long tail that goes on is usual for
    chats, and a remark.
    Source: litgpt#159, LlamaFactory#3668, transformers#11388.
    """
    lengths = row_lengths(run_facts)
    limit = setting(run_facts, "max_length")
    if len(lengths) and (beyond := _beyond_positions(run_facts, lengths)):
        return beyond
    if is_ours(run_facts) or len(lengths) < 20:
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
    if longest < ALONE * others:
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
