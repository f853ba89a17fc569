"""The run's own log: the observer that writes metrics.jsonl.

It runs before all other observers, so what is shown is always recorded too. It is the only one whose error stops the
run: a run that cannot be recorded does not continue.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from solotune.config.run_config import Choice
    from solotune.run.events import DeviceFailedEvent, DiagnosedEvent, EvalEvent, NonFiniteEvent, SaveEvent, StepEvent
    from solotune.run.run_dir import RunDirectory


class RunLog:
    """Writes each event to metrics.jsonl; a method raises StorageError if the line cannot be written."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run

    def phase(self, name: str) -> None: ...

    def note(self, text: str) -> None: ...

    def choices(self, choices: Sequence[Choice]) -> None: ...

    def progress(self, done: int, total: int, what: str) -> None: ...

    def planned(self, peak_bytes: int) -> None: ...

    def begin(self, total_steps: int, done: int = 0) -> None: ...

    def step(self, event: StepEvent) -> None:
        self._run.log(event)

    def evaluated(self, event: EvalEvent, num_rows: int) -> None:
        self._run.log(event)

    def saved(self, event: SaveEvent, path: Path) -> None:
        self._run.log(event)

    def diagnosed(self, event: DiagnosedEvent, text: str) -> None:
        self._run.log(event)

    def failed(self, event: NonFiniteEvent | DeviceFailedEvent) -> None:
        self._run.log(event)

    def finish(self) -> None: ...
