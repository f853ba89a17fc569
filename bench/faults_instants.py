"""SIGKILL at random moments of a phase: the child says through a pipe what it does, the parent waits and kills."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from bench.faults_run import Result, Workload, after_kill
from solotune.display.progress import SilentDisplay
from solotune.run.events import StepEvent


class Marks(SilentDisplay):
    """Tells the parent through a pipe what a run is doing."""

    def __init__(self, pipe: int, eval_steps: int) -> None:
        self.pipe, self.eval_steps = pipe, eval_steps

    def say(self, name: str) -> None:
        os.write(self.pipe, f"{name}\n".encode())

    def phase(self, name: str) -> None:
        self.say(name)

    def begin(self, total_steps: int, done: int = 0) -> None:
        self.say("training")

    def step(self, event: StepEvent) -> None:
        if event.step % self.eval_steps == 0:
            self.say("evaluating")

    def operation(self, kind: str, path: Path, content: bytes) -> None:
        if kind == "mkdir" and path.name.startswith(".step-"):
            self.say("saving")
        if kind == "rename" and path.name == ".evaluation.json.partial":
            self.say("sealing")
        if kind == "lock":
            self.say("taking the directory")


# phase -> whether it lies before the run directory is made, so that a fork has to do all of the work
PHASES = {
    "reading data": True,
    "planning": True,
    "loading model": True,
    "taking the directory": False,
    "evaluating": False,
    "saving": False,
    "comparing base and tuned on held-out rows": False,
    "sealing": False,
}


def instants(work: Workload, in_training: int, in_each: int, seed: int = 0) -> Result:
    """SIGKILL at random moments of a phase."""
    result = Result("kill at a random instant")
    rng = random.Random(seed)
    counts = {"training": in_training, **dict.fromkeys(PHASES, in_each)}
    for phase, wanted in counts.items():
        if not wanted:
            continue
        full = PHASES.get(phase, False)
        length = _length(work, phase, full)
        done = 0
        while done < wanted:
            work.clear()
            code = _kill_in(work, phase, full, rng.random() * length, rng.random())
            if code == 0:
                continue  # it had ended before
            done += 1
            name = f"{phase}, instant {done}"
            result.take(name, after_kill(work, code, work.claimed_on_disk()))
    result.note = ", ".join(f"{phase} {count}" for phase, count in counts.items())
    return result


def _started(work: Workload, full: bool) -> tuple[int, int]:
    """(process, pipe of its marks) of a run."""
    reading, writing = os.pipe()
    pid = work.child(lambda: _run_marked(work, writing, full))
    os.close(writing)
    return pid, reading


def _run_marked(work: Workload, pipe: int, full: bool) -> None:
    marks = Marks(pipe, work.keys["eval_steps"])
    if full:
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)  # so that rows are rendered, not remembered
    work.train(False, marks.operation, full, marks)


def _lines(pipe: int) -> Iterator[str]:
    with os.fdopen(pipe) as stream:
        for line in stream:
            yield line.strip()


def _length(work: Workload, phase: str, full: bool) -> float:
    """Seconds from a phase's first mark to the next phase's, at most; of training, to the comparison after it."""
    work.clear()
    pid, pipe = _started(work, full)
    times = [(name, time.monotonic()) for name in _lines(pipe)]
    end = time.monotonic()
    work.wait(pid)
    last = {"training": "comparing base and tuned on held-out rows"}.get(phase)
    lengths = []
    for number, (name, at) in enumerate(times):
        if name == phase:
            after = [t for other, t in times[number + 1 :] if last is None or other == last]
            lengths.append((after[0] if after else end) - at)
    return max(lengths)


def _kill_in(work: Workload, phase: str, full: bool, delay: float, which: float) -> int:
    pid, pipe = _started(work, full)
    with os.fdopen(pipe) as stream:
        seen = 0
        often = {"saving": 4, "evaluating": 2}.get(phase, 1)
        for line in stream:
            seen += line.strip() == phase
            if seen > which * often:
                break
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return work.wait(pid).code
