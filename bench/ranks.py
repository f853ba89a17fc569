"""Kill or stop a rank of a run at random instants: the run ends on all ranks, and goes on as if nothing had happened.

    python -m bench.ranks --instants 200 --ranks 2 --out FILE   SIGKILL, SIGTERM or SIGSTOP to a random rank
    python -m bench.ranks --instants 10 --launcher torchrun ... the same under torchrun, which ends the others too
    python -m bench.ranks --instants 20 --before-meeting ...    while ranks of their own processes load libraries
    python -m bench.ranks --instants 6 --gpus ...               on GPUs (NCCL, nf4), under torchrun
    python -m bench.ranks --table FILE                          the table of what has run so far

A tiny model on the CPU (gloo), or with --gpus on GPUs. Each run is hit once, then resumed to its end. The instant: a
random line of what rank 0 prints, from none at all to its last, and then up to 0.3 s. FILE gets one line of JSON for
each instant; a second call with the same arguments goes on where the first one has ended. The ranks are forked from
this process, so nobody but they themselves ends them, as under srun. Forked ranks meet at once, so with
--before-meeting each is a command of its own, and the instant is any from its start on until the ranks have met. No run
is begun then, so nothing is resumed.

What must hold
--------------
All ranks end in 60 s after the signal. A rank that is killed or stopped is named with its number. No file is
half-written: checkpoints and the adapter are as their manifests say, and so is the whole run after the resume
(`verify`). The resumed run computes what one that was not hit does, bit for bit: adapter, losses, gradient norms,
evaluations, comparison with the base.

A rank that is stopped is waited for 3 s here in place of 20, one that has not met the others 20 in place of 300. With
--real-limits, and under torchrun, the limits are those of any run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.ranks_run import Launched, differences, figures_of, load_all, prepare
from solotune.runtime import heartbeat, world

SIGNALS = ("SIGKILL", "SIGTERM", "SIGSTOP")
JITTER_SECONDS = 0.3
EARLY = re.compile("before the ranks met|before all ranks were there")  # what the others say then
END_SECONDS = 60.0
STOPPED_SECONDS, JOIN_SECONDS = 3.0, 20.0  # in place of the 20 and 300 of `runtime`


@dataclass
class Case:
    """One instant: what was done to whom, and what came of it."""

    instant: int
    ranks: int
    launcher: str
    signal: str
    victim: int
    stage: str
    seconds: float  # until all ranks had ended
    lost_steps: int
    codes: list[int]
    differences: list[str]
    problems: list[str] = field(default_factory=list)
    at: float = 0.0  # seconds from the start

    @property
    def is_bad(self) -> bool:
        return bool(self.problems or self.differences or self.seconds > END_SECONDS)


def stage_of(lines: Sequence[str]) -> str:
    """What rank 0 was doing, by what it has printed."""
    said = "\n".join(lines)
    for mark, stage in (
        ("comparing base and tuned", "after training"),
        (r"step +\d+/\d+  saved", "between the first save and the end of training"),
        (r"step +\d+/", "before the first save"),
        ("training for", "first step"),
    ):
        if re.search(mark, said):
            return stage
    return "loading" if lines else "starting"


def have_met(lines: Sequence[str]) -> bool:
    return any(not line.startswith(("loading libraries", "waiting for rank")) for line in lines)


def seconds_to_meet(run: Launched) -> float:
    """Wait until the ranks have met; the seconds from their start."""
    while not have_met(run.said().splitlines()) and run.is_alive(0):
        time.sleep(0.01)
    return time.monotonic() - run.started


def wait_for_instant(run: Launched, rng: random.Random, num_lines: int, before: float | None) -> list[str] | None:
    """Wait for a random line of rank 0 and some more; the lines that are there.

    Args:
        before: wait some of these seconds instead; None if the ranks have met already then.
    """
    if before is not None:
        time.sleep(rng.uniform(0, before))
        lines = run.said().splitlines()
        return None if have_met(lines) else lines
    line, more = rng.randrange(num_lines), rng.uniform(0, JITTER_SECONDS)
    while len(lines := run.said().splitlines()) < line and run.is_alive(0):
        time.sleep(0.005)
    time.sleep(more)
    return run.said().splitlines() or lines


def half_written(run: Path) -> list[str]:
    """What a killed run has left in a state that its manifests do not have."""
    from solotune.run.manifest import check_folder
    from solotune.training import checkpoint

    found = [f"{path.name}: {checkpoint.invalid_reason(path)}" for _, path in
             checkpoint.list_checkpoints(run / "checkpoints") if checkpoint.invalid_reason(path)]  # fmt: skip
    adapter = run / "adapter"
    return found + [f"adapter: {problem}" for problem in (check_folder(adapter) if adapter.is_dir() else ())]


def hit_once(
    work: Path, case: Case, rng: random.Random, num_lines: int, wanted: dict[str, Any], before: float | None
) -> bool:
    """Start, hit a rank, wait, look, resume, compare; False if the rank had ended already, or the instant is over."""
    from solotune.run.events import ResumeEvent, StepEvent
    from solotune.run.record import RunRecord
    from solotune.training.verify_run import verify

    run, name = work / "run", case.signal
    shutil.rmtree(run, ignore_errors=True)
    launched = Launched(work, case.ranks, case.launcher)
    lines = wait_for_instant(launched, rng, num_lines, before)
    if lines is None or not launched.is_alive(case.victim):
        launched.wait()
        return False
    os.kill(launched.pids[case.victim], getattr(signal, name))
    sent, case.stage = time.monotonic(), stage_of(lines) if before is None else "before the ranks met"
    case.at = round(sent - launched.started, 2)
    case.problems = launched.wait(case.victim if name == "SIGSTOP" and case.launcher != "torchrun" else None)
    case.seconds = round(max(launched.ended.values(), default=sent + END_SECONDS + 1) - sent, 2)
    case.codes = [launched.codes.get(rank, 0) for rank in range(case.ranks)]
    if case.codes[case.victim] == 0 and case.launcher != "torchrun":
        return False  # it was about to end
    said, others = launched.said(), [code for rank, code in enumerate(case.codes) if rank != case.victim]
    if before is not None and not case.is_bad and not EARLY.search(said):
        return False  # the ranks have met since
    if before is not None:
        case.problems += ["a run was begun"] if run.exists() else []
        return True
    if name != "SIGTERM" and any(others) and not re.search(rf"rank {case.victim}\b", said):
        case.problems.append(f"not named: {said[-1000:]}")
    case.problems += half_written(run)
    before = max((event.step for event in RunRecord.read(run).of(StepEvent)), default=0)
    is_over = "comparing base and tuned" in said

    goes_on = Launched(work, case.ranks, "fork" if case.launcher == "processes" else case.launcher, "--resume")
    case.problems += [f"resumed: {problem}" for problem in goes_on.wait()]
    if any(goes_on.codes.values()):
        case.problems.append(f"resumed: {goes_on.codes} {goes_on.said()[-2000:]}")
    resumed = RunRecord.read(run).of(ResumeEvent)
    case.lost_steps = 0 if is_over else before - (resumed[-1].step if resumed else 0)
    case.differences = differences(figures_of(run), wanted)
    case.problems += [f"verify: {problem}" for problem in verify(run).problems] if run.is_dir() else ["no run"]
    return True


def table(cases: Sequence[Case]) -> str:
    lines = [
        "| ranks | started by | signal | to | instants | ended within | steps done again, most | "
        "resumed, not bit-equal | other problems |",
        "|--:|---|---|---|--:|--:|--:|--:|--:|",
    ]
    groups = sorted({(c.ranks, c.launcher, SIGNALS.index(c.signal), bool(c.victim)) for c in cases})
    for ranks, launcher, number, is_other in groups:
        some = [c for c in cases if (c.ranks, c.launcher, c.signal) == (ranks, launcher, SIGNALS[number])
                and bool(c.victim) == is_other]  # fmt: skip
        lines.append(
            f"| {ranks} | {launcher} | {SIGNALS[number]} | {'another' if is_other else 'rank 0'} | {len(some)} | "
            f"{max(c.seconds for c in some):.1f} s | {max(c.lost_steps for c in some)} | "
            f"{sum(bool(c.differences) for c in some)} | {sum(bool(c.problems) for c in some)} |"
        )
    stages = sorted({case.stage for case in cases})
    counts = ", ".join(f"{stage} {sum(case.stage == stage for case in cases)}" for stage in stages)
    return "\n".join([*lines, "", f"{len(cases)} instants: {counts}."])


def read(path: Path) -> list[Case]:
    return [Case(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def campaign(work: Path, given: argparse.Namespace, cases: list[Case], out: Path | None) -> list[str]:
    """Hit a run at the instants that are missing in `cases`; why there can be none."""
    import solotune

    prepare(work, on_gpus=given.gpus)
    if not given.gpus:
        solotune.plan("run.yaml")  # before the ranks are forked
    whole = Launched(work, given.ranks, given.launcher)
    before = None
    if given.before_meeting:  # nothing is computed then, and nothing to be resumed
        before = seconds_to_meet(whole)
        for rank in range(given.ranks):
            whole.kill(rank)
    problems, wanted = whole.wait(), figures_of(work / "run")
    if problems or not (wanted["adapter"] or given.before_meeting):
        return problems or [whole.said()]
    num_lines = len(whole.said().splitlines())
    for instant in range(len(cases), given.instants):
        rng, is_hit = random.Random(f"{given.seed} {given.ranks} {instant}"), False
        while not is_hit:
            victim, number = rng.randrange(given.ranks), rng.choice(given.signals)
            case = Case(instant, given.ranks, given.launcher, number, victim, "", 0.0, 0, [], [])
            is_hit = hit_once(work, case, rng, num_lines, wanted, before)
        cases.append(case)
        line = json.dumps(asdict(case))
        print(line, flush=True)
        if out:
            with open(out, "a", encoding="utf-8") as file:
                file.write(line + "\n")
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instants", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launcher", choices=("fork", "processes", "torchrun"), default="fork")
    parser.add_argument(
        "--before-meeting", action="store_true", help="hit ranks that are processes of their own, early"
    )
    parser.add_argument("--signals", nargs="+", choices=SIGNALS, default=SIGNALS)
    parser.add_argument("--gpus", action="store_true", help="a GPU for each rank, under torchrun")
    parser.add_argument("--real-limits", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    given = parser.parse_args()
    if given.table:
        print(table([case for path in given.table for case in read(path)]))
        return 0
    if given.gpus or given.before_meeting:
        given.launcher = "torchrun" if given.gpus else "processes"
    load_all()
    if not given.real_limits:
        heartbeat.STOPPED_SECONDS, world.JOIN_SECONDS = STOPPED_SECONDS, JOIN_SECONDS
    out = given.out.absolute() if given.out else None
    cases = [c for c in (read(out) if out else ()) if (c.ranks, c.launcher) == (given.ranks, given.launcher)]
    with tempfile.TemporaryDirectory(prefix="solotune-ranks-") as name:
        os.chdir(name)
        if problems := campaign(Path(name), given, cases, out):
            print("\n".join(problems))
            return 1
    print(f"\n{table(cases)}")
    return 1 if any(case.is_bad for case in cases) else 0


if __name__ == "__main__":
    raise SystemExit(main())
