"""Stop signals at random instants: the run ends as it should, with what was done saved.

Parts of `python -m bench.faults`; each returns its line of the table.
"""

from __future__ import annotations

import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.faults_command import SIGNALS, STAGES, Commands, Ended, stage_times
from bench.faults_run import Result
from solotune.training import checkpoint

PLANNING = 1 + STAGES.index("planning")  # before the first stage is one of its own


def stop_signals(work: Commands, count: int, seed: int) -> Result:
    """A signal at `count` random instants of a run, in all its phases: 143, 130 or 129, and what was done is saved."""
    rng = random.Random(seed)
    begins = stage_times(work)
    micro_batch, save = _usual_times(work)
    bad, late, saved, stages = [], [], [], dict[str, int]()
    for _ in range(count):
        number, stage = rng.choice(list(SIGNALS)), rng.randrange(len(begins) - 1)
        child = work.start(["train", str(work.config)], work.look_again if stage == PLANNING else None)
        child.await_stage(stage)
        time.sleep(rng.uniform(0.0, begins[stage + 1] - begins[stage]))
        sent = time.time()
        child.send(number)
        ended = child.wait()
        stages[ended.stage] = stages.get(ended.stage, 0) + 1
        if ended.stage == "training" and (newest := checkpoint.newest(work.run / "checkpoints")):
            saved += [after for after in [newest.stat().st_ctime - sent] if after > 0]
        if problem := _not_stopped_well(work, ended, number):
            bad.append(f"{ended.stage}, {signal.Signals(number).name}: {problem}\n{ended.err[-3000:]}")
        elif ended.code > 0:
            late.append((ended.late, ended.stage))
    note = f"by stage: {stages}; latency in all stages {_spread([t for t, _ in late])}, "
    note += f"in training {_spread([t for t, stage in late if stage == 'training'])}"
    note += f", there until the checkpoint had its name {_spread(saved)}, {len(saved)} times"
    note += f" (a micro-batch {micro_batch * 1e3:.0f} ms, a save {save * 1e3:.0f} ms)"
    return Result("stop signals", count, bad, note=note)


def _spread(seconds: list[float]) -> str:
    ordered = sorted(seconds) or [0.0]
    middle, worst = (ordered[int(len(ordered) * share)] * 1e3 for share in (0.5, 0.99))
    return f"p50 {middle:.0f} ms, p99 {worst:.0f} ms"


def _not_stopped_well(work: Commands, ended: Ended, number: int) -> str | None:
    if "Traceback" in ended.err or "Traceback" in ended.out:
        return "a traceback"
    if problem := work.checkpoint_problem() or work.metrics_problem():
        return problem
    if ended.code == 0:
        return None if (work.run / "adapter").is_dir() else "0 without an adapter"
    if ended.code == -number:  # before Python could listen, or after all was done
        return None
    if ended.code != SIGNALS[signal.Signals(number)]:
        return f"exit code {ended.code}"
    steps = [e for e in work.events() if e["event"] == "step"]
    saved = [e["step"] for e in work.events() if e["event"] == "save"]
    if steps and (not saved or saved[-1] != steps[-1]["step"]):
        return f"step {steps[-1]['step']} is not saved"
    return None


def other_verbs(work: Commands, count: int, seed: int) -> Result:
    """The same for verbs that only read: they end without a traceback, and leave the run as it was."""
    rng = random.Random(seed)
    work.start(["train", str(work.config)]).wait()
    run, config = str(work.run), str(work.config)
    commands = (["data", config], ["plan", config], ["evaluate", run], ["chat", run, "--prompt", "twice 3"])
    whole = [work.start(command).wait().seconds for command in commands]
    bad = []
    for turn in range(count):
        number, which = rng.choice(list(SIGNALS)), turn % len(commands)
        child = work.start(commands[which])
        time.sleep(rng.uniform(0.0, whole[which]))
        child.send(number)
        ended = child.wait()
        problem = "a traceback" if "Traceback" in ended.err else work.checkpoint_problem()
        if problem or ended.code not in (0, -number, SIGNALS[number]):
            bad.append(
                f"{commands[which][0]}, {signal.Signals(number).name}: {ended.code} {problem}\n{ended.err[-900:]}"
            )
    return Result("stop signals to other verbs", count, bad)


def _usual_times(work: Commands) -> tuple[float, float]:
    """Seconds of a micro-batch, and of a save, in the run that was just done."""
    steps = sorted(e["step_seconds"] for e in work.events() if e["event"] == "step")
    loaded = checkpoint.load(checkpoint.newest(work.run / "checkpoints"))  # type: ignore[arg-type]
    import torch

    parameter = torch.nn.Parameter(torch.zeros(max(t.numel() for t in loaded.optimizer.values())))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    times = []
    with tempfile.TemporaryDirectory(dir=work.folder) as scratch:
        for number in range(5):
            began = time.monotonic()
            checkpoint.save(Path(scratch), number, loaded.adapter, {}, optimizer, {})
            times.append(time.monotonic() - began)
    return steps[len(steps) // 2] / work.keys["gradient_accumulation_steps"], sorted(times)[2]


def second_signals(work: Commands, count: int, seed: int) -> Result:
    """A second signal soon after the first: the process is gone at once, and the newest checkpoint is whole.

    At once is 2 s, or half of what a whole run takes where this machine has so much else to do that that is more.
    """
    rng = random.Random(seed)
    whole = work.start(["train", str(work.config)]).wait()
    bad = []
    for _ in range(count):
        first, second = rng.choices(list(SIGNALS), k=2)
        child = work.start(["train", str(work.config)])
        time.sleep(rng.uniform(0.3, 0.95) * whole.seconds)
        child.send(first)
        time.sleep(rng.uniform(0.0, 0.03))
        child.send(second)
        ended = child.wait()
        is_ended = ended.code in (0, -first, -second, SIGNALS[first], SIGNALS[second])
        problem = work.checkpoint_problem() or ("a traceback" if "Traceback" in ended.err else None)
        if not is_ended or problem or ended.late > max(2.0, whole.seconds / 2):
            bad.append(f"second signal: {ended.code} {problem} {ended.late:.2f} s\n{ended.err[-600:]}")
    return Result("second signals", count, bad)


def stopped_and_resumed(work: Commands, count: int, seed: int) -> Result:
    """Stopped at random instants again and again until it is done: the same losses and adapter as undisturbed."""
    rng = random.Random(seed)
    whole = work.start(["train", str(work.config)]).wait()
    expected = _result(work)
    bad = []
    for _ in range(count):
        arguments, ended, stops = ["train", str(work.config)], None, 0
        while (ended is None or ended.code) and stops < 20:
            child = work.start(arguments)
            time.sleep(rng.uniform(0.2, 1.1) * whole.seconds)
            child.send(rng.choice(list(SIGNALS)))
            ended, stops = child.wait(), stops + 1
            has_run = (work.run / "config.yaml").is_file()
            arguments = ["train", str(work.config), "--resume"] if has_run else arguments
        if stops == 20 or _result(work) != expected:
            bad.append(f"stopped {stops} times: another result")
    return Result("stopped and resumed, bit for bit", count, bad)


def _result(work: Commands) -> tuple[Any, ...]:
    steps = {e["step"]: (e["loss"], e["grad_norm"]) for e in work.events() if e["event"] == "step"}
    evals = {e["step"]: e["loss"] for e in work.events() if e["event"] == "eval"}
    return steps, evals, (work.run / "adapter" / "adapter_model.safetensors").read_bytes()
