"""How much a text shares with the nearest of other texts, and how much such texts share with one another anyway.

    known = KnownTexts(train)                  pairs of neighbouring words, and how many texts have each
    nearest = known.nearest(validation)        Nearest: for each text its nearest known one
    usual = known.nearest_of_own(300)          the control: known texts against the other known texts

A pair of words counts by its information, log(N / texts that have it), so that what all texts of a task share (a
template, a greeting) counts nothing, and a value of a slot little. Case and punctuation do not count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from solotune.diagnosis.facts.row_arrays import evenly

# Chinese, Japanese and Korean do not put blanks between words: each character counts as one
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
NUM_WORDS = 300_000
"""Words read in all; with more, only the first of each text."""
COMMON = 0.25
"""A pair in more than this share of the texts says nothing."""
RARE = 3
"""A pair in at most this many texts is no property of the task: a passage that few texts have."""


@dataclass(frozen=True)
class Nearest:
    """For each of some texts, what it shares with the known text that is nearest to it."""

    shares: np.ndarray
    """float64 (V,), 0 to 1: information of the shared pairs by that of all pairs of the poorer of both; NaN without"""
    rare: np.ndarray
    """int64 (V,): its pairs that at most RARE known texts have, and the nearest has"""
    uncommon: np.ndarray
    """int64 (V,): its pairs that are not common"""
    row: np.ndarray
    """int64 (V,): the nearest text"""


class KnownTexts:
    """The texts that others are compared with."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._count = len(texts)
        self._ids: dict[str, int] = {}
        self._longest = NUM_WORDS // max(len(texts), 1)
        self._own = [self._pairs(text) for text in texts]
        pairs = np.concatenate(self._own) if texts else np.zeros(0, np.int64)
        rows = np.repeat(np.arange(len(texts)), [len(own) for own in self._own])
        order = np.argsort(pairs, kind="stable")
        self._pairs_in_order, self._rows = pairs[order], rows[order]
        begins = np.flatnonzero(np.concatenate((np.ones(min(len(pairs), 1), bool), np.diff(self._pairs_in_order) != 0)))
        self._known, self._begins = self._pairs_in_order[begins], begins
        self._texts_with = np.diff(begins, append=len(pairs))
        counts = self._texts_with <= max(COMMON * self._count, 1)
        each = np.repeat(np.where(counts, np.log(self._count / np.maximum(self._texts_with, 1)), 0.0), self._texts_with)
        self._information = np.bincount(self._rows, each, minlength=self._count)  # of each text

    def _pairs(self, text: str) -> np.ndarray:
        """int64, sorted, each once: neighbouring words, the edges of the text among them."""
        found = islice(_WORDS.finditer(text.casefold()), max(self._longest, 32))
        words = [self._ids.setdefault(word[0], len(self._ids) + 1) for word in found]
        edged = np.array([0, *words, 0], np.int64)
        return np.unique((edged[:-1] << 32) | edged[1:]) if words else np.zeros(0, np.int64)

    def nearest(self, texts: Sequence[str]) -> Nearest:
        """Other texts against the known ones."""
        return self._gathered([self._nearest_to(self._pairs(text), None) for text in texts])

    def nearest_of_own(self, count: int) -> Nearest:
        """At most `count` known texts, evenly spaced, each against the other known ones."""
        return self._gathered([self._nearest_to(self._own[row], row) for row in evenly(range(self._count), count)])

    @staticmethod
    def _gathered(found: list[tuple[float, int, int, int]]) -> Nearest:
        shares, rare, uncommon, row = zip(*found, strict=True) if found else ((), (), (), ())
        return Nearest(np.array(shares, float), np.array(rare, int), np.array(uncommon, int), np.array(row, int))

    def _nearest_to(self, pairs: np.ndarray, own: int | None) -> tuple[float, int, int, int]:
        """What `Nearest` has, for one text."""
        none = (float("nan"), 0, 0, -1)
        if not len(self._known) or not len(pairs):
            return none
        places = np.minimum(np.searchsorted(self._known, pairs), len(self._known) - 1)
        others = np.where(self._known[places] == pairs, self._texts_with[places], 0) - (own is not None)
        counts = others <= max(COMMON * self._count, 1)
        places, others = places[counts], others[counts]
        information = np.log(self._count / np.maximum(others, 1))
        whole = float(information.sum())
        if whole <= 0:
            return none
        is_known = others > 0
        sizes = others[is_known] + (own is not None)
        at = np.repeat(self._begins[places[is_known]], sizes) + _within(sizes)
        rows, weights = self._rows[at], np.repeat(information[is_known], sizes)
        shared = np.bincount(rows, weights, minlength=self._count)
        if own is not None:
            shared[own] = -1.0
        best = int(shared.argmax())
        rare = int((rows[np.repeat(others[is_known] <= RARE, sizes)] == best).sum())
        share = max(float(shared[best]), 0.0) / max(min(whole, float(self._information[best])), 1e-9)
        return min(share, 1.0), rare, int(counts.sum()), best


def _within(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ... of each run: [2, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
