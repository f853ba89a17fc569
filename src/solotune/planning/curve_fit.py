"""The profile of one layer at one length, and the polynomial through the profiles of several lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from solotune.planning.layer_profile import LayerCost, Matmul, Pass, Polynomial

LENGTHS = (512, 1024, 2048)
"""Lengths (tokens) at which a layer is profiled: long enough that no weight is as small as an activation."""
ROWS = 2
"""Rows of a profiled batch: with one row some architectures skip a copy that they make for several."""
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "scaled_matmul", "dequant_matmul")
IsFrozen = Callable[[int, int], bool]
"""Whether a product with a matrix of this shape uses a base weight."""


@dataclass
class LayerProfile:
    """One layer at one length: sums over its forward and its backward; the fields of `LayerCost` before the fit."""

    kept: float = 0
    output: float = 0
    forward_peak: float = 0
    backward_extra: float = 0
    passes: list[PassCounts] = field(default_factory=list)


@dataclass
class PassCounts:
    """The work of one pass: products (operations, bytes, whether frozen), the bytes of everything else, kernels."""

    matmuls: list[tuple[float, float, bool]] = field(default_factory=list)
    other_bytes: float = 0
    num_kernels: int = 0


def first(result: Any) -> torch.Tensor:
    """A layer's hidden states; some architectures return a tuple that starts with them."""
    return result if isinstance(result, torch.Tensor) else result[0]


def fit(looks: Sequence[tuple[int, LayerProfile]], rows: int, how: Any) -> LayerCost:
    """Fit one `LayerCost` to profiles at several lengths of `rows` rows."""

    def through(values: Sequence[float]) -> Polynomial:
        constant, per_token, squared = growth_through([tokens for tokens, _ in looks], values)
        return Polynomial(constant, per_token / rows, squared / rows)

    def one(number: int) -> Pass:
        works = [look.passes[number] for _, look in looks]
        same = len({len(work.matmuls) for work in works}) == 1
        count = len(works[0].matmuls) if same else 0
        matmuls = tuple(
            Matmul(
                through([work.matmuls[i][0] for work in works]),
                through([work.matmuls[i][1] for work in works]),
                works[0].matmuls[i][2],
            )
            for i in range(count)
        )
        return Pass(matmuls, through([work.other_bytes for work in works]), works[0].num_kernels)

    fields = ("kept", "output", "forward_peak", "backward_extra")
    kept, output, forward_peak, extra = (through([getattr(look, name) for _, look in looks]) for name in fields)
    return LayerCost(kept, output, forward_peak, extra, forward=one(0), backward=one(1), how=how)


def growth_through(tokens: Sequence[int], values: Sequence[float]) -> Polynomial:
    """The polynomial through (tokens, value) pairs: two give a line, three a parabola."""
    if len(tokens) == 2:
        slope = (values[1] - values[0]) / (tokens[1] - tokens[0])
        return Polynomial(values[0] - slope * tokens[0], slope)
    (a, b, c), (p, q, r) = tokens, values
    first_slope, second_slope = (q - p) / (b - a), (r - q) / (c - b)
    square = (second_slope - first_slope) / (c - a)
    slope = first_slope - square * (a + b)
    return Polynomial(p - slope * a - square * a * a, slope, square)
