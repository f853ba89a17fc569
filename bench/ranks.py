"""Kill a rank of a run at random instants: the run ends on all ranks, and goes on as if nothing had happened.

    python -m bench.ranks --instants 200 --ranks 2            SIGKILL, SIGTERM or SIGSTOP to a random rank
    python -m bench.ranks --instants 10 --launcher torchrun   the same under torchrun, which ends the others too

A tiny model on the CPU (gloo). Each run is killed once, at an instant between its first line and its end, then resumed.
The table says for each signal and victim: how long it took until all ranks had ended, whether rank 0 named the one that
is lost, how many finished steps were lost, and whether the resumed run has the adapter of one that was not killed, bit
for bit. Without torchrun nobody but the ranks themselves ends them, as under srun; the ranks are forked from this
process, which has torch loaded already.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

STEPS = 60
CONFIG = """\
model_name_or_path: model
dataset: chats.jsonl
max_length: 64
use_cpu: true
base_precision: fp32
bf16: false
lora_target_modules: all-linear
lora_r: 4
lora_dropout: 0.1
max_steps: {steps}
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
gradient_checkpointing: false
packing: true
validation_size: 10
learning_rate: 1.0e-2
save_steps: 10
eval_steps: 20
num_samples: 0
logging_steps: 1
seed: 0
output_dir: run
"""
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
LIMIT_SECONDS = 120.0


@dataclass
class Case:
    """One instant: what was done to whom, and what came of it."""

    number: signal.Signals
    victim: int
    seconds: float  # until all ranks had ended
    stage: str
    is_named: bool
    lost_steps: int
    is_equal: bool
    problems: list[str] = field(default_factory=list)


class Launched:
    """The ranks of one run."""

    def __init__(self, folder: Path, ranks: int, launcher: str, *more: str) -> None:
        self.folder, self.ranks, self.launcher = folder, ranks, launcher
        self.output = folder / "rank-0.txt"
        self.agent: subprocess.Popen[bytes] | None = None
        if launcher == "fork":
            from solotune.cli.main import main
            from tests.ranks import Ranks

            def work(rank: int) -> int:
                sys.argv = ["solotune", "train", "run.yaml", *more]
                return main()

            self.pids = Ranks(ranks, work, folder).pids
            return
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        with open(self.output, "w", encoding="utf-8") as file:
            self.agent = subprocess.Popen(
                [*command, "-m", "solotune", "train", "run.yaml", *more], cwd=folder, stdout=file, stderr=file
            )
        self.pids = [self._pid_of(rank) for rank in range(ranks)]

    def _pid_of(self, rank: int) -> int:
        assert self.agent is not None
        until = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < until:
            for path in Path("/proc").glob("[0-9]*"):
                try:
                    parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                    environ = (path / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if parent == self.agent.pid and f"RANK={rank}".encode() in environ:
                    return int(path.name)
            time.sleep(0.05)
        raise RuntimeError("torchrun has started no rank")

    def end(self) -> tuple[float, list[str]]:
        """Wait until all have ended; the seconds, and what is wrong. A stopped one is killed when the others have."""
        started, codes, problems = time.monotonic(), dict[int, int](), list[str]()
        last = started
        while len(codes) < self.ranks and (self.agent is None or self.agent.poll() is None):
            for rank, pid in enumerate(self.pids):
                if rank not in codes and self.agent is None and (found := os.waitpid(pid, os.WNOHANG))[0]:
                    codes[rank], last = os.waitstatus_to_exitcode(found[1]), time.monotonic()
            if len(codes) == self.ranks - 1 and self.agent is None:
                stopped = next(rank for rank in range(self.ranks) if rank not in codes)
                if b" (stopped)" in Path(f"/proc/{self.pids[stopped]}/status").read_bytes():
                    os.kill(self.pids[stopped], signal.SIGKILL)
            if time.monotonic() - started > LIMIT_SECONDS:
                problems.append(f"not ended after {LIMIT_SECONDS:.0f} s")
                for pid in self.pids:
                    os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        if self.agent is not None:
            self.agent.wait()
            last = time.monotonic()
        if any(code == 1 for code in codes.values()) or "this is a bug" in self.said():
            problems.append(f"exit codes {codes}: {self.said()[-2000:]}")
        return last - started, problems

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


def steps_of(run: Path) -> list[int]:
    from solotune.run.record import RunRecord

    return [event.step for event in RunRecord.read(run).steps]


def adapter_of(run: Path) -> bytes:
    path = run / "adapter" / "adapter_model.safetensors"
    return path.read_bytes() if path.is_file() else b""


def kill_once(work: Path, ranks: int, launcher: str, rng: random.Random, whole: float, wanted: bytes) -> Case:
    """Start, kill a rank at a random instant, wait, resume, compare."""
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    number, victim = rng.choice(SIGNALS), rng.randrange(ranks)
    launched = Launched(work, ranks, launcher)
    time.sleep(rng.uniform(0.0, whole))
    done = len(steps_of(run))
    lines = launched.said().strip().splitlines()
    stage = "training" if done else (lines[-1][:40] if lines else "starting")
    try:
        os.kill(launched.pids[victim], number)
    except ProcessLookupError:
        stage = "after the end"
    seconds, problems = launched.end()
    said = launched.said()
    is_named = bool(re.search(rf"rank {victim} \(process|rank {victim}:|Stopped|stopped", said))
    is_done = bool(adapter_of(run)) and "is saved" not in said and "error:" not in said
    before = len(set(steps_of(run)))
    goes_on = Launched(work, ranks, launcher, "--resume")
    problems += [f"resumed: {problem}" for problem in goes_on.end()[1]]
    if not adapter_of(run):
        problems.append(f"{said[-1000:]}\nresumed: {goes_on.said()[-2000:]}")
    from solotune.run.events import ResumeEvent
    from solotune.run.record import RunRecord

    resumed = RunRecord.read(run).of(ResumeEvent)
    lost = 0 if is_done else before - (resumed[-1].step if resumed else 0)
    return Case(number, victim, seconds, stage, is_named or is_done, lost, adapter_of(run) == wanted, problems)


def prepare(work: Path) -> None:
    """A tiny model, chats of many lengths, and the config."""
    import numpy as np
    import torch
    import transformers

    from tests.tiny import FAMILIES, save_tokenizer

    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]()).save_pretrained(work / "model")
    save_tokenizer(work / "model")
    rng = np.random.default_rng(0)
    with open(work / "chats.jsonl", "w", encoding="utf-8") as file:
        for i in range(90):
            asked = {"role": "user", "content": "x" * int(rng.integers(1, 20))}
            answer = {"role": "assistant", "content": "y" * int(rng.integers(1, 12)) + str(i), "weight": 1 + i % 2}
            file.write(json.dumps({"messages": [asked, answer]}) + "\n")
    (work / "run.yaml").write_text(CONFIG.format(steps=STEPS), encoding="utf-8")


def plan_once() -> None:
    """Work out the model's shape and this machine's speed once: in each run, they take longer than its steps."""
    from solotune.planning import plan_inputs

    shape, speed = plan_inputs.model_shape, plan_inputs.cpu_gflops
    kept: dict[str, Any] = {}

    def model_shape(config: Any, model_files: Any = None) -> Any:
        return kept.setdefault("shape", None) or kept.update(shape=shape(config, model_files)) or kept["shape"]

    plan_inputs.model_shape = model_shape
    plan_inputs.cpu_gflops = cache(speed)


def table(cases: Sequence[Case]) -> str:
    lines = [
        "| signal | to | instants | ended within | named | steps lost, most | resumed bit-equal |",
        "|" + " --- |" * 7,
    ]
    for number in SIGNALS:
        for whom in ("rank 0", "another"):
            some = [case for case in cases if case.number == number and (case.victim == 0) == (whom == "rank 0")]
            if some:
                worst, lost = max(case.seconds for case in some), max(case.lost_steps for case in some)
                named = "" if whom == "rank 0" else f"{sum(case.is_named for case in some)}"
                equal = f"{sum(case.is_equal for case in some)} of {len(some)}"
                lines.append(f"| {number.name} | {whom} | {len(some)} | {worst:.1f} s | {named} | {lost} | {equal} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instants", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--launcher", choices=("fork", "torchrun"), default="fork")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import torch

    import solotune.api.train
    import solotune.diagnosis.monitor
    import solotune.report_page.build
    import solotune.training.loop  # loaded once, for all ranks

    torch.set_num_threads(1)
    plan_once()
    rng, cases = random.Random(given.seed), list[Case]()
    with tempfile.TemporaryDirectory(prefix="solotune-ranks-") as name:
        work = Path(name)
        os.chdir(work)
        prepare(work)
        import solotune

        solotune.plan("run.yaml")  # before the ranks are forked
        started = time.monotonic()
        _, problems = Launched(work, given.ranks, given.launcher).end()
        whole, wanted = time.monotonic() - started, adapter_of(work / "run")
        if problems or not wanted:
            print("\n".join(problems) or (work / "rank-0.txt").read_text())
            return 1
        for instant in range(given.instants):
            case = kill_once(work, given.ranks, given.launcher, rng, whole, wanted)
            cases.append(case)
            print(f"{instant + 1}: {case.number.name} to rank {case.victim} while {case.stage}: {case.seconds:.1f} s, "
                  f"{case.lost_steps} steps lost, equal {case.is_equal} {case.problems}", flush=True)  # fmt: skip
    print(f"\n{given.ranks} ranks, {given.launcher}, a run of {STEPS} steps in {whole:.1f} s\n\n{table(cases)}")
    bad = [case for case in cases if case.problems or not case.is_equal or case.seconds > 60]
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
