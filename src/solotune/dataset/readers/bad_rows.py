"""Bad rows of a run: counted all, named up to three, refused together."""

from __future__ import annotations

from solotune.dataset.readers.row import RowError
from solotune.errors import Advice

NUM_NAMED = 3
MOST = 0.5


class BadRows:
    """Collects the errors of rows until all rows are read."""

    def __init__(self) -> None:
        self._first: list[RowError] = []
        self.num_bad = 0

    def add(self, error: RowError) -> None:
        """Count a bad row."""
        self.num_bad += 1
        if len(self._first) < NUM_NAMED:
            self._first.append(error)

    def error(self, num_read: int, *, is_end: bool = True) -> RowError:
        """The error that refuses the data: the first bad row in full, the places of the next two, and the count.

        Args:
            num_read: number of rows read, good ones too.
            is_end: whether all rows have been read.
        """
        first, others = self._first[0], self._first[1:]
        problem, seen = first.problem, first.seen
        if others:
            at_least = "" if is_end else "at least "
            problem += f" (one of {at_least}{self.num_bad:,} bad rows; {num_read:,} were read)"
            named = "; ".join(_in_short(one, first) for one in others)
            named += "; ..." if self.num_bad > len(self._first) else ""
            seen = f"also {named}" if seen is None else f"{seen}; also {named}"
        fault = first.fault if self.num_bad >= MOST * num_read else None  # a few odd rows are no fault of the data
        error = RowError(problem, reason=first.reason, seen=seen, allowed=first.allowed, fault=fault)
        error.change, error.advice = first.change, [*first.advice]
        if self.num_bad < num_read:
            text = f"on_bad_row: drop leaves out {'the bad rows' if others else 'this row'}"
            error.change = text if first.change is None else f"{first.change}; or {text}"
            error.advice.append(Advice(text, {"on_bad_row": "drop"}))
        return error


def _in_short(error: RowError, first: RowError) -> str:
    """The row's place alone, if it is bad for the reason of the first one."""
    if error.reason == first.reason:
        return error.problem.partition(": ")[0]
    return error.problem if error.seen is None else f"{error.problem} ({str(error.seen)[:60]})"
