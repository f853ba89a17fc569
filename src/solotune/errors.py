"""Errors of solotune, each kind with its exit code.

    SolotuneError               1  never raised itself; any other exception is a bug of solotune and exits with 1
    ├── InputError              2  config, data or model
    ├── CheckError              3  doctor, a plan that does not fit, a leak
    ├── DirectoryInUseError     4
    ├── IntegrityError          5  changed data, damaged checkpoint, wrong base
    ├── NonFiniteError          6  loss, gradient or weights
    ├── DeviceError             7  out of memory, lost
    ├── StorageError            8  disk full, read-only, quota
    ├── HangError               9  never raised: the watchdog ends the process
    ├── RankError               1  another rank of a run on several GPUs ended; with the code of that rank
    └── InterruptedRunError     128 + signal: 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM

The table is printed in the docs and tested: shell scripts and schedulers rely on these numbers, so a code never changes
its meaning. An error that the user can fix says four things: what is wrong and where, the value that was seen, what is
allowed, and what to change.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solotune.result_repr import in_notebook
from solotune.units import escape_terminal


@dataclass(frozen=True)
class Advice:
    """What to change, with the config keys that do it: `column_mapping: {question: prompt, answer: completion}`.

    Args:
        text: as the message says it.
        settings: the keys and their values.
        is_choice: whether it changes what is learned, so that the user has to decide; `solotune init` does the rest.
    """

    text: str
    settings: Mapping[str, Any]
    is_choice: bool = False

    def __str__(self) -> str:
        return self.text


class SolotuneError(Exception):
    """An expected failure: the user sees the message, without a traceback.

    Args:
        problem: one sentence, starting with the place (`chats.jsonl, line 17: ...`) if there is one.
        seen: the offending value, as the user wrote it.
        allowed: what would have been accepted.
        change: what to do about it; also in `advice`, if it is an Advice.
        fault: the fault code (`solotune explain`), if the problem is one of the faults that `solotune diagnose` knows.
    """

    exit_code = 1
    meaning = "a bug of solotune"

    def __init__(
        self,
        problem: str,
        *,
        seen: object = None,
        allowed: str | None = None,
        change: str | Advice | None = None,
        fault: str | None = None,
    ) -> None:
        self.problem, self.seen, self.allowed, self.fault = problem, seen, allowed, fault
        self.change: str | None = None
        self.advice: list[Advice] = []
        self.advise(change)
        super().__init__(problem)

    def advise(self, change: str | Advice | None) -> None:
        """Say what to change, in the place of what was said before."""
        self.change = None if change is None else str(change)
        self.advice = [change] if isinstance(change, Advice) else []

    def __str__(self) -> str:
        rows = (("seen", self.seen), ("allowed", self.allowed), ("change", self.change))
        return "\n".join([self.problem] + [f"  {name + ':':9}{text}" for name, text in rows if text is not None])

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in a cell: the message, as on the command line, without a traceback."""
        return [escape_terminal(f"{type(self).__name__}: {self}")]

    def to_json(self) -> dict[str, object]:
        """The four parts and the exit code, for `--json`."""
        parts = {"problem": self.problem, "seen": self.seen, "allowed": self.allowed, "change": self.change}
        return {"error": {"exit_code": self.exit_code, "meaning": self.meaning, **parts}}


class SolotuneWarning(UserWarning):
    """A warning of solotune itself; those of the libraries are hidden."""


class RunNote(str):
    """Note on any exception (`add_note`) with the run directory that it belongs to, also as a `Path`."""

    def __new__(cls, run_dir: Path) -> RunNote:
        note = super().__new__(cls, f"in the run {run_dir}")
        note.run_dir = run_dir
        return note

    run_dir: Path


def run_dir_of(error: BaseException) -> Path | None:
    """The run directory in an exception's `RunNote`; None without such a note."""
    return next((note.run_dir for note in getattr(error, "__notes__", ()) if isinstance(note, RunNote)), None)


SAID_BY_ANOTHER_RANK = "another rank of this run says why it has ended"
"""Note on an exception (`add_note`) that the command line does not print once more."""


def is_said(error: BaseException) -> bool:
    """Whether another rank of the run tells the user about this exception."""
    return SAID_BY_ANOTHER_RANK in getattr(error, "__notes__", ())


class InputError(SolotuneError):
    """The config, the data or the model folder cannot be used as it is."""

    exit_code = 2
    meaning = "bad input: config, data or model"


class CheckError(SolotuneError):
    """A check failed: doctor, a plan that does not fit, a leak between training and held-out rows."""

    exit_code = 3
    meaning = "a check failed (does not fit, fault found)"


class DirectoryInUseError(SolotuneError):
    """Another process writes to this run directory, or it already contains a run."""

    exit_code = 4
    meaning = "the run directory is in use"


