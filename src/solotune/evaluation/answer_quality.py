"""What generated answers are like, beside the references: do they end, repeat themselves, copy training answers?

    stop_rate     share of answers that end by themselves, not by `max_new_tokens`
    repetition    share of an answer's 4-grams that it has had before (seq-rep-4 of Welleck et al. 2019), mean over rows
    overlap       share of 8-grams of all answers that stand in an answer of the training rows. The reference answers
                  have an overlap too (set phrases, JSON keys): only what is above theirs is memorised

All n-grams are of token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from solotune.dataset import Example
from solotune.evaluation.answers import Answered

REPEATED, COPIED = 4, 8  # tokens of an n-gram
MOST_TRAINING_ROWS = 20_000
_FACTORS = np.random.default_rng(0).integers(1, 2**63, COPIED, dtype=np.uint64) | np.uint64(1)


@dataclass(frozen=True)
class AnswerQuality:
    """Figures of one model's answers; None: no answer is long enough."""

    stop_rate: float | None
    repetition: float | None
    overlap: float | None


def answer_quality(answered: Sequence[Answered], training_rows: Sequence[Example]) -> dict[str, Any] | None:
    """The JSON of `generation` in evaluation.json; None without answers.

    Training answers are searched in at most `MOST_TRAINING_ROWS` rows, spread evenly.
    """
    if not answered:
        return None
    sides = {
        "base": [one.base.ids for one in answered],
        "tuned": [one.tuned.ids for one in answered],
        "reference": [one.question.reference_ids for one in answered],
    }
    stopped = {
        "base": _mean([one.base.is_stopped for one in answered]),
        "tuned": _mean([one.tuned.is_stopped for one in answered]),
    }
    grams = {name: np.concatenate([_hashes(ids) for ids in texts]) for name, texts in sides.items()}
    step = -(-len(training_rows) // MOST_TRAINING_ROWS) or 1
    searched = range(0, len(training_rows), step)
    known = _in_training(np.unique(np.concatenate(list(grams.values()))), (training_rows[i] for i in searched))
    return {
        "rows": len(answered),
        "training_rows": len(searched),
        **{
            name: asdict(
                AnswerQuality(
                    stopped.get(name),
                    _mean([share for ids in texts if (share := repetition(ids)) is not None]),
                    _mean(np.isin(grams[name], known)),
                )
            )
            for name, texts in sides.items()
        },
    }


def repetition(ids: Sequence[int]) -> float | None:
    """Share of the 4-grams that stood in the ids before; None for fewer than 4 tokens."""
    grams = [tuple(ids[i : i + REPEATED]) for i in range(len(ids) - REPEATED + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def _mean(values: Sequence[float] | np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _hashes(ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """uint64 (T - 7,): a hash of each 8-gram."""
    array = np.asarray(ids, np.uint64)
    if len(array) < COPIED:
        return np.empty(0, np.uint64)
    return (np.lib.stride_tricks.sliding_window_view(array, COPIED) * _FACTORS).sum(1, dtype=np.uint64)


def _in_training(grams: np.ndarray, rows: Iterable[Example]) -> np.ndarray:
    """Those 8-grams that stand in an answer of the rows."""
    seen = np.zeros(len(grams), bool)
    for row in rows if len(grams) else ():
        for answer in _answers(row):
            found = _hashes(answer)
            places = np.searchsorted(grams, found).clip(max=len(grams) - 1)
            seen[places[grams[places] == found]] = True
    return grams[seen]


def _answers(row: Example) -> Iterator[np.ndarray]:
    """The stretches of ids that are trained on."""
    edges = np.flatnonzero(np.diff(row.loss_mask)) + 1
    for ids, mask in zip(np.split(row.input_ids, edges), np.split(row.loss_mask, edges), strict=True):
        if len(mask) and mask[0]:
            yield ids
