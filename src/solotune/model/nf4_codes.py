"""NF4 codes of a weight on the CPU: those of bitsandbytes, bit by bit, ten times as fast.

    scale of a block     a = max |w| over its 64 weights
    code of a weight     how many of the 15 bounds between NF4's 16 values w * (1 / a) exceeds

bitsandbytes has no 4-bit kernel for CPUs. Its plain one searches the bounds for each weight, which branches at random:
60 ns a weight, 7 minutes for an 8B model on one core. Here the range from -1 to 1 is cut into 32,768 cells, and a table
has the code of each. A cell that a bound lies in has none: its numbers, one of some thousands, are compared with the
bounds. A number's cell never falls as the number grows, so the cells above and below a bound's own are on one side.

Chunks are spread over threads. Each operation takes torch or NumPy, whichever is faster at it.

Products and comparisons are those of the plain kernel in float32, so the codes and the scales are equal to its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import torch

from solotune.hardware.bnb import functional as bnb
from solotune.hardware.cpu_threads import numbers_at_once, spread

BLOCK = 64  # weights per scale: QLoRA's block size and bitsandbytes' default
CELLS = 1 << 14  # between 0 and 1
ROUNDS_TO_CELLS = 1.5 * 2**23 / CELLS  # float32 numbers near this one are 1 / CELLS apart
IN_CELL_OF_BOUND = 0x80
UPPER_BITS = np.uint64(0x8080808080808080)  # of eight codes
SMALLEST = 1e-38  # a scale below it counts as this one, so that a block of zeros has a reciprocal
ZERO = 7  # the code of 0


def quantize_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, two in a byte, (n / 2, 1); a scale for each block in float32) of a weight on the CPU.

    The numbers must be finite.
    """
    flat = weight.detach().contiguous().view(-1)
    size, whole = len(flat), len(flat) // BLOCK * BLOCK
    packed = np.empty(-(-size // 2), np.uint8)  # of NumPy, which asks for large pages: faster to touch first
    scales, step = torch.empty(-(-size // BLOCK)), numbers_at_once()

    def work(starts: Iterator[int]) -> None:
        scratch = None
        for at in starts:
            end = min(at + step, whole)
            if scratch is None or scratch.size != end - at:  # only the last chunk is smaller
                scratch = _Scratch(end - at)
            scratch.quantize(flat[at:end], packed[at // 2 : end // 2], scales[at // BLOCK : end // BLOCK])

    spread(work, range(0, whole, step))
    if whole < size:
        _quantize_rest(flat[whole:].float().numpy(), packed[whole // 2 :], scales[-1:].numpy())
    return torch.from_numpy(packed)[:, None], scales


class _Scratch:
    """Room for a chunk and its views, so that no memory is fetched per operation, and few operations are needed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.x, self.cells = torch.empty(size), torch.empty(size)
        self.codes, self.pairs = np.empty(size, np.uint8), np.empty(size // 2, np.uint16)
        self.factors = torch.empty(size // BLOCK, 1)
        self._x_blocks, self._cells_blocks = self.x.view(-1, BLOCK), self.cells.view(-1, BLOCK)
        self._codes = torch.from_numpy(self.codes)

    def quantize(self, numbers: torch.Tensor, packed: np.ndarray, scales: torch.Tensor) -> None:
        """Write the codes and scales of whole blocks."""
        self.x.copy_(numbers)
        torch.abs(self.x, out=self.cells)
        torch.amax(self._cells_blocks, 1, out=scales)
        torch.clamp(scales, min=SMALLEST, out=self.factors.view(-1))
        self._x_blocks.mul_(self.factors.reciprocal_())
        self._find_codes()
        _pack(self.codes, packed, self.pairs)

    def _find_codes(self) -> None:
        """How many bounds each number exceeds."""
        torch.index_select(_table(), 0, _cell(self.x, self.cells), out=self._codes)
        (near,) = (self.codes.view(np.uint64) & UPPER_BITS != 0).nonzero()  # eight at a time, since they are few
        self.codes.reshape(-1, 8)[near] = _searched(self.x.numpy().reshape(-1, 8)[near])


def _quantize_rest(x: np.ndarray, packed: np.ndarray, scales: np.ndarray) -> None:
    """The last block, which is not full: bitsandbytes divides by its scale instead."""
    scales[0] = np.maximum(np.abs(x).max(), np.float32(SMALLEST))
    codes = np.full(2 * packed.size, ZERO, np.uint8)
    codes[: x.size] = _searched(x / scales[0])
    _pack(codes, packed, np.empty(packed.size, np.uint16))


def _cell(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """x * CELLS rounded to a whole number, from 0 on if it is positive and from 2^16 down if it is negative.

    The sum rounds: its lowest bits are that number.
    """
    return torch.add(x, ROUNDS_TO_CELLS, out=out).view(torch.int32).bitwise_and_(0xFFFF)


@cache
def _table() -> torch.Tensor:
    """Code of each cell, or IN_CELL_OF_BOUND."""
    bounds = torch.from_numpy(_bounds())
    cells = _cell(bounds, torch.empty_like(bounds)).to(torch.int16)  # negative again
    codes = torch.searchsorted(cells, torch.arange(1 << 16).to(torch.int16)).to(torch.uint8)
    codes[cells.long() & 0xFFFF] = IN_CELL_OF_BOUND
    return codes


def _searched(x: np.ndarray) -> np.ndarray:
    """How many bounds each number exceeds, by search."""
    return np.searchsorted(_bounds(), x).astype(np.uint8)


def _pack(codes: np.ndarray, packed: np.ndarray, pairs: np.ndarray) -> None:
    """Two codes in a byte, the first one in its upper half."""
    np.multiply(codes.view("<u2"), np.uint16(1 + (1 << 12)), out=pairs)  # (first + 256 second) (1 + 16 x 256) ...
    np.right_shift(pairs, 8, out=pairs)  # ... whose upper byte is 16 first + second
    np.copyto(packed, pairs, casting="unsafe")


@cache
def _bounds() -> np.ndarray:
    """The middle between neighbours of NF4's 16 values, in float32."""
    values = bnb.get_4bit_type("nf4", device="cpu")
    return ((values[:-1] + values[1:]) / 2).numpy()
