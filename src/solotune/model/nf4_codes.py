"""NF4 codes of a weight on the CPU: those of bitsandbytes, bit by bit, ten times as fast.

    scale of a block     a = max |w| over its 64 weights
    code of a weight     how many of the 15 bounds between NF4's 16 values w * (1 / a) exceeds

bitsandbytes has no 4-bit kernel for CPUs. Its plain one searches the bounds for each weight, which branches at random:
60 ns a weight, 7 minutes for an 8B model on one core. Here each bound is compared with a whole chunk at a time, 64
weights per instruction, and chunks that stay in a core's cache are spread over threads. NumPy, because torch compares
floats one by one if the result is to take less than a float.

All operations are those of the plain kernel in float32, in its order, so the codes and the scales are equal to its own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import torch

from solotune.hardware.bnb import functional as bnb

BLOCK = 64  # weights per scale: QLoRA's block size and bitsandbytes' default
CHUNK = 1 << 17  # weights that a thread takes at a time: 0.5 MiB in float32
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
        scratch = _Scratch()
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

    def __init__(self) -> None:
        self.x, self.magnitudes = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
        self.is_above, self.codes = np.empty(CHUNK, np.bool_), np.empty(CHUNK, np.uint8)

    def quantize(self, numbers: np.ndarray, packed: np.ndarray, scales: np.ndarray) -> None:
        """Write the codes and scales of whole blocks."""
        size = numbers.size
        x, magnitudes = self.x[:size], self.magnitudes[:size]
        _to_float32(numbers, x)
        np.abs(x, out=magnitudes)
        bits = magnitudes.view(np.int32).reshape(-1, BLOCK)  # ordered as the numbers, and faster: no test for NaN
        np.maximum.reduce(bits, axis=1, out=scales.view(np.int32))
        blocks = x.reshape(-1, BLOCK)
        np.multiply(blocks, (np.float32(1) / np.maximum(scales, SMALLEST))[:, None], out=blocks)
        _pack(_codes(x, self.is_above[:size], self.codes[:size]), packed)


def _quantize_rest(numbers: np.ndarray, packed: np.ndarray, scales: np.ndarray) -> None:
    """The last block, which is not full: bitsandbytes divides by its scale instead."""
    x = np.empty(numbers.size, np.float32)
    _to_float32(numbers, x)
    scales[0] = np.maximum(np.abs(x).max(), SMALLEST)
    codes = np.full(2 * packed.size, ZERO, np.uint8)
    _codes(x / scales[0], np.empty(x.size, np.bool_), codes[: x.size])
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


def _codes(x: np.ndarray, is_above: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """How many bounds each number exceeds, in `codes`."""
    first, *others = _bounds()
    np.greater(x, first, out=codes.view(np.bool_))
    for bound in others:
        np.greater(x, bound, out=is_above)
        np.add(codes, is_above.view(np.uint8), out=codes)
    return codes


def _pack(codes: np.ndarray, packed: np.ndarray) -> None:
    """Two codes in a byte, the first one in its upper half."""
    pairs = codes.view("<u2")  # first + 256 x second
    packed[:] = (pairs << 4) | (pairs >> 8)


@cache
def _bounds() -> list[np.float32]:
    """The middle between neighbours of NF4's 16 values, in float32."""
    values = bnb.get_4bit_type("nf4", device="cpu")
    return list(((values[:-1] + values[1:]) / 2).numpy())
