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
from solotune.run.events import Event
from solotune.run.record import METRICS, lines_since

KEPT_BYTES = 1024  # of what was read last, to see whether it is still there: two lines or more


@dataclass(frozen=True)
class New:
    """What a poll found."""

    events: list[Event] = field(default_factory=list)
    is_again: bool = False  # the file was cut back or replaced: these are the events from its beginning


class MetricsTail:
    """The events of a run as they are written; nothing here raises."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / METRICS
        self._offset = 0  # bytes that were read
        self._last = b""  # those before it, or as many as are kept

    def poll(self) -> New:
        """The events of the lines that are complete and were not read yet."""
        is_again = self._bytes_before(self._offset) != self._last
        if is_again:
            self._offset = 0
        lines, after = lines_since(self._path, self._offset)
        self._offset, self._last = after, self._bytes_before(after)
        return New([line.event for line in lines if line.offset < after], is_again)

    def _bytes_before(self, offset: int) -> bytes:
        with contextlib.suppress(OSError), open_regular(self._path) as file:
            kept = min(KEPT_BYTES, offset)
            file.seek(offset - kept)
            return file.read(kept)
        return b""
