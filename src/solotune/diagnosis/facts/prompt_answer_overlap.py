"""Do answers belong to their prompts? Told by words, without a model.

    found = alignment_of(pairs)        (prompt, answer) texts in the order of the file

Claims
------
An answer claims the prompt with which it shares the most information: the sum of log(n / prompts with the word) over
shared words, numbers among them. In correct data answers claim their own prompts, or by accident others; accidents hit
prompts at random, also those that their own answers claim. Answers that were shuffled or shifted claim each prompt
once, and only prompts that their own answers do not claim. So the null is a random map of as many answers to prompts,
and the own prompts of displaced answers must be no nearer to them than any prompt.

Shifts
------
Labels, short answers and other languages share no words with prompts. But similar prompts have similar answers, at
shift 0 in correct data. If they do at one other shift, and nowhere else, the answers were shifted by it. The null is
all the other shifts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEAST_ROWS = 24
NUM_ROWS, NUM_CHARACTERS = 1000, 1500  # and of each text
NUM_SHIFTED, NUM_PARTS = 320, 4  # rows that are compared at all shifts, and parts of the file with a quarter of them
COMMON = 0.25  # of the prompts: a more frequent word says nothing
CERTAIN = 0.8  # of log(n): a claim is about one prompt of n
AHEAD = 1.15  # times the second-best prompt
AWAY = 0.5  # of the claimed prompt's information: more, and the own prompt fits too
BEYOND = 4.0  # standard deviations of the null
ONCE = 0.6  # of the displaced answers claim a prompt that no other answer claims
DISPLACED = 0.1  # of the rows
DEGENERATE = 0.2  # median deviation as a share of the standard deviation of all other shifts
SHARP, FLAT = 8.0, 2.5  # robust standard deviations of the similarity at one shift, and at shift 0
COPY = 0.8  # Jaccard: the answer is the prompt of another row (translations in both directions)

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")


@dataclass(frozen=True)
class Alignment:
    """Which prompts the answers claim."""

    rows: int
    claims: int  # answers that are about one prompt
    own: int  # of them, about their own
    displaced: tuple[int, ...]  # answers about another prompt, and not about their own
    claimed: tuple[int, ...]  # these prompts
    once: int  # prompts of `displaced` that only one answer claims
    by_chance: float  # of a random map: the mean, and the standard deviation
    spread: float
    own_rank: float  # of the own prompts of displaced answers among all: 0.5 if they are like any prompt
    shift: int | None  # the answer of row i belongs to the prompt of row i + shift, where one shift explains most

    @property
    def is_whole(self) -> bool:
        """Answers claim their own prompts far more often than by chance: five standard deviations."""
        chance = self.claims / self.rows
        return self.own > 0.2 * self.claims and self.own > chance + 5 * math.sqrt(chance + 1)

    @property
    def is_displaced(self) -> bool:
        """Answers claim other prompts, each once, beyond a random map."""
        count = len(self.displaced)
        if count < max(10, DISPLACED * self.rows) or self.once < ONCE * count:
            return False
        is_like_any = self.own_rank < 0.55 + 2 * 0.29 / math.sqrt(count)
        return is_like_any and self.once > self.by_chance + BEYOND * self.spread


def alignment_of(pairs: Sequence[tuple[str, str]]) -> Alignment | None:
    """Alignment of (prompt, answer) texts; None if there are few."""
    pairs = pairs[:NUM_ROWS]
    count = len(pairs)
    if count < LEAST_ROWS:
        return None
    prompts, answers = ([_words(text) for text in texts] for texts in zip(*pairs, strict=True))
    rows_with: dict[str, list[int]] = {}
    for row, words in enumerate(prompts):
        for word in words:
            rows_with.setdefault(word, []).append(row)
    most = max(COMMON * count, 2)
    rows_of = {word: np.array(rows) for word, rows in rows_with.items() if len(rows) <= most}
    told = np.zeros(count)  # information of each prompt; a long one shares much with every answer
    for rows in rows_of.values():
        told[rows] += math.log(count / len(rows))
    scale = 1 / np.sqrt(told + np.median(told) + 1)
    claimed, is_own, ranks = np.full(count, -1), np.zeros(count, bool), np.full(count, 0.5)
    for row, words in enumerate(answers):
        known = [rows_of[word] for word in words if word in rows_of]
        if not known:
            continue
        sizes = np.array([len(rows) for rows in known])
        shared = np.bincount(np.concatenate(known), np.repeat(np.log(count / sizes), sizes), minlength=count)
        shared *= scale
        best = int(shared.argmax())
        top, own = float(shared[best]), float(shared[row])
        shared[best] = -1.0
        is_own[row] = own > top / AHEAD
        if top < CERTAIN * math.log(count) * scale[best] or shared.max() > top / AHEAD:
            continue
        if best != row and (
            is_own[row] or own > AWAY * top or len(words & prompts[best]) >= COPY * len(words | prompts[best])
        ):
            continue
        claimed[row] = best
        ranks[row] = ((shared < own).sum() + 0.5 * (shared == own).sum()) / count
    return _judged(claimed, is_own, ranks)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text[-NUM_CHARACTERS:].casefold()))


def _judged(claimed: np.ndarray, is_own: np.ndarray, ranks: np.ndarray) -> Alignment:
    count = len(claimed)
    away = np.flatnonzero((claimed >= 0) & (claimed != np.arange(count)))
    free = count - int(is_own.sum())
    once = {int(row) for row in claimed[away] if not is_own[row]}
    missed = math.exp(-len(away) / count)  # share of the prompts that a random map does not claim
    variance = free * missed * (1 - missed) - free**2 / count * len(away) / count * missed**2
    offsets = Counter((claimed[away] - away).tolist())
    offset, most = offsets.most_common(1)[0] if offsets else (0, 0)
    return Alignment(
        rows=count,
        claims=int((claimed >= 0).sum()),
        own=int(((claimed == np.arange(count)) & (claimed >= 0)).sum()),
        displaced=tuple(map(int, away)),
        claimed=tuple(map(int, claimed[away])),
        once=len(once),
        by_chance=free * (1 - missed),
        spread=math.sqrt(max(variance, 1.0)),
        own_rank=float(ranks[away].mean()) if len(away) else 0.5,
        shift=int(offset) if most > 0.5 * len(away) else None,
    )


class Shift(NamedTuple):
    """Similar prompts have similar answers at one shift, and not at 0."""

    rows: int  # the answer of row i belongs to the prompt of row i + rows
    strength: float  # at this shift, and at 0: robust standard deviations of all shifts
    at_zero: float
    share: float  # of the parts of the file


def shift_of(pairs: Sequence[tuple[str, str]]) -> Shift | None:
    """The shift of the answers, of the file or of a part of it; None if there is none."""
    if len(pairs) < 2 * LEAST_ROWS:
        return None
    if found := _shift_of(pairs[:NUM_SHIFTED]):
        return found
    size = min(len(pairs) // NUM_PARTS, NUM_SHIFTED // NUM_PARTS)
    parts = [pairs[begin : begin + size] for begin in np.linspace(0, len(pairs) - size, NUM_PARTS).astype(int)]
    shifted = [found for part in parts if len(part) >= 2 * LEAST_ROWS and (found := _shift_of(part))]
    return max(shifted, key=lambda one: one.strength)._replace(share=len(shifted) / NUM_PARTS) if shifted else None


def _shift_of(pairs: Sequence[tuple[str, str]]) -> Shift | None:
    count = len(pairs)
    prompts, answers = ([_words(text) for text in texts] for texts in zip(*pairs, strict=True))
    alike = [_centred(table @ table.T) for table in (_table(prompts, prompts), _table(answers, answers))]
    crossed = _centred(_table(prompts, prompts, least=1) @ _table(answers, prompts, least=1).T)
    twice, beside = np.tile(alike[1], (2, 2)), np.tile(crossed, (1, 2))
    scores: list[np.ndarray] = [
        np.array([beside[:, k : k + count].trace() for k in range(count)]),  # words of prompts in answers
        np.array([np.vdot(alike[0], twice[k : k + count, k : k + count]) for k in range(count)]),
    ]
    for found in scores:
        middle = np.median(found)
        best, other = np.argsort(-found)[:2].tolist()
        spread, usual = 1.4826 * float(np.median(np.abs(found - middle))), float(np.delete(found, best).std())
        if spread < DEGENERATE * usual:  # of words that few rows share, most shifts have exactly as many
            spread = usual
        strength = (found - middle) / max(spread, 1e-12)
        if best and strength[best] >= SHARP and strength[0] <= FLAT and strength[other] <= strength[best] / 2:
            rows = -best if best <= count // 2 else count - best
            return Shift(rows, float(strength[best]), float(strength[0]), 1.0)
    return None


def _table(rows: Sequence[set[str]], known: Sequence[set[str]], least: int = 2) -> np.ndarray:
    """float32 (n, W): the information of each text's words, as a vector of length 1; W words of `known`."""
    common = Counter(word for words in known for word in words)
    places = {word: i for i, word in enumerate(w for w, n in common.items() if least <= n <= COMMON * 2 * len(known))}
    table = np.zeros((len(rows), max(len(places), 1)), np.float32)
    for row, words in enumerate(rows):
        for word in words & places.keys():
            table[row, places[word]] = math.log(len(known) / common[word])
    return table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-9)


def _centred(alike: np.ndarray) -> np.ndarray:
    """float64, with rows and columns that sum to 0."""
    alike = alike.astype(np.float64)
    return alike - alike.mean(0) - alike.mean(1)[:, None] + alike.mean()
