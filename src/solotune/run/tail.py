"""Read metrics.jsonl while it grows: each poll gives only the events that are new.

    tail = MetricsTail(run_dir)
    new = tail.poll()         new.events, new.is_again

Readers of a running run (`solotune watch`, the served report, trackers) share no memory with it: the file is the
state, so a reader may start late, stop and start again. Three things happen to the file while it is read:

    not there yet    no event
    torn last line   left for the next poll, when the rest of it is there
    cut back         a resumed run removes the lines after its checkpoint. The file is then read from its beginning
                     again, and `is_again` says so. Its length does not show this once the run has written on, so the
                     last bytes that were read are compared too
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from solotune.regular_files import open_regular
from solotune.run.events import Event, from_line
from solotune.run.record import MAX_LINE_BYTES, METRICS

KEPT_BYTES = 1024  # of what was read last, to see whether it is still there: two lines or more
POLL_BYTES = 64 << 20  # at most, in one poll


@dataclass(frozen=True)
class New:
    """What a poll found."""

    events: list[Event] = field(default_factory=list)
    is_again: bool = False  # the file was cut back or replaced: these are the events from its beginning


class MetricsTail:
    """The events of a run as they are written; nothing here raises."""

    def __init__(self, run_dir: Path, offset: int = 0) -> None:
        """Args:
        offset: bytes that were read before.
        """
        self.offset = offset
        self._path = run_dir / METRICS
        self._last = b""  # the bytes before `offset`, or fewer

    def poll(self) -> New:
        """The events of the lines that are complete and were not read yet."""
        with contextlib.suppress(OSError), open_regular(self._path) as file:
            is_again = not self._is_same(file)
            if is_again:
                self.offset, self._last = 0, b""
            file.seek(self.offset)
            found = file.read(POLL_BYTES)
            whole = found[: found.rfind(b"\n") + 1]
            if not whole and len(found) > MAX_LINE_BYTES:  # a run writes no such line: passed over
                whole = found
            self.offset += len(whole)
            self._last = (self._last + whole)[-KEPT_BYTES:]
            events = [event for line in whole.split(b"\n") if line and (event := from_line(line)) is not None]
            return New(events, is_again)
        return New()

    def _is_same(self, file) -> bool:
        """Whether the bytes before the offset are those that were read."""
        file.seek(max(0, self.offset - len(self._last)))
        return file.read(len(self._last)) == self._last