class IntegrityError(SolotuneError):
    """A file differs from what the run recorded: changed data, damaged checkpoint, wrong base model."""

    exit_code = 5
    meaning = "a file has changed since the run recorded it"


class NonFiniteError(SolotuneError):
    """Something is NaN or infinite; raised before the optimizer step, so the weights are still valid.

    Args:
        facts: fields of the event in metrics.jsonl (`events.NonFiniteEvent`).
    """

    exit_code = 6
    meaning = "loss, gradient or weights are NaN or infinite"

    def __init__(self, problem: str, *, facts: dict[str, Any] | None = None, **parts: Any) -> None:
        super().__init__(problem, **parts)
        self.facts = facts or {}

    def at(self, where: str) -> NonFiniteError:
        """Copy with the place in front of the problem."""
        parts = {"seen": self.seen, "allowed": self.allowed, "change": self.change}
        return NonFiniteError(f"{where}: {self.problem}", facts=self.facts, **parts)


class DeviceError(SolotuneError):
    """The GPU failed: out of memory, lost, or in a state that only a new process can leave."""

    exit_code = 7
    meaning = "the GPU or device failed (for example: out of memory)"


class StorageError(SolotuneError):
    """A write failed: disk full, read-only, quota, I/O error."""

    exit_code = 8
    meaning = "a write failed (disk full, read-only, I/O error)"


class HangError(SolotuneError):
    """The run made no progress; the watchdog ended the process, so this is never raised."""

    exit_code = 9
    meaning = "the run hung and was stopped"


class InterruptedRunError(SolotuneError):
    """Stopped by Ctrl-C, SIGTERM or SIGHUP; not an error, so the message has no `error:`.

    Args:
        problem: what happened and what is saved: `stopped after step 22; checkpoint saved`
        change: the command to go on with.
    """

    meaning = "interrupted; progress is saved"

    def __init__(self, signal_number: int, problem: str, change: str) -> None:
        super().__init__(problem, change=change)
        self.exit_code = 128 + signal_number

    def in_sentences(self) -> str:
        """`Stopped after step 22; checkpoint saved. Continue with: ...`, as the command line prints it."""
        parts = [part for part in (self.problem, self.change) if part]
        return ". ".join(f"{part[0].upper()}{part[1:]}" for part in parts)

    def _render_traceback_(self) -> list[str]:
        return [escape_terminal(self.in_sentences())]


class RankError(SolotuneError):
    """Another rank of a run on several GPUs has failed, died or hangs; with the exit code that this has."""

    meaning = "another rank of the run has ended it"

    def __init__(self, problem: str, exit_code: int, **parts: Any) -> None:
        super().__init__(problem, **parts)
        self.exit_code = exit_code
        self.rank: int | None = None  # which; None: the connection to all is lost
        self.traceback: str | None = None  # of a bug on that rank


def program() -> str:
    """How this program is called from here: `solotune`, its path if that is not on PATH, or `python -m solotune`."""
    if shutil.which("solotune"):
        return "solotune"
    beside = Path(sys.executable).with_name("solotune")
    if not os.access(beside, os.X_OK):
        return f"{sys.executable} -m solotune"
    is_below = beside.is_relative_to(Path.cwd())
    return str(beside.relative_to(Path.cwd()) if is_below else beside)


def resume_command(run: object, ranks: tuple[int, int] = (1, 1)) -> str:
    """The command that continues a run, in a notebook the call. It uses the config saved in the run; the user's may
    have changed since.

    Args:
        ranks: of a run of other processes: how many, and how many of them on each machine.
    """
    if in_notebook():
        return f'solotune.train("{run}/config.yaml", output_dir="{run}", resume=True)'
    return f"{_launched_program(*ranks)} train {run}/config.yaml output_dir={run} --resume"


def _launched_program(ranks: int, here: int) -> str:
    """How this program was started to train: by torchrun, if this process or the run has several ranks."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size.isdecimal() and int(size) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        ranks, here = int(size), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if ranks < 2:
        return program()
    nodes = "--standalone " if ranks == here else f"--nnodes={ranks // here} [...] "
    return f"torchrun {nodes}--nproc-per-node={here} -m solotune"


EXIT_CODES: dict[int, str] = {
    0: "done",
    1: SolotuneError.meaning,
    **{
        kind.exit_code: kind.meaning
        for kind in (
            InputError,
            CheckError,
            DirectoryInUseError,
            IntegrityError,
            NonFiniteError,
            DeviceError,
            StorageError,
            HangError,
        )
    },
    129: "hung up (SIGHUP); progress is saved",
    130: "interrupted (Ctrl-C); progress is saved",
    137: "killed (SIGKILL); also a hung run that cannot exit with 9",
    143: "terminated (SIGTERM); progress is saved",
}
