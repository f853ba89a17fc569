"""Pieces of work on the CPU, spread over threads of which each computes alone.

    spread(work, range(0, size, numbers_at_once()))     work(starts), with those starts that no other thread has taken

torch spreads one operation at a time over its threads, which wait for each other after each and spin while they wait.
Where other threads want the cores too (to read, hash and write, as a merge does), that took up to six times the
processor time. A thread that takes whole pieces waits for none, and what it works on stays in its cache.

Before and after each operation a thread takes Python's lock, which one holds at a time. Once threads wait for it, each
passes it on to one that sleeps, and waking that takes longer than the operation: 4 threads on 2 cores took five times
the processor time at 8,192 numbers each. So pieces grow with the number of threads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

NUMBERS_PER_THREAD = 1 << 16  # of a piece: together they then need Python's lock for half of the time at most
MAX_THREADS = 16  # a piece for more of them leaves the cache of a core


def numbers_at_once() -> int:
    """How many numbers of a tensor a piece should have, for as many threads as `spread` uses."""
    return NUMBERS_PER_THREAD * max(2, _threads())


def _threads() -> int:
    return min(torch.get_num_threads(), MAX_THREADS)


def spread(work: Callable[[Iterator[int]], object], pieces: Iterable[int]) -> None:
    """Call `work` on as many threads as torch has, each time with an iterator over pieces that no other has taken.

    There are MAX_THREADS at most. Keep the operations of a piece few and long: between them Python's lock is taken.
    """
    left = deque(pieces)

    def taken() -> Iterator[int]:
        with suppress(IndexError):
            while True:
                yield left.popleft()

    before, threads = torch.get_num_threads(), min(_threads(), len(left))
    if threads <= 1:
        work(taken())
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done in [pool.submit(work, taken()) for _ in range(threads)]:
                done.result()
    finally:
        torch.set_num_threads(before)  # threads that have not computed yet would start with the number set last
