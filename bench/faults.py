"""The fault campaign: a run is killed, torn, cut from power, refused by the disk, contended for, stopped and hung.

    python -m bench.faults                       a sample, about a minute
    python -m bench.faults --size full           all of it, about half an hour
    python -m bench.faults --only kills,power    some of it; a wrong name lists them

Each part counts injections and failures. A failure is: a resume that does not come to what an undisturbed run
comes to, to the last bit (losses, gradient norms, adapter, moments, random states, evaluation, lines of metrics.jsonl
without times); a checkpoint that is visible and not whole; a step that was said to be saved and was not there after; a
file that `solotune verify` calls wrong and is not, or the other way round. Exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from bench.faults_clean import clean_runs
from bench.faults_command import Commands, commands
from bench.faults_hangs import HANGS, OUTPUTS, hangs, outputs, stopped_processes
from bench.faults_instants import instants
from bench.faults_power import Disk, states
from bench.faults_run import KILLED, Result, Workload, after_kill, snapshot
from bench.faults_starts import contend
from bench.faults_stops import other_verbs, second_signals, stop_signals, stopped_and_resumed
from bench.faults_verify import clean_copies, delete, flip, mutations, truncate, zero
from bench.machine import machine, table
from solotune.run.events import ResumeEvent
from solotune.run.fs_ops import Hook
from solotune.run.record import RunRecord

ERRNOS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
NEEDS_ROOM = ("open", "write", "mkdir", "fsync")  # what a full disk refuses
STORAGE_ERROR = 8
SEED = 0
DISK = ("kills", "resumes", "rot", "instants", "power", "errors", "starts", "verify")
CLEAN = ("clean",)
PROCESS = ("stop", "verbs", "second", "stopped", "hang", "sigstop", "output")
Parts = dict[str, list[Callable[[], Result | list[Result]]]]


def kills(work: Workload, every: int = 1, resume: bool = False, put_back: Callable[[], None] | None = None) -> Result:
    """SIGKILL before each operation, and in the middle of each write."""
    result = Result("kill in a resume" if resume else "kill at an operation")
    put_back = put_back or work.clear
    put_back()
    claimed_before = work.claimed_on_disk()
    trace, outcome = work.traced(resume)
    assert outcome.code == 0, outcome.said
    for number in range(0, len(trace), every):
        for torn in (False, True) if trace[number].kind == "write" else (False,):
            put_back()

            def kill(kind: str, path: Path, content: bytes, torn: bool = torn) -> None:
                if torn:
                    with path.open("ab") as file:
                        file.write(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)

            ended = work.once(resume, work.at(number, kill))
            name = f"operation {number} ({trace[number].kind} {trace[number].path}){', torn' if torn else ''}"
            claimed = max(claimed_before, work.claimed(trace[:number]))
            result.take(name, after_kill(work, ended.code, claimed))
    return result


def resumes(work: Workload, every: int = 1) -> Result:
    """The same in a resumed run: one that was killed after its second checkpoint."""
    until_step(work, 6)
    with snapshot(work.run) as put_back:
        return kills(work, every, resume=True, put_back=put_back)


def rot(work: Workload, seed: int = SEED) -> Result:
    """The newest checkpoint, or metrics.jsonl, is damaged while nothing runs: the resume takes an older one."""
    result = Result("damaged checkpoint")
    rng = random.Random(seed)
    until_step(work, 6)
    newest = work.run / "checkpoints" / "step-000004"
    with snapshot(work.run) as put_back:
        damages = [(kind, file) for file in sorted(newest.iterdir()) for kind in (flip, truncate, zero, delete)]
        damages += [(cut_below_mark, work.run / "metrics.jsonl")]
        for kind, file in damages:
            put_back()
            kind(rng, file)
            problem = work.what_is_wrong(claimed=2)
            passed = [e for e in RunRecord.read(work.run).of(ResumeEvent) if e.passed_over]
            if problem is None and not passed:
                problem = "the damaged checkpoint was continued, or nothing was said of it"
            result.take(f"{kind.__name__} {file.name}", problem)
    return result


def cut_below_mark(rng: random.Random, metrics: Path) -> None:
    """Takes the last lines of metrics.jsonl, so that the newest checkpoint is ahead of it."""
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:-3]))


def lies(work: Workload) -> Result:
    """The disk reports success and keeps another byte: seen when a checkpoint is read back, before others go."""
    result = Result("disk that lies")
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"):
        for step in (2, 6, 8):
            work.clear()

            def lie(kind: str, path: Path, content: bytes, name: str = name, step: int = step) -> None:
                if kind == "fsync" and path.name == name and path.parent.name == f".step-{step:06d}.partial":
                    flip(random.Random(step), path)

            ended = work.once(False, lie)
            problem = None if ended.code == STORAGE_ERROR else f"exit code {ended.code}: {ended.said}"
            result.take(f"{name} of step {step}", problem or work.what_is_wrong(work.claimed_on_disk()))
    return result


def power(work: Workload, every: int = 1, seed: int = SEED, resume: bool = False) -> Result:
    """Power cut at each operation: four states of the disk."""
    result = Result("power cut in a resume" if resume else "power cut")
    work.clear()
    if resume:
        until_step(work, 6)
    disk, before = Disk.of(work.folder, work.run.name), work.claimed_on_disk()
    trace, outcome = work.traced(resume)
    assert outcome.code == 0, outcome.said
    for done, which in states(trace, disk, work.folder, work.run.name, seed, every):
        claimed = max(before, work.claimed(trace[:done]))
        result.take(f"after {done} operations, {which} of the rest", after_power(work, claimed))
    return result


def after_power(work: Workload, claimed: int) -> str | None:
    """What is wrong with a disk after a power cut."""
    if damaged := work.damaged_checkpoints():
        return f"damaged checkpoints: {', '.join(damaged)}"
    return work.what_is_wrong(claimed)


def until_step(work: Workload, step: int) -> None:
    """Leaves a run that was killed when it was about to log a step."""
    line = f'"event": "step", "step": {step},'.encode()
    work.clear()

    def kill(kind: str, path: Path, content: bytes) -> None:
        if kind == "write" and line in content:
            os.kill(os.getpid(), signal.SIGKILL)

    assert work.once(False, kill).code == KILLED


def errors(work: Workload, every: int = 1, errnos: tuple[int, ...] = ERRNOS) -> Result:
    """The disk refuses an operation once, or from it on."""
    result = Result("storage error")
    work.clear()
    trace, _ = work.traced()
    for number in range(0, len(trace), every):
        for number_of_error in errnos:
            for forever in (False, True):
                work.clear()
                ended = work.once(False, refusing(work, number, number_of_error, forever))
                kind = f"{errno.errorcode[number_of_error]} {'from' if forever else 'at'}"
                name = f"{kind} operation {number} ({trace[number].kind} {trace[number].path})"
                result.take(name, after_error(work, ended.code, ended.said, work.claimed(trace[:number])))
    return result


def refusing(work: Workload, number: int, code: int, forever: bool) -> Hook:
    """A hook that refuses the operation of this number; a full disk takes half of a write, and what needs no room."""
    refused = []

    def refuse(kind: str, path: Path, content: bytes) -> None:
        if refused and (not forever or (code in FULL_DISK and kind not in NEEDS_ROOM)):
            return
        refused.append(kind)
        if code in FULL_DISK and kind == "write" and path.exists():
            with path.open("ab") as file:
                file.write(content[: len(content) // 2])
        raise OSError(code, os.strerror(code))

    return work.at(number, refuse)


def after_error(work: Workload, code: int, said: str, claimed: int) -> str | None:
    if code not in (0, STORAGE_ERROR):
        return f"exit code {code}: {said}"
    if damaged := work.damaged_checkpoints():
        return f"damaged checkpoints: {', '.join(damaged)}"
    metrics = work.run / "metrics.jsonl"
    if metrics.exists() and metrics.read_bytes()[-1:] not in (b"", b"\n"):
        return "metrics.jsonl ends within a line"
    if code == 0 and work.state() != work.reference:
        return "it ended well with another result"
    return work.what_is_wrong(claimed)


def starts(work: Workload, rounds: int, at_once: int = 20) -> Result:
    """Many starts in one directory: exactly one wins, and its death frees the directory."""
    result = Result(f"{at_once} starts in one directory")
    for number in range(rounds):
        work.clear()
        result.take(f"round {number}", contend(work, at_once))
    return result


def damage(work: Workload, count: int, copies: int, seed: int = SEED) -> list[Result]:
    """Random damage to a finished run, and clean copies of it."""
    work.clear()
    assert work.once(False).code == 0
    results = []
    for part, found in (
        ("verify: a damaged file", mutations(work.run, count, seed)),
        ("verify: a clean copy", clean_copies(work.run, copies, work.folder / "copy")),
    ):
        result = Result(part)
        for name, problem in found:
            result.take(name, problem)
        results.append(result)
    return results


def disk_parts(work: Workload, full: bool) -> Parts:
    """What befalls the files of a run."""
    every = 1 if full else 9
    return {
        "kills": [lambda: kills(work, every)],
        "resumes": [lambda: resumes(work, every)],
        "rot": [lambda: rot(work), lambda: lies(work)],
        "instants": [lambda: instants(work, 1000 if full else 10, 50 if full else 1)],
        "power": [lambda: power(work, every), lambda: power(work, every, resume=True)],
        "errors": [lambda: errors(work, 1 if full else 25)],
        "starts": [lambda: starts(work, 100 if full else 2)],
        "verify": [lambda: damage(work, 10_000 if full else 300, 1000 if full else 10)],
    }


def process_parts(work: Commands, full: bool) -> Parts:
    """What befalls its process."""
    return {
        "stop": [lambda: stop_signals(work, 200 if full else 6, SEED)],
        "verbs": [lambda: other_verbs(work, 40 if full else 4, SEED)],
        "second": [lambda: second_signals(work, 50 if full else 1, SEED)],
        "stopped": [lambda: stopped_and_resumed(work, 20 if full else 1, SEED)],
        "hang": [lambda: hangs(work, len(HANGS) if full else 1, SEED)],
        "sigstop": [lambda: stopped_processes(work, 5 if full else 1, SEED)],
        "output": [lambda: outputs(work, len(OUTPUTS) if full else 1, SEED)],
    }


def campaign(parts: Parts, only: set[str], num_states: Callable[[], int] = lambda: 0) -> list[Result]:
    """All parts, or those named in `only`; each is said as it ends."""
    results: list[Result] = []
    for name in parts:
        for part in parts[name] if not only or name in only else ():
            began, before = time.monotonic(), num_states()
            found = part()
            for result in found if isinstance(found, list) else [found]:
                result.seconds = round(time.monotonic() - began, 1)
                result.num_states = num_states() - before
                results.append(result)
                note = f"; {result.note}" if result.note else ""
                text = (
                    f"{result.part}: {result.injected} injected, {len(result.failures)} bad, {result.seconds} s{note}"
                )
                print("\n  ".join([text, *result.failures[:5]]), flush=True)
    return results


def in_words(results: list[Result]) -> str:
    """The table."""
    head = ["part", "injected", "states resumed", "bad", "s"]
    return table(head, [[r.part, r.injected, r.num_states, len(r.failures), r.seconds] for r in results])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", choices=("small", "full"), default="small")
    parser.add_argument("--only", default="", help="parts to run, separated by commas")
    parser.add_argument("--folder", type=Path, help="where to run (default: a temporary folder)")
    arguments = parser.parse_args()
    only, full = {part for part in arguments.only.split(",") if part}, arguments.size == "full"
    if unknown := only - {*DISK, *CLEAN, *PROCESS}:
        raise SystemExit(
            f"no such part: {', '.join(sorted(unknown))}; there are {', '.join((*DISK, *CLEAN, *PROCESS))}"
        )
    results: list[Result] = []
    if not only or only & set(CLEAN):
        results += campaign({"clean": [lambda: clean_runs(50 if full else 3, SEED)]}, only)
    if not only or only & set(DISK):
        place = nullcontext(arguments.folder) if arguments.folder else tempfile.TemporaryDirectory(prefix="faults-")
        with place as folder:
            work = Workload(Path(folder).resolve())
            work.measure()
            print(f"a run of {work.keys['max_steps']} steps, {len(work.trace)} operations; seed {SEED}", flush=True)
            results += campaign(disk_parts(work, full), only, lambda: work.num_states)
    if not only or only & set(PROCESS):
        with commands() as work:
            results += campaign(process_parts(work, full), only)
    print("\n" + in_words(results))
    print(
        "\n" + ", ".join(f"{name} {value}" for name, value in machine("torch", "transformers", "safetensors").items())
    )
    return 1 if any(result.failures for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
