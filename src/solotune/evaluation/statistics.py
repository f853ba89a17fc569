"""Standard errors and tests for two models that are compared on the same held-out rows.

Groups, not rows, are independent
---------------------------------
The pieces of one conversation, near-duplicates, and the parts of a long row are alike, so they count as one observation
(a *group*: the split kept it on one side). G groups with sums l_g of losses and n_g of weights:

    L = sum(l_g) / sum(n_g)      e_g = l_g - L n_g      stderr = sqrt(G / (G - 1) * sum(e_g^2)) / sum(n_g)

the error of a ratio estimator (Cochran, Sampling Techniques, 3rd ed., section 2.11), with groups as units; G / (G - 1)
is the correction for few groups. Of a single group (`split_by: shop` may hold out one shop) nothing can be said about
groups to come: then rows are the units, and the figures are about this group only.

Tests of a difference
---------------------
Base and tuned are compared row by row, because a row that is hard for one is hard for the other: the errors of the two
losses say little about their difference. If the tuned model were no better and no worse, each group's difference could
as well have the other sign. So the p-value is the share of sign flips with a sum at least as large as the one seen
(Fisher's randomisation test): all 2^G of them for few groups, 10,000 random ones otherwise. It needs no normal
distribution. Of exact match, with each row a group of its own, this is McNemar's exact test, computed directly.

Why not the bootstrap: a resample of few rows has less spread than the rows have, so a paired bootstrap calls nothing a
difference too often. `bench/results/paired_test.md` has both, where nothing differs, on 20, 60 and 200 rows.

Two to five groups cannot give p < 0.05 by sign flips (2 of 2^5 are 0.06). There the test of a loss is Student's,
L / stderr with G - 1 degrees of freedom: right if the groups' differences are roughly normal, and sharp only if they
agree well. Shares of right answers are too coarse for it (equal by chance in all groups), so they stay with sign flips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LEVEL = 0.05
"""A difference with a p-value below this is called better or worse."""
FEWEST_FLIPPED = 6
"""Fewer groups than this are tested by Student's t."""
_ALL_FLIPS = 13  # groups: 2^13 sign flips are fewer than the random ones
_RANDOM_FLIPS = 9_999
_CHUNK = 500


def independent(groups: Sequence[str]) -> Sequence[str] | None:
    """The groups of the rows, if they are the units of errors and tests; None: the rows are."""
    return groups if 1 < len(set(groups)) < len(groups) else None


def ratio_and_stderr(
    sums: Sequence[float], weights: Sequence[float], groups: Sequence[str] | None = None
) -> tuple[float, float]:
    """sum(sums) / sum(weights) and its standard error over independent groups (infinite for a single one).

    Args:
        sums: one number per row.
        weights: of each row.
        groups: the group of each row; None: each row is one.
    """
    total = float(sum(weights))
    ratio = float(sum(sums)) / total
    errors = by_group([s - ratio * n for s, n in zip(sums, weights, strict=True)], groups)
    num = len(errors)
    return ratio, math.sqrt(num / (num - 1) * float((errors**2).sum())) / total if num > 1 else math.inf


def by_group(values: Sequence[float], groups: Sequence[str] | None) -> np.ndarray:
    """float64 (G,): the sum of each group's values, in order of appearance."""
    if groups is None:
        return np.asarray(values, np.float64)
    numbers = dict.fromkeys(groups)
    place = {group: number for number, group in enumerate(numbers)}
    sums = np.zeros(len(place))
    np.add.at(sums, [place[group] for group in groups], values)
    return sums


def loss_difference_p(
    differences: Sequence[float], weights: Sequence[float], groups: Sequence[str] | None = None
) -> float:
    """Two-sided p-value that paired differences of losses have a mean of 0, over independent groups.

    Args:
        differences: of each row's sum of losses.
        weights: of each row.
        groups: the group of each row; None: each row is one.
    """
    if groups is not None and len(set(groups)) < FEWEST_FLIPPED:
        mean, stderr = ratio_and_stderr(differences, weights, groups)
        if 0 < stderr < math.inf:
            return student_p(mean / stderr, len(set(groups)) - 1)
    return sign_flip_p(differences, groups)


def student_p(t: float, degrees: int) -> float:
    """Two-sided p-value of Student's t for 1 to 4 degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    inside = {
        1: 2 / math.pi * angle,
        2: sine,
        3: 2 / math.pi * (angle + sine * cosine),
        4: sine * (1 + cosine**2 / 2),
    }[degrees]
    return max(0.0, 1 - inside)


def sign_flip_p(differences: Sequence[float], groups: Sequence[str] | None = None) -> float:
    """Two-sided p-value of the sum of paired differences, if each group's could as well have the other sign.

    Args:
        differences: one number per row.
        groups: the group of each row; None: each row is one.
    """
    sums_G = by_group(differences, groups)
    sums_G = sums_G[sums_G != 0]
    rounding = 1e-12 * float(np.abs(sums_G).sum())  # of equal sums, added in another order
    seen = abs(float(sums_G.sum())) - rounding
    if len(sums_G) <= _ALL_FLIPS:
        numbers = np.arange(2 ** len(sums_G))[:, None]
        signs = 1.0 - 2.0 * (numbers >> np.arange(len(sums_G)) & 1)
        return float((np.abs(signs @ sums_G) >= seen).mean())
    random, as_large = np.random.default_rng(0), 0
    for begin in range(0, _RANDOM_FLIPS, _CHUNK):
        count = min(_CHUNK, _RANDOM_FLIPS - begin)
        signs = 1.0 - 2.0 * random.integers(0, 2, (count, len(sums_G)), np.int8)
        as_large += int((np.abs(signs @ sums_G) >= seen).sum())
    return (1 + as_large) / (1 + _RANDOM_FLIPS)  # the signs that were seen are one of the flips


def mcnemar_p(base: Sequence[bool], tuned: Sequence[bool], groups: Sequence[str] | None = None) -> float:
    """Two-sided p-value that two models get the same share of rows right.

    Over rows it is McNemar's exact test: of the rows that only one of them gets right, the share that is the tuned
    model's is compared with one half. Over groups it is `sign_flip_p`.
    """
    differences = [int(t) - int(b) for b, t in zip(base, tuned, strict=True)]
    if groups is not None:
        return sign_flip_p(differences, groups)
    gained, lost = differences.count(1), differences.count(-1)
    tail = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (gained + lost))


def verdict(difference: float, p_value: float) -> str:
    """`better`, `worse` or `inside the noise`, of a tuned loss minus the base's."""
    if not p_value < LEVEL or difference == 0:
        return "inside the noise"
    return "better" if difference < 0 else "worse"
