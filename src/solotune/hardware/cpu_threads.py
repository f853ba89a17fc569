"""Pieces of work on the CPU, spread over threads of which each computes alone.

    spread(work, range(0, size, CHUNK))       work(starts), on each thread with those starts that no other has taken

torch spreads one operation at a time over its threads, which wait for each other after each and spin while they wait.
Where other threads want the cores too (to read, hash and write, as a merge does), that took up to six times the
processor time. A thread that takes whole pieces waits for none, and what it works on stays in its cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch


def spread(work: Callable[[Iterator[int]], object], pieces: Iterable[int]) -> None:
    """Call `work` on as many threads as torch has, each time with an iterator over pieces that no other has taken.

    Keep the operations of a piece few and long: between them Python's lock is taken.
    """
    left = deque(pieces)

    def taken() -> Iterator[int]:
        with suppress(IndexError):
            while True:
                yield left.popleft()

    threads = min(before := torch.get_num_threads(), len(left))
    if threads <= 1:
        work(taken())
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done in [pool.submit(work, taken()) for _ in range(threads)]:
                done.result()
    finally:
        torch.set_num_threads(before)  # threads that have not computed yet would start with the number set last
