"""Stop requests while training: finish the step in hand, save, then leave.

The first SIGINT, SIGTERM or SIGHUP only sets `received`; the loop looks at it after each step. The handler then puts
the previous behaviour back, so a second signal stops at once. Only the main thread can install handlers; elsewhere (a
notebook's worker, a test) nothing is installed and signals behave as they did.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal:
    """Installed within its `with` block; `received` is the signal's number, 0 until one has come."""

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = int(number)
        self._restore()

    def _restore(self) -> None:
        """Puts the handlers back that were there before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
