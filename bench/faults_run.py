"""A small real run that can be started, killed and compared thousands of times.

The server process imports torch and transformers once, trains once so that all is warm, and reads data, plan and model;
each run of the campaign is then a fork of it that goes through `solotune.train` from where the run directory is
made: every write of a run comes after that. `full=True` reads, plans and loads in the fork as well.

In these forks the clock of a step is a counter and the peak of memory a constant, so two runs that do the same write
the same bytes. That makes states on disk comparable: what a resume from one state gives is remembered by the state's
hash, and many kills leave the same state.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from solotune.api import train as train_verb
from solotune.config.load import load_config
from solotune.display.progress import Display, SilentDisplay
from solotune.errors import SolotuneError
from solotune.run import fs_ops
from solotune.run.events import ResumeEvent, SaveEvent, from_line, to_line
from solotune.run.manifest import check_folder
from solotune.run.record import RunRecord
from solotune.run.run_dir import LOCK, LOG, RunDirectory
from solotune.training import checkpoint, loop
from solotune.training.resume import continued, fingerprints, recorded_day
from solotune.training.verify_run import verify

KILLED, HUNG = -signal.SIGKILL, 9
TIMES = ("step_seconds", "tokens_per_second", "peak_bytes")
CHILD_SECONDS = 600.0  # what takes longer hangs, also on a machine with much else to do


class Operation(NamedTuple):
    """One call through `storage`, its path relative to the folder above the run."""

    kind: str
    path: str
    content: bytes


class Outcome(NamedTuple):
    """How a child ended: exit code (negative: the signal), and what it said if it failed."""

    code: int
    said: str


class Workload:
    """The run, its folder, and what it comes to when nothing disturbs it."""

    def __init__(self, folder: Path, **keys: Any) -> None:
        from tests import tiny

        self.folder, self.run = folder, folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        import transformers

        transformers.AutoModelForCausalLM.from_config(tiny.FAMILIES["llama"]()).save_pretrained(folder / "model")
        tiny.save_tokenizer(folder / "model")
        (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.chat_rows(24)))
        self.keys: dict[str, Any] = {
            "model_name_or_path": str(folder / "model"),
            "dataset": str(folder / "chats.jsonl"),
            "output_dir": str(self.run),
            "validation_size": 4,
            "max_length": 64,
            "use_cpu": True,
            "lora_target_modules": ["q_proj", "v_proj"],
            "lora_r": 2,
            "lora_dropout": 0.1,
            "max_steps": 8,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "save_steps": 2,
            "save_total_limit": 2,
            "eval_steps": 4,
            "num_samples": 1,
            "max_new_tokens": 2,
            "seed": 0,
            **keys,
        }
        config = load_config(self.keys)
        train_verb.train(config, ["max_steps=2", f"output_dir={folder / 'warm'}"])
        self.ready = train_verb.prepare_run(config, False, SilentDisplay())
        self._results: dict[str, tuple[str, Outcome, int]] = {}
        self.trace: list[Operation] = []
        self.reference = ""

    def measure(self) -> None:
        """Runs undisturbed, twice: what is done, and that it comes to the same."""
        states = []
        for _ in range(2):
            self.clear()
            self.trace, outcome = self.traced()
            assert outcome.code == 0, outcome.said
            states.append(self.state())
        assert states[0] == states[1], "two undisturbed runs differ"
        self.reference = states[0]

    def clear(self) -> None:
        shutil.rmtree(self.run, ignore_errors=True)

    def train(
        self,
        resume: bool,
        hook: fs_ops.Hook | None = None,
        full: bool = False,
        display: Display | None = None,
    ) -> None:
        """In a child: the run itself."""
        ready = self.ready
        if not full:
            counter = itertools.count()
            time.perf_counter = lambda: float(next(counter))
            loop.peak_bytes = lambda device: 1  # type: ignore[assignment]

            def prepared(config: Any, resume: bool, display: Display, world: Any) -> Any:
                if not resume:
                    RunDirectory.refuse_occupied(config.output_dir)
                recorded_day(
                    config.resume_from_checkpoint, continued(config.output_dir) if resume else None
                )  # read as the real one reads it
                now = fingerprints(ready.config, ready.prepared, ready.machine, ready.model_files)
                return replace(ready, fingerprints=now)  # a test may have given it another config

            train_verb.prepare_run = prepared
        with fs_ops.watched(hook) if hook else contextlib.nullcontext():
            train_verb.train(load_config(self.keys), resume=resume, display=display)

    def child(self, work: Callable[[], None]) -> int:
        """Forks and works there; the process's id. What it says of a failure goes to a file."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 0
        try:
            null = os.open(os.devnull, os.O_RDWR)
            for number in (0, 1, 2):
                os.dup2(null, number)
            work()
        except SolotuneError as error:
            code = error.exit_code
            self._said.write_text(str(error))
        except BaseException:
            code = 1
            self._said.write_text(traceback.format_exc())
        os._exit(code)

    @property
    def _said(self) -> Path:
        return self.folder / f"said-{os.getpid()}"

    def wait(self, pid: int, seconds: float = CHILD_SECONDS) -> Outcome:
        """Its end; a child that does not end is killed and counted as hung."""
        deadline = time.monotonic() + seconds
        while (outcome := self.ended(pid)) is None:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return Outcome(HUNG, "hung")
            time.sleep(0.002)
        return outcome

    def ended(self, pid: int) -> Outcome | None:
        """How a child has ended, if it has."""
        done, status = os.waitpid(pid, os.WNOHANG)
        if not done:
            return None
        file = self.folder / f"said-{pid}"
        said = file.read_text() if file.exists() else ""
        file.unlink(missing_ok=True)
        return Outcome(os.waitstatus_to_exitcode(status), said)

    def once(self, resume: bool, hook: fs_ops.Hook | None = None, full: bool = False) -> Outcome:
        """One run in a child, to its end."""
        return self.wait(self.child(lambda: self.train(resume, hook, full)))

    def traced(self, resume: bool = False) -> tuple[list[Operation], Outcome]:
        """One run with its operations below the run directory and its parent."""
        log = self.folder / "trace"
        log.unlink(missing_ok=True)

        def work() -> None:
            with log.open("wb") as file:

                def note(kind: str, path: Path, content: bytes) -> None:
                    if self.is_ours(path):
                        line = [kind, os.path.relpath(path, self.folder), content.hex()]
                        file.write(json.dumps(line).encode() + b"\n")
                        file.flush()

                self.train(resume, note)

        outcome = self.wait(self.child(work))
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return [Operation(kind, path, bytes.fromhex(content)) for kind, path, content in lines], outcome

    def is_ours(self, path: Path) -> bool:
        """Whether an operation is on the run directory, on what is in it, or on the folder above it."""
        return path == self.folder or path == self.run or self.run in path.parents

    def at(self, number: int, act: Callable[[str, Path, bytes], None]) -> fs_ops.Hook:
        """A hook that acts at the operation of this number, counted from 0, and at all after it."""
        count = itertools.count()

        def hook(kind: str, path: Path, content: bytes) -> None:
            if self.is_ours(path) and next(count) >= number:
                act(kind, path, content)

        return hook

    # --- what is on disk

    def tree(self) -> str:
        """A hash of what a resume can see."""
        digest = hashlib.sha256()
        for path in sorted(self.run.rglob("*")) if self.run.exists() else ():
            if path.name in (LOCK, LOG):
                continue
            content = path.read_bytes() if path.is_file() else b"folder"
            digest.update(f"{path.relative_to(self.run)} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    def state(self) -> str:
        """What a finished run has come to, without times, as text; and that nothing is wrong with it."""
        found = verify(self.run)
        events = [json.loads(to_line(e)) for e in RunRecord.read(self.run).events if not isinstance(e, ResumeEvent)]
        lines = [{key: value for key, value in event.items() if key not in TIMES} for event in events]
        last = checkpoint.newest(RunDirectory(self.run).checkpoints)
        files = [self.run / "evaluation.json", self.run / "adapter" / "adapter_model.safetensors"]
        files += [last / f"{name}.safetensors" for name in ("adapter_model", "optimizer", "random")] if last else []
        return json.dumps(
            {
                "problems": found.problems,
                "notes": [note for note in found.notes if not note.startswith("not checked, because")],
                "metrics": lines,
                "files": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
                "checkpoints": [
                    path.name for _, path in checkpoint.list_checkpoints(RunDirectory(self.run).checkpoints)
                ],
                "hidden": sorted(path.name for path in self.run.rglob(".*") if path.name != LOCK),
            },
            indent=1,
        )

    def finish(self) -> tuple[str, Outcome, int]:
        """Resumes what lies there and says what came of it: final state, outcome, step it went on from."""
        key = self.tree()
        if key not in self._results:
            outcome = self.once(resume=True)
            state = self.state() if outcome.code == 0 else ""
            resumed = RunRecord.read(self.run).resumed_steps
            self._results[key] = (state, outcome, resumed[-1] if resumed else 0)
        return self._results[key]

    def forget(self) -> None:
        """Forgets what resumes came to: the code has changed."""
        self._results.clear()

    @property
    def num_states(self) -> int:
        """Different states on disk that were resumed so far."""
        return len(self._results)

    def what_is_wrong(self, claimed: int = 0) -> str | None:
        """Resumes what lies there; None where it comes to what an undisturbed run comes to.

        Args:
            claimed: the step of the last checkpoint that the killed run said to have saved.
        """
        state, outcome, started = self.finish()
        if outcome.code != 0:
            return f"resume ended with {outcome.code}: {outcome.said}"
        if state != self.reference:
            return f"another result: {first_difference(self.reference, state)}"
        if started < claimed:
            return f"step {claimed} was said to be saved, the resume began at {started}"
        return None

    def damaged_checkpoints(self) -> list[str]:
        """Visible checkpoints that are not whole."""
        return [
            path.name
            for _, path in checkpoint.list_checkpoints(RunDirectory(self.run).checkpoints)
            if check_folder(path)
        ]

    def claimed(self, operations: list[Operation]) -> int:
        """The step of the last checkpoint that is said to be saved by these operations."""
        steps = [0]
        for operation in operations:
            if operation.kind == "write" and operation.path.endswith("metrics.jsonl"):
                event = from_line(operation.content)
                if isinstance(event, SaveEvent):
                    steps.append(event.step)
        return max(steps)

    def claimed_on_disk(self) -> int:
        """The same of what lies there."""
        return max((event.step for event in RunRecord.read(self.run).of(SaveEvent)), default=0)


def first_difference(one: str, other: str) -> str:
    """The first lines that differ."""
    pairs = itertools.zip_longest(one.splitlines(), other.splitlines())
    return next((f"{a!r} became {b!r}" for a, b in pairs if a != b), "nothing")


@contextlib.contextmanager
def snapshot(folder: Path) -> Iterator[Callable[[], None]]:
    """Keeps a copy of a folder; what it yields puts the folder back to it."""
    kept = folder.with_name(folder.name + "-kept")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept)

    def put_back() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(kept, folder)

    try:
        yield put_back
    finally:
        shutil.rmtree(kept)


def after_kill(work: Workload, code: int, claimed: int) -> str | None:
    """What is wrong after a kill: how the child ended, what is visible, what a resume comes to."""
    if code != KILLED:
        return f"ended with {code} before it could be killed"
    if damaged := work.damaged_checkpoints():
        return f"damaged checkpoints: {', '.join(damaged)}"
    return work.what_is_wrong(claimed)


@dataclass
class Result:
    """One line of the table."""

    part: str
    injected: int = 0
    failures: list[str] = field(default_factory=list)
    num_states: int = 0  # different ones on disk that were resumed
    seconds: float = 0.0
    note: str = ""

    def take(self, name: str, problem: str | None) -> None:
        """Counts an injection."""
        self.injected += 1
        if problem:
            self.failures.append(f"{name}: {problem}")
