"""Loss, speed, memory and time left from the events of single steps.

Two numbers need an explanation. The loss, in a line and in the live line, is the mean over all loss tokens since the
last line; the loss of a single step is too noisy. Time left comes from the median of recent steps without the first,
which compiles and allocates and takes up to a hundred times longer than the next.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import TYPE_CHECKING

from solotune.units import format_bytes, format_duration, format_rate, gib, mib

if TYPE_CHECKING:
    from solotune.run.events import StepEvent

WINDOW = 20  # speed and time left come from this many steps


class Meter:
    """Average single steps into loss, speed and time left. A thread that draws may read it while steps are added."""

    def __init__(self) -> None:
        self.last: StepEvent | None = None
        self.planned_bytes = 0  # by the plan; 0: unknown
        self._taken = 0.0
        self._since_line: list[tuple[float, float]] = []
        self._recent: deque[StepEvent] = deque(maxlen=WINDOW)

    def add(self, event: StepEvent) -> None:
        if self.last is not None:  # the first step compiles and allocates, so it is much slower
            self._recent.append(event)
        self.last = event
        self._since_line.append((event.loss, event.total_weight))

    @property
    def loss(self) -> float:
        """Mean loss per loss token since the last `take_loss`, or what that returned if no step has come since."""
        steps = self._since_line.copy()
        total = sum(weight for _, weight in steps)
        return sum(loss * weight for loss, weight in steps) / total if total else self._taken

    def take_loss(self) -> float:
        """Mean loss per loss token since the last call."""
        self._taken = self.loss
        self._since_line.clear()
        return self._taken

    @property
    def tokens_per_second(self) -> float | None:
        steps = self._recent.copy()
        seconds = sum(event.step_seconds for event in steps)
        return sum(event.num_tokens for event in steps) / seconds if seconds else None

    @property
    def seconds_left(self) -> float | None:
        """None until the second step is done."""
        steps = self._recent.copy()
        if self.last is None or not steps:
            return None
        return statistics.median(event.step_seconds for event in steps) * (self.last.total_steps - self.last.step)

    def figures(self) -> list[str]:
        """Speed, memory and time left, each if known."""
        speed, left, peak = self.tokens_per_second, self.seconds_left, self.last.peak_bytes if self.last else 0
        return [
            *([format_rate(speed, "tok/s")] if speed else []),
            *([format_bytes(peak)] if peak else []),
            *([f"{format_duration(left)} left"] if left is not None else []),
        ]

    def memory_in_words(self) -> str:
        """`memory 2.1 of 2.3 GiB planned`; empty if one of the two is not known."""
        peak, planned = self.last.peak_bytes if self.last else 0, self.planned_bytes
        if not peak or not planned:
            return ""
        return f"memory {gib(peak) if planned >= 2**30 else mib(peak, 0)} of {format_bytes(planned)} planned"
