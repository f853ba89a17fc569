"""NF4 codes of a weight on the CPU: those of bitsandbytes, bit by bit, ten times as fast.

    scale of a block     a = max |w| over its 64 weights
    code of a weight     how many of the 15 bounds between NF4's 16 values w * (1 / a) exceeds

bitsandbytes has no 4-bit kernel for CPUs. Its plain one searches the bounds for each weight, which branches at random:
60 ns a weight, 7 minutes for an 8B model on one core. Here the range from -1 to 1 is cut into 65,536 cells, and a table
has the code of each. A cell that a bound lies in has none: its numbers, one of some thousands, are compared with the
bounds. A number's cell never falls as the number grows, so the cells above and below a bound's own are on one side.

Chunks are spread over threads, by NumPy: few long operations on each, since Python's lock is taken between them.

Products and comparisons are those of the plain kernel in float32, so the codes and the scales are equal to its own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

from solotune.hardware.bnb import functional as bnb

BLOCK = 64  # weights per scale: QLoRA's block size and bitsandbytes' default
CHUNK = 1 << 19  # weights that a thread takes at a time: 2 MiB in float32
CELLS = 1 << 15  # between 0 and 1
IN_CELL_OF_BOUND = 255
SMALLEST = np.float32(1e-38)  # a scale below it counts as this one, so that a block of zeros has a reciprocal
ZERO = 7  # the code of 0


def quantize_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, two in a byte, (n / 2, 1); a scale for each block in float32) of a weight on the CPU.

    The numbers must be finite.
    """
    flat = _numbers(weight)
    packed = torch.empty((-(-flat.size // 2), 1), dtype=torch.uint8)
    scales = torch.empty(-(-flat.size // BLOCK), dtype=torch.float32)
    whole = flat.size // BLOCK * BLOCK
    workers = min(torch.get_num_threads(), -(-whole // CHUNK))

    def work(worker: int) -> None:
        scratch = _Scratch(min(CHUNK, whole))
        for at in range(worker * CHUNK, whole, workers * CHUNK):
            end = min(at + CHUNK, whole)
            scratch.quantize(flat[at:end], packed.numpy()[at // 2 : end // 2, 0], scales.numpy()[at // 64 : end // 64])

    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, range(workers)))
    elif workers:
        work(0)
    if whole < flat.size:
        _quantize_rest(flat[whole:], packed.numpy()[whole // 2 :, 0], scales.numpy()[-1:])
    return packed, scales


class _Scratch:
    """Room for a chunk, so that no memory is fetched per operation."""

    def __init__(self, size: int) -> None:
        self.x, self.cells = np.empty(size, np.float32), np.empty(size, np.float32)
        self.numbers, self.codes = np.empty(size, np.int64), np.empty(size, np.uint8)

    def quantize(self, numbers: np.ndarray, packed: np.ndarray, scales: np.ndarray) -> None:
        """Write the codes and scales of whole blocks."""
        size = numbers.size
        x, magnitudes = self.x[:size], self.cells[:size]
        _to_float32(numbers, x)
        np.abs(x, out=magnitudes)
        bits = magnitudes.view(np.int32).reshape(-1, BLOCK)  # ordered as the numbers, and faster: no test for NaN
        np.maximum.reduce(bits, axis=1, out=scales.view(np.int32))
        blocks = x.reshape(-1, BLOCK)
        np.multiply(blocks, (np.float32(1) / np.maximum(scales, SMALLEST))[:, None], out=blocks)
        _pack(self._codes(x), packed)

    def _codes(self, x: np.ndarray) -> np.ndarray:
        """How many bounds each number exceeds."""
        cells, numbers, codes = self.cells[: x.size], self.numbers[: x.size], self.codes[: x.size]
        np.copyto(numbers, _cell(x, cells), casting="unsafe")
        np.take(_table(), numbers, out=codes, mode="clip")
        near = np.flatnonzero(codes == IN_CELL_OF_BOUND)
        codes[near] = _searched(x[near])
        return codes


def _quantize_rest(numbers: np.ndarray, packed: np.ndarray, scales: np.ndarray) -> None:
    """The last block, which is not full: bitsandbytes divides by its scale instead."""
    x = np.empty(numbers.size, np.float32)
    _to_float32(numbers, x)
    scales[0] = np.maximum(np.abs(x).max(), SMALLEST)
    codes = np.full(2 * packed.size, ZERO, np.uint8)
    codes[: x.size] = _searched(x / scales[0])
    _pack(codes, packed)


def _numbers(weight: torch.Tensor) -> np.ndarray:
    """The weight as a flat array; bfloat16, which NumPy lacks, as its bits."""
    flat = weight.detach().contiguous().view(-1)
    return flat.view(torch.uint16).numpy() if flat.dtype == torch.bfloat16 else flat.numpy()


def _to_float32(numbers: np.ndarray, out: np.ndarray) -> None:
    if numbers.dtype == np.uint16:
        bits = out.view(np.uint32)
        bits[:] = numbers
        np.left_shift(bits, np.uint32(16), out=bits)
    else:
        np.copyto(out, numbers)


def _cell(x: np.ndarray, out: np.ndarray) -> np.ndarray:
    """x * CELLS + CELLS in float32, whose whole part is the number of the cell."""
    np.multiply(x, np.float32(CELLS), out=out)
    return np.add(out, np.float32(CELLS), out=out)


@cache
def _table() -> np.ndarray:
    """Code of each cell, or IN_CELL_OF_BOUND."""
    bounds = _bounds()
    cells = _cell(bounds, np.empty_like(bounds)).astype(np.int64)
    codes = np.searchsorted(cells, np.arange(2 * CELLS + 1)).astype(np.uint8)
    codes[cells] = IN_CELL_OF_BOUND
    return codes


def _searched(x: np.ndarray) -> np.ndarray:
    """How many bounds each number exceeds, by search."""
    return np.searchsorted(_bounds(), x).astype(np.uint8)


def _pack(codes: np.ndarray, packed: np.ndarray) -> None:
    """Two codes in a byte, the first one in its upper half."""
    pairs = codes.view("<u2")  # first + 256 x second
    packed[:] = (pairs << 4) | (pairs >> 8)


@cache
def _bounds() -> np.ndarray:
    """The middle between neighbours of NF4's 16 values, in float32."""
    values = bnb.get_4bit_type("nf4", device="cpu")
    return ((values[:-1] + values[1:]) / 2).numpy()
