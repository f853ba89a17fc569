"""Run programs side by side, each in a process of its own, forked from one that has torch loaded.

for result in forked(programs, jobs=2, until=math.inf, ask=run_one, failed=known_of, limit=900): ...
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

P = TypeVar("P")
Result = dict[str, Any]


def forked(
    chosen: Sequence[P],
    jobs: int,
    until: float,
    ask: Callable[[P], Result],
    failed: Callable[[P, str, float], Result],
    limit: float,
) -> Iterator[Result]:
    """Results as they come.

    Args:
        until: time of `time.perf_counter` after which no program starts.
        ask: makes the result, in the child.
        failed: the result of a program that ended or was ended, from the reason and its seconds.
        limit: seconds after which a program is ended.
    """
    fork = multiprocessing.get_context("fork")
    waiting, running = list(reversed(chosen)), []
    while waiting or running:
        if time.perf_counter() > until:
            waiting.clear()
        while waiting and len(running) < jobs:
            program = waiting.pop()
            ours, theirs = fork.Pipe(duplex=False)
            process = fork.Process(target=_child, args=(ask, program, theirs))
            process.start()
            theirs.close()
            running.append((program, process, ours, time.perf_counter()))
        for entry in list(running):
            program, process, pipe, started = entry
            seconds = time.perf_counter() - started
            late = seconds > limit
            if pipe.poll(0.05) or late or not process.is_alive():
                yield _received(pipe) or failed(program, "took too long" if late else "the process ended", seconds)
                if late:
                    process.kill()
                process.join()
                running.remove(entry)


def _child(ask: Callable[[P], Result], program: P, pipe: Any) -> None:
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        pipe.send(ask(program))
    os._exit(0)


def _received(pipe: Any) -> Result | None:
    try:
        return pipe.recv() if pipe.poll(0) else None
    except EOFError:  # it ended without an answer
        return None
