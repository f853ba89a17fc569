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
from solotune.hardware.cpu_threads import spread

BLOCK = 64  # weights per scale: QLoRA's block size and bitsandbytes' default
CHUNK = 1 << 17  # weights that a thread takes at a time: all it needs of them stays in the cache of a core
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
    scales = torch.empty(-(-size // BLOCK))

    def work(starts: Iterator[int]) -> None:
        scratch = _Scratch(min(CHUNK, whole))
        for at in starts:
            end = min(at + CHUNK, whole)
            scratch.quantize(flat[at:end], packed[at // 2 : end // 2], scales[at // BLOCK : end // BLOCK])

    spread(work, range(0, whole, CHUNK))
    if whole < size:
        _quantize_rest(flat[whole:].float().numpy(), packed[whole // 2 :], scales[-1:].numpy())
    return torch.from_numpy(packed)[:, None], scales


class _Scratch:
    """Room for a chunk, so that no memory is fetched per operation."""

    def __init__(self, size: int) -> None:
        self.x, self.cells = torch.empty(size), torch.empty(size)
        self.codes, self.pairs = np.empty(size, np.uint8), np.empty(size // 2, np.uint16)

    def quantize(self, numbers: torch.Tensor, packed: np.ndarray, scales: torch.Tensor) -> None:
        """Write the codes and scales of whole blocks."""
        size = len(numbers)
        x, magnitudes = self.x[:size].copy_(numbers), self.cells[:size]
        torch.abs(x, out=magnitudes)
        torch.amax(magnitudes.view(-1, BLOCK), 1, out=scales)
        x.view(-1, BLOCK).mul_(scales.clamp(min=SMALLEST).reciprocal_()[:, None])
        _pack(self._codes(x), packed, self.pairs[: size // 2])

    def _codes(self, x: torch.Tensor) -> np.ndarray:
        """How many bounds each number exceeds."""
        codes = self.codes[: len(x)]
        torch.index_select(_table(), 0, _cell(x, self.cells[: len(x)]), out=torch.from_numpy(codes))
        (near,) = (codes.view(np.uint64) & UPPER_BITS != 0).nonzero()  # eight at a time, since they are few
        codes.reshape(-1, 8)[near] = _searched(x.numpy().reshape(-1, 8)[near])
        return codes


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
