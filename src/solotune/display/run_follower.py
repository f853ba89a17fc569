"""Show a run that another process writes, from its files alone.

    follower = RunFollower(run, display, finding_in_words)
    while follower.poll() in ("waiting", "running"):
        time.sleep(1)

The display gets the events of the files as it would from the run itself (`RunObserver`), so there is one renderer for
both. Of a run that has gone on for hours it gets only the last steps and evaluations, and then what is new.

The state comes from the run's lock and its log. The kernel drops the lock when the process that holds it ends, however
it ends; so an unlocked run is either finished, or its process is gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from solotune.display.meter import WINDOW
from solotune.display.observer import RunObserver
from solotune.display.progress import PlainDisplay
from solotune.run.events import (
    DeviceFailedEvent,
    DiagnosedEvent,
    EndEvent,
    EvalEvent,
    Event,
    NonFiniteEvent,
    ResumeEvent,
    SaveEvent,
    StartEvent,
    StepEvent,
)
from solotune.run.record import RunRecord, number_in
from solotune.run.run_dir import RunDirectory
from solotune.run.tail import MetricsTail

State = Literal["waiting", "running", "gone", "finished"]
MOST_EVALUATIONS, MOST_FINDINGS = 5, 5  # of the time before


class RunFollower:
    """Tell a display what the files of a run say, at each poll what is new."""

    def __init__(
        self, run: RunDirectory, display: RunObserver, finding_in_words: Callable[[DiagnosedEvent], str]
    ) -> None:
        self.state: State = "waiting"
        self.last_step = self.total_steps = 0
        self.failure: NonFiniteEvent | DeviceFailedEvent | None = None
        """What ended the run, if it recorded that."""
        self.saved: SaveEvent | None = None
        self._run, self._display, self._finding_in_words = run, display, finding_in_words
        self._tail = MetricsTail(run.path)
        self._has_begun, self._has_ended, self._has_events, self._is_planned = False, False, False, False
        self._phase, self._validation_rows = "", 0

    def poll(self) -> State:
        """Tell what is new; the state of the run now."""
        is_locked = self._run.is_locked()  # before the file is read: what was written until then is seen
        while (new := self._tail.poll()).events or new.is_again:
            self._tell(new.events, new.is_again)
        before = self.state
        if is_locked:
            self.state = "running"
        elif self._has_events:
            self.state = "finished" if self._has_ended else "gone"
        if self.state != before and self.state in ("gone", "finished"):
            self._display.finish()
            self._phase = ""
        elif self.state == "running":
            self._tell_phase()
        return self.state

    def _tell(self, events: Sequence[Event], is_again: bool) -> None:
        if is_again:  # the lines until the newest start are those that were told before
            starts = [i for i, event in enumerate(events) if isinstance(event, (StartEvent, ResumeEvent))]
            known = starts[-1] if starts else len(events)
            self._remember(events[:known])
            shown = events[known:]
        elif not self._has_events:
            self._remember(events)
            shown = _recent(events)
        else:
            shown = events
        self._has_events = self._has_events or bool(events)
        if events and not self._is_planned:
            self._tell_plan()
        for event in shown:
            self._tell_one(event)

    def _remember(self, events: Sequence[Event]) -> None:
        """Take over what earlier events say, without showing them."""
        for event in events:
            if isinstance(event, StartEvent):
                self._validation_rows = event.validation_rows or 0
                self.total_steps = event.total_steps or self.total_steps
            elif isinstance(event, SaveEvent):
                self.saved = event

    def _tell_one(self, event: Event) -> None:
        display = self._display
        match event:
            case StartEvent() | ResumeEvent():
                self._remember([event])
                self._has_ended, self.failure, self._phase = False, None, ""
                self.last_step, self._has_begun = event.step, True
                display.begin(self.total_steps, event.step)
            case StepEvent():
                self.last_step, self.total_steps = event.step, event.total_steps or self.total_steps
                if not self._has_begun:  # another version wrote no start
                    display.begin(max(self.total_steps, event.step), event.step - 1)
                    self._has_begun = True
                display.step(_complete(event, self.total_steps))
            case EvalEvent():
                display.evaluated(event, self._validation_rows)
            case SaveEvent():
                self.saved = event
                display.saved(event, self._run.checkpoints / event.path)
            case DiagnosedEvent():
                display.diagnosed(event, self._finding_in_words(event))
            case NonFiniteEvent() | DeviceFailedEvent():
                self.failure = event
                display.failed(event)
            case EndEvent():
                self._has_ended, self.last_step = True, event.step

    def _tell_plan(self) -> None:
        record = RunRecord(self._run.path, ())
        peak = number_in(record.plan, "predicted", "peak_bytes")
        if peak:
            self._display.planned(int(peak))
        every = number_in(record.config, "logging_steps")
        if every and every >= 1 and isinstance(self._display, PlainDisplay):
            self._display.logging_steps = int(every)
        self._is_planned = True

    def _tell_phase(self) -> None:
        """What the run does where it writes no events."""
        phase = ""
        if not self._has_events:
            phase = "starting"
        elif 0 < self.total_steps == self.last_step and self._run.adapter.is_dir():
            phase = "comparing base and tuned on held-out rows" if self._validation_rows else "writing the last files"
        if phase and phase != self._phase:
            self._phase = phase
            self._display.phase(phase)


def _recent(events: Sequence[Event]) -> list[Event]:
    """What is shown of the time before: the newest start, the last evaluations and findings, the last steps."""
    starts = [i for i, event in enumerate(events) if isinstance(event, (StartEvent, ResumeEvent))][-1:]
    begun = starts[0] if starts else -1
    kept: set[int] = set()
    for kind, most in ((DiagnosedEvent, MOST_FINDINGS), (EvalEvent, MOST_EVALUATIONS), (StepEvent, WINDOW)):
        kept |= set([i for i, event in enumerate(events) if isinstance(event, kind)][-most:])
    ends = (NonFiniteEvent, DeviceFailedEvent, EndEvent)  # before the newest start they say nothing any more
    kept |= {i for i, event in enumerate(events) if isinstance(event, ends) and i > begun}
    return [events[i] for i in (*starts, *sorted(kept))]


def _complete(event: StepEvent, total_steps: int) -> StepEvent:
    """The event with numbers that a display can divide by, where another version recorded none."""
    seconds = event.step_seconds if math.isfinite(event.step_seconds) else 0.0
    return replace(event, total_steps=max(event.total_steps or total_steps, event.step, 1), step_seconds=seconds)
