"""Hanging calls, stopped processes, outputs that are not read, clocks that jump.

Parts of `python -m bench.faults`; each returns its line of the table.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.faults_command import CHILD_SECONDS, Commands, stage_times
from bench.faults_run import Result


def hangs(work: Commands, count: int, seed: int) -> Result:
    """Calls that never come back, in several phases: ended within the limit and 5 s, the stacks written down.

    Exit code 9; where the call holds Python's lock the process is killed.
    """
    bad, delays, limit, mark = [], [], _limit(work), work.folder / "hung_at"
    for case in _some(HANGS, count):
        mark.unlink(missing_ok=True)
        child = work.start(["train", str(work.config)], lambda case=case: _hang(work, case, limit))
        ended = child.wait(limit + CHILD_SECONDS)
        stacks = work.run / "stacks.txt"
        where = ended.err + (stacks.read_text(errors="replace") if stacks.is_file() else "")
        hung_at = float(mark.read_text()) if mark.is_file() else child.started
        late = child.started + ended.seconds - hung_at - limit
        delays.append(late)
        expected = -signal.SIGKILL if "lock" in case else 9
        if ended.code != expected or not late < 5 or "_hang_now" not in where or "no progress for" not in ended.err:
            bad.append(f"hang, {case}: {ended.code} after {late:.1f} s\n{where[-1500:]}")
        elif problem := work.checkpoint_problem() or work.metrics_problem():
            bad.append(f"hang, {case}: {problem}")
    return Result("hangs", len(delays), bad, note=f"ended {max(delays):.1f} s after the limit at most")


HANG_SECONDS = 3.0  # the limit in these runs, at least
HANGS = ("step holds Python's lock", "step reads from a FIFO", "tokenizer sleeps", "generation sleeps")


def _limit(work: Commands) -> float:
    """Seconds of silence that are a hang; a slow machine is none, so no less than all of a run takes there."""
    return max(HANG_SECONDS, work.usual_seconds)


def _hang(work: Commands, case: str, limit: float) -> None:
    """In the child: sets the limit, and has one function hang."""
    from solotune.dataset.chat.encode import Encoder
    from solotune.evaluation import generation
    from solotune.runtime import watchdog
    from solotune.training import loop

    _short_limit(watchdog, limit)

    def _hang_now(*_: Any, **__: Any) -> Any:
        (work.folder / "hung_at").write_text(str(time.monotonic()))
        if "sleeps" in case:
            time.sleep(1000)
        elif "FIFO" in case:
            fifo = work.folder / "fifo"
            with contextlib.suppress(FileExistsError):
                os.mkfifo(fifo)
            fifo.read_bytes()
        else:
            import ctypes

            while True:  # a signal ends a sleep
                ctypes.PyDLL(None).sleep(1000)

    if case.startswith("tokenizer"):
        os.environ["XDG_CACHE_HOME"] = str(work.folder / "no-cache")
        Encoder.encode = _hang_now  # type: ignore[method-assign]
    elif case.startswith("generation"):
        generation.generate_all = _hang_now
    else:
        plain, calls = loop.train_step, []

        def step(*args: Any, **keys: Any) -> Any:
            calls.append(1)
            return _hang_now() if len(calls) == 6 else plain(*args, **keys)

        loop.train_step = step


def _short_limit(watchdog: Any, seconds: float) -> None:
    watchdog.LIMIT_SECONDS = seconds
    watchdog.TIMES_LONGEST = watchdog.TIMES_EXPECTED = 0


def stopped_processes(work: Commands, count: int, seed: int) -> Result:
    """SIGSTOP for longer than the limit, then SIGCONT: no alarm, and the run ends well."""
    rng = random.Random(seed)
    begins = stage_times(work)
    bad, limit = [], _limit(work)
    for _ in range(count):
        from solotune.runtime import watchdog

        child = work.start(["train", str(work.config)], lambda: _short_limit(watchdog, limit))
        time.sleep(rng.uniform(0.3, 0.9) * begins[-1])
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(2 * limit)
        os.kill(child.pid, signal.SIGCONT)
        ended = child.wait()
        if ended.code != 0:
            bad.append(f"stopped and continued: {ended.code}\n{ended.err[-1500:]}")
    return Result("stopped and continued", count, bad)


# --- clock and output


def outputs(work: Commands, count: int, seed: int) -> Result:
    """Nobody reads, nothing can be written, the clock jumps: the run goes on or exits 8, and no line is half."""
    bad, done, codes = [], _some(tuple(OUTPUTS), count), []
    for case in done:
        arguments = ["train", str(work.config), *(["--json"] if "json" in case else [])]
        before, stdout = OUTPUTS[case]
        read_fd, write_fd = os.openpty() if stdout == "terminal" else os.pipe()
        full = os.open("/dev/full", os.O_WRONLY)

        def in_child(before: Callable[[Commands], None] = before, read_fd: int = read_fd) -> None:
            os.close(read_fd)
            before(work)

        child = work.start(arguments, in_child, {None: None, "full": full}.get(stdout, write_fd))
        os.close(write_fd)
        if stdout in ("pipe", "terminal"):
            os.read(read_fd, 1)  # `head -1` has its line
        os.close(read_fd)
        os.close(full)
        ended = child.wait()
        codes.append(ended.code)
        problem = work.checkpoint_problem() or work.metrics_problem() or _durations_problem(work)
        if ended.code not in (0, 8) or "Traceback" in ended.err:
            problem = f"exit code {ended.code}"
        elif not (work.run / "adapter").is_dir() and "cannot be written" not in ended.err:
            problem = "no adapter, and nothing said"
        if problem:
            bad.append(f"output, {case}: {problem}\n{ended.err[-1500:]}")
    return Result("clock and output", len(done), bad, note=f"exit codes {dict(zip(done, codes, strict=True))}")


def _durations_problem(work: Commands) -> str | None:
    seconds = [e["step_seconds"] for e in work.events() if e["event"] == "step"]
    return None if all(0 < s < 60 for s in seconds) else f"durations {seconds}"


def _at_step(number: int, do: Callable[[Path], None]) -> Callable[[Commands], None]:
    """In the child: has something done to metrics.jsonl within step `number`."""

    def before(work: Commands) -> None:
        from solotune.training import loop

        plain, calls = loop.train_step, []

        def step(*args: Any, **keys: Any) -> Any:
            calls.append(1)
            if len(calls) == number + 2:  # the preflight makes two
                do(work.run / "metrics.jsonl")
            return plain(*args, **keys)

        loop.train_step = step

    return before


def _read_only(work: Commands) -> None:
    """root may write what is read-only, so this child gives that right up."""
    import ctypes

    class Capabilities(ctypes.Structure):
        _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))

    def take_away(path: Path) -> None:
        path.chmod(0o444)
        libc = ctypes.CDLL(None)
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (Capabilities * 2)()
        libc.capget(header, sets)
        sets[0].effective &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.capset(header, sets)

    _at_step(4, take_away)(work)


def _clock_jumps(seconds: float) -> Callable[[Commands], None]:
    def before(work: Commands) -> None:
        plain = time.time

        def jump(path: Path) -> None:
            time.time = lambda: plain() + seconds

        _at_step(4, jump)(work)

    return before


def _nothing(work: Commands) -> None:
    pass


OUTPUTS: dict[str, tuple[Callable[[Commands], None], str | None]] = {
    "reader leaves": (_nothing, "pipe"),
    "stdout is full": (_nothing, "full"),
    "stdout is closed": (lambda work: os.close(1), None),
    "stderr is full": (lambda work: os.dup2(os.open("/dev/full", os.O_WRONLY), 2), None),
    "reader of json leaves": (_nothing, "closed pipe"),
    "stdout is full, json": (_nothing, "full"),
    "metrics renamed": (_at_step(4, lambda path: path.rename(path.with_name("old.jsonl"))), None),
    "metrics deleted": (_at_step(4, Path.unlink), None),
    "metrics read-only": (_read_only, None),
    "clock -1 h": (_clock_jumps(-3600), None),
    "clock +1 d": (_clock_jumps(86400), None),
    "terminal goes away": (_nothing, "terminal"),
}
"""case -> (what is done in the child, what its stdout is)."""


def _some(cases: tuple[str, ...], count: int) -> tuple[str, ...]:
    return cases[: max(1, min(count, len(cases)))]
