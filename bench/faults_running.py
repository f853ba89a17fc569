"""Faults while a run is at work: stop signals at random instants, non-finite values, a lost card, hangs, a full disk.

    python -m bench.faults_running [SIZE] [CAMPAIGN ...]      SIZE 1 is the sample of the tests, 100 the whole

Each campaign gives rows (name, count, bad, seconds, seed); what was bad is printed to stderr. Runs are the real command
line in a process of its own, forked from one that has imported torch once, so that a run takes a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

STAGES = ("reading data", "planning", "loading model", "trying the largest step", "training", "comparing base")
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
CHILD_SECONDS = 120.0


class Row(NamedTuple):
    """One line of the campaign's table."""

    name: str
    count: int
    bad: int
    seconds: float
    seed: int


@dataclass
class Ended:
    """How a child ended."""

    code: int  # negative: by a signal
    seconds: float
    late: float  # seconds from the signal to the end
    out: str
    err: str
    stage: str = ""


@dataclass
class Workload:
    """A tiny chat run in a folder of its own: what every campaign starts, stops and looks at."""

    folder: Path
    keys: dict[str, Any] = field(default_factory=dict)
    look: Any = None

    def prepare(self) -> None:
        """Makes model and data, and imports and warms what every child will use."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ["XDG_CACHE_HOME"] = str(self.folder / "cache")
        import torch
        import transformers

        import solotune.cli
        import solotune.preflight
        import solotune.verbs
        from solotune.config import load_config
        from solotune.terminal import SilentDisplay
        from tests import tiny

        torch.set_num_threads(1)  # a fork has no other threads
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(tiny.FAMILIES["llama"]()).save_pretrained(self.folder / "model")
        tiny.save_tokenizer(self.folder / "model")
        (self.folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.chat_rows(60)))
        self.keys = {
            "model_name_or_path": str(self.folder / "model"),
            "dataset": str(self.folder / "chats.jsonl"),
            "output_dir": str(self.folder / "run"),
            "validation_size": 10,
            "max_length": 64,
            "use_cpu": True,
            "lora_target_modules": "all-linear",
            "lora_r": 4,
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 3,
            "gradient_checkpointing": False,
            "preflight": True,
            "learning_rate": 1e-2,
            "save_steps": 3,
            "eval_steps": 2,
            "num_samples": 2,
            "max_new_tokens": 8,
            "seed": 0,
            **self.keys,
        }
        self.config = self.folder / "run.yaml"
        self.config.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in self.keys.items()))
        self._remember_shapes()
        solotune.verbs._get_ready(load_config(self.keys), False, SilentDisplay())  # so that no child imports anything
        code = self.start(["train", str(self.config)]).wait().code
        assert code == 0, "the run does not work undisturbed"

    def _remember_shapes(self) -> None:
        """Has the model looked at once for all children but those of `stop_signals`: a second of each run."""
        from solotune import survey

        self.look, known = survey.model_shape, {}

        def remembered(config: Any) -> Any:
            key = (config.base_precision, config.multiplies_in_fp8)
            if key not in known:
                known[key] = self.look(config)
            return known[key]

        survey.model_shape = remembered

    def look_again(self) -> None:
        """In a child: planning is what it is for users."""
        from solotune import survey

        survey.model_shape = self.look

    @property
    def run(self) -> Path:
        return Path(self.keys["output_dir"])

    def start(self, arguments: list[str], before: Callable[[], None] | None = None, stdout: int | None = None) -> Child:
        """Forks a child that is `solotune ARGUMENTS`; its run directory is a new one unless it resumes."""
        if "--resume" not in arguments and arguments[0] == "train":
            shutil.rmtree(self.run, ignore_errors=True)
        return Child(self.folder, arguments, before, stdout)

    def checkpoint_problem(self) -> str | None:
        """What is wrong with the run's newest checkpoint, read as a resume reads it."""
        from solotune import checkpoint

        newest = checkpoint.newest(self.run / "checkpoints")
        if newest is None:
            return None
        try:
            return None if checkpoint.load(newest).step == int(newest.name[5:]) else "another step"
        except Exception as error:
            return repr(error)

    def metrics_problem(self) -> str | None:
        """What is wrong with metrics.jsonl: a line that does not parse, or a half one at its end."""
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.is_file() else ""
        if text and not text.endswith("\n"):
            return "half a line"
        try:
            for line in text.splitlines():
                json.loads(line)
        except json.JSONDecodeError as error:
            return str(error)
        return None


