"""Pieces of work on threads of which each computes alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from solotune.hardware.cpu_threads import numbers_at_once, spread


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """torch has as many threads as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> int:
    """torch's threads during a test."""
    torch.set_num_threads(request.param)
    return request.param


def test_each_piece_is_taken_once_and_each_thread_computes_alone(threads: int) -> None:
    all_have_one = threading.Barrier(threads, timeout=30)
    taken, alone = list[int](), list[int]()

    def work(pieces: Iterator[int]) -> None:
        taken.append(next(pieces))
        all_have_one.wait()
        alone.append(torch.get_num_threads())
        taken.extend(pieces)

    spread(work, range(0, 100, 7))
    assert sorted(taken) == list(range(0, 100, 7)) and alone == [1] * threads
    later = list[int]()
    fresh = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert [torch.get_num_threads(), *later] == [threads, threads]


def test_no_more_threads_than_pieces_and_none_for_nothing(threads: int) -> None:
    calls = list[list[int]]()
    spread(lambda pieces: calls.append(list(pieces)), [5])
    assert calls == [[5]]
    spread(lambda pieces: calls.append(list(pieces)), [])
    assert calls[1:] == [[]]


def test_an_error_of_a_piece_comes_out(threads: int) -> None:
    def work(pieces: Iterator[int]) -> None:
        for piece in pieces:
            if piece == 3:
                raise MemoryError("piece 3")

    with pytest.raises(MemoryError, match="piece 3"):
        spread(work, range(9))
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("threads", "numbers"), [(1, 1 << 17), (2, 1 << 17), (6, 6 << 16), (16, 1 << 20), (90, 1 << 20)]
)
def test_pieces_grow_with_the_threads_of_which_16_are_used(threads: int, numbers: int) -> None:
    torch.set_num_threads(threads)
    assert numbers_at_once() == numbers
    calls = list[None]()
    spread(lambda pieces: calls.append(None), range(100))
    assert len(calls) == min(threads, 16) and torch.get_num_threads() == threads
