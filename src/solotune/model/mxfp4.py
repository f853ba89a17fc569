"""Unpack experts that a checkpoint holds in MXFP4 (gpt-oss).

    X_blocks   uint8 (E, O, G, 16)   two 4-bit codes a byte, the low half first; G groups of 32 along the input
    X_scales   uint8 (E, O, G)       exponent of each group's scale, plus 127
    X          (E, G * 32, O)        code * 2^(exponent - 127), transposed as the architecture multiplies it

Every value of this product is exact in bfloat16, so nothing is lost. Format: OCP Microscaling Formats v1.0, E2M1 with
E8M0 scales.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

CODES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of E2M1 without a sign; the fourth bit is the sign
BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32


def unpacked_name(key: str) -> str | None:
    """Name of the tensor that a packed part belongs to; None if the name is not that of a part."""
    return next((key.removesuffix(part) for part in (BLOCKS, SCALES) if key.endswith(part)), None)


def part_of(key: str, name: str) -> str:
    """`_blocks` or `_scales` if the tensor `key` of a file is that part of the model's tensor `name`, else empty."""
    return next((part for part in (BLOCKS, SCALES) if key.endswith(part) and not name.endswith(part)), "")


def missing_part(name: str, parts: Collection[str]) -> list[str]:
    """The part of a packed tensor that is not among `parts` although the other one is."""
    found = [part for part in (BLOCKS, SCALES) if name + part in parts]
    return [BLOCKS if found == [SCALES] else SCALES] if len(found) == 1 else []


def part_shape(part: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a packed part of a tensor with this shape (E, I, O)."""
    experts, inside, outside = shape
    groups = (experts, outside, inside // GROUP)
    return (*groups, GROUP // 2) if part == BLOCKS else groups


def unpack(blocks_EOGB: torch.Tensor, scales_EOG: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor (E, I, O) of packed blocks and scales."""
    positive = torch.tensor(CODES, dtype=dtype)
    codes = torch.cat([positive, -positive])
    experts = []
    for blocks_OGB, scales_OG in zip(blocks_EOGB, scales_EOG, strict=True):  # one by one: an index takes 8 bytes
        pairs = torch.stack([blocks_OGB & 15, blocks_OGB >> 4], dim=-1).flatten(-2).long()
        values_OGV = torch.ldexp(codes[pairs], scales_OG.int()[..., None] - 127)
        experts.append(values_OGV.flatten(-2).T)
    return torch.stack(experts)