class Child:
    """A forked `solotune`."""

    def __init__(
        self, folder: Path, arguments: list[str], before: Callable[[], None] | None, stdout: int | None
    ) -> None:
        self.out, self.err = folder / "out.txt", folder / "err.txt"
        for path in (self.out, self.err):
            path.unlink(missing_ok=True)
            path.touch()
        self.signalled = 0.0
        self.started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        usual = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
        self.pid = os.fork()
        if self.pid == 0:  # stays in here
            self._be(arguments, before, stdout)
        for number, handler in usual.items():
            signal.signal(number, handler)

    def _be(self, arguments: list[str], before: Callable[[], None] | None, stdout: int | None) -> None:
        code = 99
        try:
            os.setsid()
            for path, number in ((self.out, 1), (self.err, 2)):
                handle = os.open(path, os.O_WRONLY | os.O_APPEND)
                os.dup2(handle if number == 2 or stdout is None else stdout, number)
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # type: ignore[misc] # noqa: SIM115
            sys.argv = ["solotune", *arguments]
            if before is not None:
                before()
            from solotune.cli import main

            code = main()
            with contextlib.suppress(OSError):
                sys.stdout.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def send(self, number: int) -> None:
        self.signalled = self.signalled or time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def await_stage(self, number: int) -> None:
        """Waits until the stage of that number has begun; 0 is what is before the first."""
        while number and not re.search(rf"^{STAGES[number - 1]}", self.out.read_text(), re.MULTILINE):
            time.sleep(0.001)

    def wait(self, seconds: float = CHILD_SECONDS) -> Ended:
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            now = time.monotonic()
            if pid:
                break
            if now > end:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                return Ended(98, now - self.started, now - self.signalled, *self._said())
            time.sleep(0.002)
        late = now - self.signalled if self.signalled else 0.0
        return Ended(os.waitstatus_to_exitcode(status), now - self.started, late, *self._said())

    def _said(self) -> tuple[str, str, str]:
        out, err = (path.read_text(errors="replace") if path.is_file() else "" for path in (self.out, self.err))
        seen = [stage for stage in STAGES if re.search(rf"^{stage}", out, re.MULTILINE)]
        return out, err, seen[-1] if seen else "starting"


# --- campaigns


def stop_signals(work: Workload, count: int, seed: int) -> list[Row]:
    """A signal at `count` random instants of a run, in all its phases: 143, 130 or 129, and what was done is saved."""
    rng = random.Random(seed)
    begins = _stage_times(work)
    micro_batch, save = _usual_times(work)
    began, bad, late, stages = time.monotonic(), [], [], dict[str, int]()
    for _ in range(count):
        number, stage = rng.choice(list(SIGNALS)), rng.randrange(len(begins) - 1)
        child = work.start(["train", str(work.config)], work.look_again)
        child.await_stage(stage)
        time.sleep(rng.uniform(0.0, begins[stage + 1] - begins[stage]))
        child.send(number)
        ended = child.wait()
        stages[ended.stage] = stages.get(ended.stage, 0) + 1
        if problem := _not_stopped_well(work, ended, number):
            bad.append(f"{ended.stage}, {signal.Signals(number).name}: {problem}\n{ended.err[-3000:]}")
        elif ended.code > 0:
            late.append((ended.late, ended.stage))
    note = f"stop signals by stage: {stages}; latency in all stages {_spread([t for t, _ in late])}, "
    note += f"in training {_spread([t for t, stage in late if stage == 'training'])}"
    note += f" (a micro-batch {micro_batch * 1e3:.0f} ms, a save {save * 1e3:.0f} ms)"
    print("\n".join([note, *bad]), file=sys.stderr)
    return [Row("stop signals", count, len(bad), time.monotonic() - began, seed)]


def _spread(seconds: list[float]) -> str:
    ordered = sorted(seconds) or [0.0]
    middle, worst = (ordered[int(len(ordered) * share)] * 1e3 for share in (0.5, 0.99))
    return f"p50 {middle:.0f} ms, p99 {worst:.0f} ms"


def _stage_times(work: Workload) -> list[float]:
    """Seconds from the start of an undisturbed run to where each of its stages begins, and to its end."""
    child, begins = work.start(["train", str(work.config)], work.look_again), [0.0]
    while not os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        seen = sum(bool(re.search(rf"^{stage}", child.out.read_text(), re.MULTILINE)) for stage in STAGES)
        if seen >= len(begins):
            begins.append(time.monotonic() - child.started)
        time.sleep(0.001)
    return [*begins, child.wait().seconds]


def _not_stopped_well(work: Workload, ended: Ended, number: int) -> str | None:
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
    steps = [e for e in _events(work) if e["event"] == "step"]
    saved = [e["step"] for e in _events(work) if e["event"] == "save"]
    if steps and (not saved or saved[-1] != steps[-1]["step"]):
        return f"step {steps[-1]['step']} is not saved"
    return None


