"""Every way a command can fail, with its exit code.

    SolotuneError               1  never raised itself; what is no SolotuneError is a bug of ours and exits with 1
    ├── InputError              2  config, data or model
    ├── CheckError              3  doctor, a plan that does not fit, a leak
    ├── DirectoryInUseError     4
    ├── IntegrityError          5  changed data, damaged checkpoint, wrong base
    ├── NonFiniteError          6  loss, gradient or weights
    ├── DeviceError             7  out of memory, lost
    ├── StorageError            8  disk full, read-only, quota
    ├── HangError               9  never raised: the run's guard ends the process
    └── InterruptedRunError     128 + signal: 129 SIGHUP, 130 Ctrl-C, 143 SIGTERM

One table, printed in the docs and tested: a shell script or a scheduler may branch on these numbers, so a code never
changes its meaning. An error a user can mend says four things: what is wrong and where, the value that was seen, what
is allowed, and what to change. Anything that is not a `SolotuneError` is a bug of ours and exits with 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class SolotuneError(Exception):
    """An expected failure: the message is for the user and no traceback is shown.

    Args:
        problem: one sentence, starting with the place (`chats.jsonl, line 17: ...`) where there is one.
        seen: the offending value, as the user wrote it.
        allowed: what would have been accepted.
        change: the one thing to do about it.
        fault: the code of the diagnosis's catalogue, where what is refused is one of its faults (`solotune explain`).
    """

    exit_code = 1
    meaning = "a bug of solotune"

    def __init__(
        self,
        problem: str,
        *,
        seen: object = None,
        allowed: str | None = None,
        change: str | None = None,
        fault: str | None = None,
    ) -> None:
        self.problem, self.seen, self.allowed, self.change, self.fault = problem, seen, allowed, change, fault
        super().__init__(problem)

    def __str__(self) -> str:
        rows = (("seen", self.seen), ("allowed", self.allowed), ("change", self.change))
        return "\n".join([self.problem] + [f"  {name + ':':9}{text}" for name, text in rows if text is not None])

    def to_json(self) -> dict[str, object]:
        """The same four parts for `--json`."""
        parts = {"problem": self.problem, "seen": self.seen, "allowed": self.allowed, "change": self.change}
        return {"error": {"exit_code": self.exit_code, "meaning": self.meaning, **parts}}


class RunNote(str):
    """A note on an exception of any kind (`add_note`): the run directory that it came out of, also as a `Path`."""

    def __new__(cls, run_dir: Path) -> RunNote:
        note = super().__new__(cls, f"in the run {run_dir}")
        note.run_dir = run_dir
        return note

    run_dir: Path


def run_dir_of(error: BaseException) -> Path | None:
    """The run directory that an exception came out of, where a note says so."""
    return next((note.run_dir for note in getattr(error, "__notes__", ()) if isinstance(note, RunNote)), None)


class InputError(SolotuneError):
    """The config, the data or the model folder is not usable as it stands."""

    exit_code = 2
    meaning = "bad input: config, data or model"


class CheckError(SolotuneError):
    """A check said no: doctor, a plan that does not fit, a leak."""

    exit_code = 3
    meaning = "a check said no"


class DirectoryInUseError(SolotuneError):
    """Another process is writing this run directory, or it already holds a run."""

    exit_code = 4
    meaning = "the run directory is in use"


class IntegrityError(SolotuneError):
    """A file is not what the run recorded: changed data, damaged checkpoint, wrong base."""

    exit_code = 5
    meaning = "a file is not what the run recorded"


class NonFiniteError(SolotuneError):
    """Something is NaN or infinite; raised before the optimizer step, so the weights are still good.

    Args:
        facts: of the finding, for its line in metrics.jsonl (`events.NonFiniteEvent`).
    """

    exit_code = 6
    meaning = "loss, gradient or weights are not finite"

    def __init__(self, problem: str, *, facts: dict[str, Any] | None = None, **parts: Any) -> None:
        super().__init__(problem, **parts)
        self.facts = facts or {}

    def at(self, where: str) -> NonFiniteError:
        """The same, with its place."""
        parts = {"seen": self.seen, "allowed": self.allowed, "change": self.change}
        return NonFiniteError(f"{where}: {self.problem}", facts=self.facts, **parts)


class DeviceError(SolotuneError):
    """The accelerator failed: out of memory, lost, or in a state that only a new process mends."""

    exit_code = 7
    meaning = "the device failed"


class StorageError(SolotuneError):
    """A write failed: disk full, read-only, quota, I/O error."""

    exit_code = 8
    meaning = "a write failed"


class HangError(SolotuneError):
    """The run gave no sign of life; the watchdog ended the process, so this is never raised."""

    exit_code = 9
    meaning = "the run hung, and was ended"


class InterruptedRunError(SolotuneError):
    """Ctrl-C or a scheduler's SIGTERM: what was done is saved."""

    meaning = "interrupted; what was done is saved"

    def __init__(self, signal_number: int, problem: str, change: str) -> None:
        super().__init__(problem, change=change)
        self.exit_code = 128 + signal_number


def resume_command(run: object) -> str:
    """What continues the run in this directory; the config saved there, for the user's may have changed since."""
    return f"solotune train {run}/config.yaml output_dir={run} --resume"


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
    129: "hung up (SIGHUP); what was done is saved",
    130: "interrupted (Ctrl-C); what was done is saved",
    137: "killed (SIGKILL), also where a hung run cannot end with 9",
    143: "terminated (SIGTERM); what was done is saved",
}
