"""The order of the training rows: in the file, and in the training.

order_of(run_facts)          what the order of the file follows, and how closely
read_in_order(run_facts)     how it is known that the rows came in the order of the file; empty if it is not
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from solotune.diagnosis.facts.conversations import answers_of, chats_of
from solotune.diagnosis.facts.derived import is_ours
from solotune.diagnosis.facts.row_arrays import evenly
from solotune.diagnosis.facts.rows import examples_of
from solotune.diagnosis.facts.texts import Batches
from solotune.diagnosis.run_facts import RunFacts, Trace

LENGTHS = ("their length", "the length of their answers")
FEWEST, MOST_READ = 20, 600
"""Rows that an order can be seen in, and rows that are compared with each other."""
COMMON = 0.4
"""Share of the rows from which a token belongs to the template or the language, not to what a row is about."""
NEAR, FAR = 0.1, 0.3
"""Of the file: distances of rows of one part, and of rows of different parts."""
ALIKE = 1.5
"""Similarity of near rows divided by that of far rows; 1.0 +- 0.1 in files in random order."""
FOLLOWS, LEAST_PAIRS = 0.9, 16
"""Share of the neighbours in batches that are neighbours in the file, and how many are needed."""
LEAST_ENTRIES = 6
"""Logged steps of an epoch."""
CERTAIN = 4.5
"""Standard deviations of a correlation by chance."""


# --- in the file


def order_of(run_facts: RunFacts) -> tuple[str, float]:
    """The property that the order of the rows follows most, and how closely: from 0 (random) to 1."""
    rows, chats = examples_of(run_facts), chats_of(run_facts)
    answers = answers_of(chats)
    length = np.array([len(row.input_ids) for row in rows], float)
    learned = np.array([int(row.loss_mask.sum()) for row in rows], float)
    first = np.array([int(row.input_ids[row.loss_mask][0]) if row.loss_mask.any() else -1 for row in rows], float)
    keys = {LENGTHS[0]: length, LENGTHS[1]: learned, "how their answers begin": first}
    if len(answers) == len(rows):
        keys["their answers"] = np.unique(answers, return_inverse=True)[1].astype(float)
    found = {what: abs(_rank_correlation(values)) for what, values in keys.items()}
    if len(chats) == len(rows):
        letters = np.array([sum(len(str(message["content"])) for message in chat) for chat in chats], float)
        found[LENGTHS[0]] = max(found[LENGTHS[0]], abs(_rank_correlation(letters)))
    if len(answers) == len(rows):
        found["their answers"] = max(found["their answers"], _run_share(answers))
    found["what they are about"] = _blocks([row.input_ids for row in rows])
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


def _blocks(rows: Sequence[np.ndarray]) -> float:
    """How far rows of one part of the file are more alike than rows of different parts: 0 if not, 1 if it has parts.

    Parts are sources, topics, tasks or languages that follow each other. Rows are alike if they share tokens that not
    all rows have.
    """
    chosen = [set(rows[i].tolist()) for i in evenly(range(len(rows)), MOST_READ)]
    count = len(chosen)
    if count < 3 * FEWEST:
        return 0.0
    having = Counter(token for row in chosen for token in row)
    telling = {token: c for token, c in having.items() if 2 <= c < COMMON * count}
    vocabulary = {token: n for n, token in enumerate(telling)}
    has = np.zeros((count, len(vocabulary)), np.float32)
    for r, row in enumerate(chosen):
        has[r, [vocabulary[token] for token in row if token in vocabulary]] = 1
    has *= np.log(count / np.array(list(telling.values()), np.float32))  # rare tokens tell more
    size = np.maximum(np.linalg.norm(has, axis=1), 1e-6)
    alike = (has @ has.T) / np.outer(size, size)
    distance = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
    near = alike[(distance > 0) & (distance <= NEAR * count)].mean()
    far = alike[distance > FAR * count].mean()
    return float(np.clip((near / max(far, 1e-3) - 1) / (ALIKE - 1), 0.0, 1.0)) if near > 0.02 else 0.0


# --- in the training


def read_in_order(run_facts: RunFacts) -> str:
    """How it is known that the rows came in the order of the file; empty if they did not, or if it is not known."""
    get = run_facts.settings.get
    if get("shuffle") is False or get("train_sampling_strategy") == "sequential":
        return "rows are not shuffled"
    followed = _in_batches(run_facts)
    if followed is not None:
        return "batches have the rows in the order of the file" if followed >= FOLLOWS else ""
    trace = run_facts.trace
    if trace is not None and _repeats_each_epoch(trace) >= CERTAIN:
        return "the loss goes through the same ups and downs in each epoch, as it does without shuffling"
    return ""


def _in_batches(run_facts: RunFacts) -> float | None:
    """Share of neighbours in the batches that are neighbours in the file; None if the batches are not the trainer's."""
    if not run_facts.batches or not run_facts.train or "batches" in run_facts.missing or is_ours(run_facts):
        return None
    places: dict[bytes, list[int]] = {}
    for place, row in enumerate(run_facts.train):
        places.setdefault(np.asarray(row.input_ids, np.int64).tobytes(), []).append(place)
    keys = [document.ids.astype(np.int64).tobytes() for document in Batches.of(run_facts).documents]
    pairs = [(places[a], places[b]) for a, b in itertools.pairwise(keys) if a in places and b in places]
    if len(pairs) < LEAST_PAIRS:
        return None
    return sum(any(one + 1 in after for one in before) for before, after in pairs) / len(pairs)


def _repeats_each_epoch(trace: Trace) -> float:
    """Standard deviations, by chance, of the correlation between the losses of one epoch and those of the next.

    Each epoch is taken without its own trend. With shuffling every epoch has other batches, and nothing is left.
    """
    has = np.isfinite(trace.loss_S) & np.isfinite(trace.epoch_S) & (trace.loss_S > 0)
    epoch, loss = trace.epoch_S[has], np.log(trace.loss_S[has])
    if len(loss) < 2 * LEAST_ENTRIES or trace.seams:
        return 0.0
    size = round(1 / max(float(np.median(np.diff(epoch))), 1e-9))
    if not LEAST_ENTRIES <= size <= len(loss) / 1.5 or abs(np.median(np.diff(epoch)) * size - 1) > 0.5 / size:
        return 0.0
    products, before, after, free = 0.0, 0.0, 0.0, 0
    for begin in range(0, len(loss) - size, size):
        count = min(size, len(loss) - size - begin)
        if count < LEAST_ENTRIES:
            continue
        one, other = (_without_trend(loss[at : at + count]) for at in (begin, begin + size))
        products, before, after = products + one @ other, before + one @ one, after + other @ other
        free += count - 3
    if free < LEAST_ENTRIES or min(before, after) <= 0:
        return 0.0
    return math.atanh(min(products / math.sqrt(before * after), 0.999)) * math.sqrt(free)


def _without_trend(values: np.ndarray) -> np.ndarray:
    """Minus its quadratic fit."""
    at = np.linspace(-1, 1, len(values))
    return values - np.polyval(np.polyfit(at, values, 2), at)