def other_verbs(work: Workload, count: int, seed: int) -> list[Row]:
    """The same for verbs that only read: they end without a traceback, and leave the run as it was."""
    rng = random.Random(seed)
    work.start(["train", str(work.config)]).wait()
    run, config = str(work.run), str(work.config)
    commands = (["data", config], ["plan", config], ["evaluate", run], ["chat", run, "--prompt", "twice 3"])
    whole = [work.start(command).wait().seconds for command in commands]
    began, bad = time.monotonic(), []
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
    print("\n".join(bad), file=sys.stderr)
    return [Row("stop signals to other verbs", count, len(bad), time.monotonic() - began, seed)]


def _events(work: Workload) -> list[dict[str, Any]]:
    path = work.run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _usual_times(work: Workload) -> tuple[float, float]:
    """Seconds of a micro-batch, and of a save, in the run that was just done."""
    from solotune import checkpoint

    steps = sorted(e["step_seconds"] for e in _events(work) if e["event"] == "step")
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
            checkpoint.save(Path(scratch), number, loaded.adapter, "{}", optimizer, {})
            times.append(time.monotonic() - began)
    return steps[len(steps) // 2] / work.keys["gradient_accumulation_steps"], sorted(times)[2]


def second_signals(work: Workload, count: int, seed: int) -> list[Row]:
    """A second signal soon after the first: the process is gone at once, and the newest checkpoint is whole."""
    rng = random.Random(seed)
    whole = work.start(["train", str(work.config)]).wait()
    began, bad = time.monotonic(), []
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
        if not is_ended or problem or ended.late > 2:
            bad.append(f"second signal: {ended.code} {problem} {ended.late:.2f} s\n{ended.err[-600:]}")
    print("\n".join(bad), file=sys.stderr)
    return [Row("second signals", count, len(bad), time.monotonic() - began, seed)]


def stopped_and_resumed(work: Workload, count: int, seed: int) -> list[Row]:
    """Stopped at random instants again and again until it is done: the same losses and adapter as undisturbed."""
    rng = random.Random(seed)
    whole = work.start(["train", str(work.config)]).wait()
    expected = _result(work)
    began, bad = time.monotonic(), []
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
    print("\n".join(bad), file=sys.stderr)
    return [Row("stopped and resumed, bit for bit", count, len(bad), time.monotonic() - began, seed)]


def _result(work: Workload) -> tuple[Any, ...]:
    steps = {e["step"]: (e["loss"], e["grad_norm"]) for e in _events(work) if e["event"] == "step"}
    evals = {e["step"]: e["loss"] for e in _events(work) if e["event"] == "eval"}
    return steps, evals, (work.run / "adapter" / "adapter_model.safetensors").read_bytes()


# --- hangs


def hangs(work: Workload, count: int, seed: int) -> list[Row]:
    """Calls that never come back, in several phases: exit 9 within the limit and 5 s, the stacks written down."""
    began, bad, delays = time.monotonic(), [], []
    for case in _some(HANGS, count):
        child = work.start(["train", str(work.config)], lambda case=case: _hang(work, case))
        ended = child.wait(HANG_SECONDS + 30)
        stacks = work.run / "stacks.txt"
        where = ended.err + (stacks.read_text() if stacks.is_file() else "")
        hung_at = float((work.folder / "hung_at").read_text())
        late = child.started + ended.seconds - hung_at - HANG_SECONDS
        delays.append(late)
        if ended.code != 9 or not late < 5 or "_hang_now" not in where or "no sign of life for" not in ended.err:
            bad.append(f"hang, {case}: {ended.code} after {late:.1f} s\n{where[-1500:]}")
        elif problem := work.checkpoint_problem() or work.metrics_problem():
            bad.append(f"hang, {case}: {problem}")
    print("\n".join([f"hangs: ended {max(delays):.1f} s after the limit at most", *bad]), file=sys.stderr)
    return [Row("hangs", len(delays), len(bad), time.monotonic() - began, seed)]


HANG_SECONDS = 3.0  # the limit in these runs
HANGS = ("step holds Python's lock", "step reads from a FIFO", "tokenizer sleeps", "generation sleeps")


def _hang(work: Workload, case: str) -> None:
    """In the child: sets the limit, and has one function hang."""
    from solotune import evaluation, training, watchdog
    from solotune.dataset.encode import Encoder

    _short_limit(watchdog)

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
        evaluation.generate = _hang_now
    else:
        plain, calls = training.train_step, []

        def step(*args: Any, **keys: Any) -> Any:
            calls.append(1)
            return _hang_now() if len(calls) == 6 else plain(*args, **keys)

        training.train_step = step


def _short_limit(watchdog: Any) -> None:
    watchdog.LIMIT_SECONDS = HANG_SECONDS
    watchdog.TIMES_LONGEST = watchdog.TIMES_EXPECTED = 0


def stopped_processes(work: Workload, count: int, seed: int) -> list[Row]:
    """SIGSTOP for longer than the limit, then SIGCONT: no alarm, and the run ends well."""
    rng = random.Random(seed)
    begins = _stage_times(work)
    began, bad = time.monotonic(), []
    for _ in range(count):
        from solotune import watchdog

        child = work.start(["train", str(work.config)], lambda: _short_limit(watchdog))
        time.sleep(rng.uniform(0.3, 0.9) * begins[-1])
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(2 * HANG_SECONDS)
        os.kill(child.pid, signal.SIGCONT)
        ended = child.wait()
        if ended.code != 0:
            bad.append(f"stopped and continued: {ended.code}\n{ended.err[-1500:]}")
    print("\n".join(bad), file=sys.stderr)
    return [Row("stopped and continued", count, len(bad), time.monotonic() - began, seed)]


# --- clock and output


def outputs(work: Workload, count: int, seed: int) -> list[Row]:
    """Nobody reads, nothing can be written, the clock jumps: the run goes on or exits 8, and no line is half."""
    began, bad, done, codes = time.monotonic(), [], _some(tuple(OUTPUTS), count), []
    for case in done:
        arguments = ["train", str(work.config), *(["--json"] if "json" in case else [])]
        before, stdout = OUTPUTS[case]
        read_fd, write_fd = os.openpty() if stdout == "terminal" else os.pipe()
        full = os.open("/dev/full", os.O_WRONLY)

        def in_child(before: Callable[[Workload], None] = before, read_fd: int = read_fd) -> None:
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
    print("\n".join([f"outputs: {dict(zip(done, codes, strict=True))}", *bad]), file=sys.stderr)
    return [Row("clock and output", len(done), len(bad), time.monotonic() - began, seed)]


def _durations_problem(work: Workload) -> str | None:
    seconds = [e["step_seconds"] for e in _events(work) if e["event"] == "step"]
    return None if all(0 < s < 60 for s in seconds) else f"durations {seconds}"


def _at_step(number: int, do: Callable[[Path], None]) -> Callable[[Workload], None]:
    """In the child: has something done to metrics.jsonl within step `number`."""

    def before(work: Workload) -> None:
        from solotune import training

        plain, calls = training.train_step, []

        def step(*args: Any, **keys: Any) -> Any:
            calls.append(1)
            if len(calls) == number + 2:  # the preflight makes two
                do(work.run / "metrics.jsonl")
            return plain(*args, **keys)

        training.train_step = step

    return before


def _read_only(work: Workload) -> None:
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


def _clock_jumps(seconds: float) -> Callable[[Workload], None]:
    def before(work: Workload) -> None:
        plain = time.time

        def jump(path: Path) -> None:
            time.time = lambda: plain() + seconds

        _at_step(4, jump)(work)

    return before


def _nothing(work: Workload) -> None:
    pass


OUTPUTS: dict[str, tuple[Callable[[Workload], None], str | None]] = {
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


CAMPAIGNS: dict[str, tuple[Callable[[Workload, int, int], list[Row]], int]] = {
    "stop": (stop_signals, 200),
    "verbs": (other_verbs, 40),
    "second": (second_signals, 50),
    "resume": (stopped_and_resumed, 20),
    "hang": (hangs, len(HANGS)),
    "sigstop": (stopped_processes, 5),
    "output": (outputs, len(OUTPUTS)),
}
"""name -> (campaign, runs at size 100)."""


@contextlib.contextmanager
def workload(**keys: Any) -> Iterator[Workload]:
    with tempfile.TemporaryDirectory(prefix="solotune-faults-") as folder:
        work = Workload(Path(folder), dict(keys))
        work.prepare()
        yield work


def campaign(size: int = 1, names: tuple[str, ...] = (), seed: int = 0) -> list[Row]:
    """The rows of the campaigns named, or of all, at `size` per cent of their runs."""
    with workload() as work:
        return [
            row
            for name, (run, full) in CAMPAIGNS.items()
            if not names or name in names
            for row in run(work, max(1, full * size // 100), seed)
        ]


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    size = int(given[0]) if given and given[0].isdigit() else 1
    rows = campaign(size, tuple(name for name in given if name in CAMPAIGNS))
    print(f"{'campaign':36}{'count':>7}{'bad':>5}{'seconds':>9}{'seed':>6}")
    for row in rows:
        print(f"{row.name:36}{row.count:>7}{row.bad:>5}{row.seconds:>9.1f}{row.seed:>6}")
    return 1 if any(row.bad for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
