"""The command line of a tiny run in processes that can be stopped, hung and left unheard: what those campaigns share.

Each is forked from one that has imported torch once, so that a run takes a second.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES = (
    "loading libraries", "reading data", "planning", "loading model", "trying the largest step", "training",
    "comparing base",
)  # fmt: skip
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
CHILD_SECONDS = 600.0  # what takes longer hangs, also on a machine with much else to do


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
class Commands:
    """A tiny chat run in a folder of its own: what every campaign starts, stops and looks at."""

    folder: Path
    keys: dict[str, Any] = field(default_factory=dict)
    usual_seconds: float = 0.0  # of a run that nothing disturbs, on this machine with what else runs on it

    def prepare(self) -> None:
        """Makes model and data, and imports and warms what every child will use."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ["XDG_CACHE_HOME"] = str(self.folder / "cache")
        import torch
        import transformers

        from solotune.api.train import prepare_run
        from solotune.config.load import load_config
        from solotune.display.progress import SilentDisplay
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
        prepare_run(load_config(self.keys), False, SilentDisplay())  # so that no child imports anything
        ended = self.start(["train", str(self.config)]).wait()
        assert ended.code == 0, f"the run does not work undisturbed: {ended.code}\n{ended.err[-3000:]}"
        self.usual_seconds = ended.seconds

    def _remember_shapes(self) -> None:
        """Has model and CPU looked at once for all children but those that are stopped while they plan: 2 s each."""
        from solotune.planning import plan_inputs
        from solotune.planning.model_shape import cpu_gflops, model_shape

        known: dict[Any, Any] = {}

        def remembered(config: Any, model_files: Any = None) -> Any:
            key = (config.base_precision, config.multiplies_in_fp8)
            if key not in known:
                known[key] = model_shape(config, model_files)
            return known[key]

        plan_inputs.model_shape = remembered
        plan_inputs.cpu_gflops = functools.cache(cpu_gflops)

    def look_again(self) -> None:
        """In a child: planning is what it is for users."""
        from solotune.planning import model_shape, plan_inputs

        plan_inputs.model_shape, plan_inputs.cpu_gflops = model_shape.model_shape, model_shape.cpu_gflops

    @property
    def run(self) -> Path:
        return Path(self.keys["output_dir"])

    def start(self, arguments: list[str], before: Callable[[], None] | None = None, stdout: int | None = None) -> Child:
        """Forks a child that is `solotune ARGUMENTS`; its run directory is a new one unless it resumes."""
        if "--resume" not in arguments and arguments[0] == "train":
            shutil.rmtree(self.run, ignore_errors=True)
        return Child(self.folder, arguments, before, stdout)

    def events(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.is_file() else []

    def checkpoint_problem(self) -> str | None:
        """What is wrong with the run's newest checkpoint, read as a resume reads it."""
        from solotune.training import checkpoint

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
        content = path.read_bytes() if path.is_file() else b""
        if content and not content.endswith(b"\n"):
            return "half a line"
        try:
            for line in content.splitlines():
                json.loads(line)
        except ValueError as error:  # no JSON, or no UTF-8
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
        """Waits until the stage of that number has begun, or the child has ended; 0 is what is before the first."""
        while number and STAGES[number - 1] not in stages_in(self.out.read_bytes()) and not self.has_ended():
            time.sleep(0.001)

    def has_ended(self) -> bool:
        """Whether there is nothing to wait for; its exit code is left for `wait`."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

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
        out, err = (path.read_bytes() if path.is_file() else b"" for path in (self.out, self.err))
        seen = stages_in(out)
        return out.decode(errors="replace"), err.decode(errors="replace"), seen[-1] if seen else "starting"


def stages_in(out: bytes) -> list[str]:
    """The stages that a run's output says to have begun; bytes, since it may end within a character."""
    return [stage for stage in STAGES if re.search(rf"^{stage}".encode(), out, re.MULTILINE)]


def stage_times(work: Commands) -> list[float]:
    """Seconds from the start of an undisturbed run to where each of its stages begins, and to its end."""
    child, begins, is_over = work.start(["train", str(work.config)], work.look_again), [0.0], False
    while not is_over:
        is_over = child.has_ended()  # asked before its output is read, so that none of that is missed
        seen, now = len(stages_in(child.out.read_bytes())), time.monotonic() - child.started
        begins += [now] * (1 + seen - len(begins))
        time.sleep(0.001)
    return [*begins, child.wait().seconds]


@contextlib.contextmanager
def commands(**keys: Any) -> Iterator[Commands]:
    with tempfile.TemporaryDirectory(prefix="solotune-faults-") as folder:
        work = Commands(Path(folder), dict(keys))
        work.prepare()
        yield work
