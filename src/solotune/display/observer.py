"""Observers of a run: displays, the run's own log, the diagnosis monitor, trackers.

    observer = Observers(RunLog(run), Resilient(display), Resilient(monitor))
    observer.step(event)                    each observer is called, in this order

A run and its loop know only this protocol, no terminal. A new observer extends `SilentObserver` and overrides the
methods it needs.

A broken display must not end a run: `solotune train ... | head -1` closes the pipe, a terminal goes away, the disk of
`> out.txt` is full, a tracker has a bug. `Resilient` then stops calling that observer, and the run continues. The run's
own log is not wrapped: a run that cannot be recorded stops.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, Protocol

from solotune.errors import SolotuneWarning, StorageError
from solotune.runtime import signals, watchdog

if TYPE_CHECKING:
    from solotune.config.run_config import Choice
    from solotune.run.events import DeviceFailedEvent, DiagnosedEvent, EvalEvent, NonFiniteEvent, SaveEvent, StepEvent

P = ParamSpec("P")


class RunObserver(Protocol):
    """What a run reports while it works."""

    def phase(self, name: str) -> None:
        """A stage begins: `loading model`."""
        ...

    def note(self, text: str) -> None:
        """A line that stays on the screen."""
        ...

    def choices(self, choices: Sequence[Choice]) -> None:
        """Settings that solotune chose, and why."""
        ...

    def progress(self, done: int, total: int, what: str) -> None:
        """Progress of the current stage."""
        ...

    def planned(self, peak_bytes: int) -> None:
        """The plan expects this much memory at most."""
        ...

    def begin(self, total_steps: int, done: int = 0) -> None:
        """Training begins; `done` of `total_steps` steps are already done."""
        ...

    def step(self, event: StepEvent) -> None:
        """An optimizer step is done."""
        ...

    def evaluated(self, event: EvalEvent, num_rows: int) -> None:
        """The held-out rows, `num_rows` of them, were evaluated."""
        ...

    def saved(self, event: SaveEvent, path: Path) -> None:
        """A checkpoint was saved in the folder `path`."""
        ...

    def diagnosed(self, event: DiagnosedEvent, text: str) -> None:
        """The monitor found a fault; `text` is one line about it for people."""
        ...

    def failed(self, event: NonFiniteEvent | DeviceFailedEvent) -> None:
        """The run ends here; its error is raised next."""
        ...

    def finish(self) -> None:
        """End the stage and remove a live line; may be called twice."""
        ...


class SilentObserver:
    """Observer that does nothing: the base class of observers that need only some methods."""

    def phase(self, name: str) -> None: ...

    def note(self, text: str) -> None: ...

    def choices(self, choices: Sequence[Choice]) -> None: ...

    def progress(self, done: int, total: int, what: str) -> None: ...

    def planned(self, peak_bytes: int) -> None: ...

    def begin(self, total_steps: int, done: int = 0) -> None: ...

    def step(self, event: StepEvent) -> None: ...

    def evaluated(self, event: EvalEvent, num_rows: int) -> None: ...

    def saved(self, event: SaveEvent, path: Path) -> None: ...

    def diagnosed(self, event: DiagnosedEvent, text: str) -> None: ...

    def failed(self, event: NonFiniteEvent | DeviceFailedEvent) -> None: ...

    def finish(self) -> None: ...


class Observers:
    """Call several observers in order; if one raises, the later ones are not called."""

    def __init__(self, *observers: RunObserver) -> None:
        self._observers = observers

    def phase(self, name: str) -> None:
        for observer in self._observers:
            observer.phase(name)

    def note(self, text: str) -> None:
        for observer in self._observers:
            observer.note(text)

    def choices(self, choices: Sequence[Choice]) -> None:
        for observer in self._observers:
            observer.choices(choices)

    def progress(self, done: int, total: int, what: str) -> None:
        for observer in self._observers:
            observer.progress(done, total, what)

    def planned(self, peak_bytes: int) -> None:
        for observer in self._observers:
            observer.planned(peak_bytes)

    def begin(self, total_steps: int, done: int = 0) -> None:
        for observer in self._observers:
            observer.begin(total_steps, done)

    def step(self, event: StepEvent) -> None:
        for observer in self._observers:
            observer.step(event)

    def evaluated(self, event: EvalEvent, num_rows: int) -> None:
        for observer in self._observers:
            observer.evaluated(event, num_rows)

    def saved(self, event: SaveEvent, path: Path) -> None:
        for observer in self._observers:
            observer.saved(event, path)

    def diagnosed(self, event: DiagnosedEvent, text: str) -> None:
        for observer in self._observers:
            observer.diagnosed(event, text)

    def failed(self, event: NonFiniteEvent | DeviceFailedEvent) -> None:
        for observer in self._observers:
            observer.failed(event)

    def finish(self) -> None:
        for observer in self._observers:
            observer.finish()


class Resilient:
    """Pass every call to an observer until it fails; its failure does not end the run.

    At each call the run can also be stopped (`signals.check_stop` raises StopRequested), and the watchdog sees that it
    is alive. `stage` is the current stage in words. A StorageError is raised: it comes from the run's own log, to
    which an observer such as the monitor may write.
    """

    def __init__(self, observer: RunObserver) -> None:
        self.stage = "getting ready"
        self.failure: str | None = None
        self._observer = observer

    def phase(self, name: str) -> None:
        self._enter(name)
        self._tell(self._observer.phase, name)

    def note(self, text: str) -> None:
        self._tell(self._observer.note, text)

    def choices(self, choices: Sequence[Choice]) -> None:
        self._tell(self._observer.choices, choices)

    def progress(self, done: int, total: int, what: str) -> None:
        self._tell(self._observer.progress, done, total, what)

    def planned(self, peak_bytes: int) -> None:
        self._tell(self._observer.planned, peak_bytes)

    def begin(self, total_steps: int, done: int = 0) -> None:
        self._enter("training")
        self._tell(self._observer.begin, total_steps, done)

    def step(self, event: StepEvent) -> None:
        self._tell(self._observer.step, event)

    def evaluated(self, event: EvalEvent, num_rows: int) -> None:
        self._tell(self._observer.evaluated, event, num_rows)

    def saved(self, event: SaveEvent, path: Path) -> None:
        self._tell(self._observer.saved, event, path)

    def diagnosed(self, event: DiagnosedEvent, text: str) -> None:
        self._tell(self._observer.diagnosed, event, text)

    def failed(self, event: NonFiniteEvent | DeviceFailedEvent) -> None:
        self._pass_on(self._observer.failed, event)  # no check_stop: the run ends with its own error

    def finish(self) -> None:
        self._tell(self._observer.finish)

    def _enter(self, stage: str) -> None:
        self.stage = stage
        watchdog.set_stage(stage)

    def _tell(self, method: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        signals.check_stop()
        self._pass_on(method, *args, **kwargs)

    def _pass_on(self, method: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        if self.failure is not None:
            return
        try:
            method(*args, **kwargs)
        except StorageError:
            raise
        except OSError as error:
            self.failure = error.strerror or str(error)
        except SystemExit:  # rich raises this for a closed pipe
            self.failure = "Broken pipe"
        except Exception as error:  # a bug of the observer; its author must see it
            self.failure = repr(error)
            name = type(self._observer).__name__
            warnings.warn(
                f"{name} failed and is not called any more in this run: {error!r}", SolotuneWarning, stacklevel=4
            )
