"""Read what a run has written, in any state.

    record = RunRecord.read("runs/demo")       or the path of a RunDirectory
    record.steps[-1].loss, record.is_finished, record.evaluation

Finished, crashed (last line incomplete), still running, written by another version, files damaged or missing: what can
be read is there, the rest is None or empty. Nothing here raises, and nothing here loads torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from solotune.config.yaml_reader import read_mapping
from solotune.errors import InputError
from solotune.hub.safe_files import MAX_DEPTH, check_count, check_text, is_deeper
from solotune.regular_files import open_regular, read_bytes
from solotune.run.events import (
    DeviceFailedEvent,
    EndEvent,
    EvalEvent,
    Event,
    NonFiniteEvent,
    ResumeEvent,
    StartEvent,
    StepEvent,
    from_line,
)

METRICS = "metrics.jsonl"
MAX_JSON_BYTES = 64 << 20  # files of a run are far smaller; the state of a long run of another trainer has megabytes
MAX_METRICS_BYTES = 2 << 30  # 6 million steps
MAX_LINE_BYTES = 1 << 20
MAX_EVENTS = 8_000_000

E = TypeVar("E", covariant=True)


class Line(NamedTuple, Generic[E]):
    """An event and where its line starts in metrics.jsonl."""

    offset: int  # bytes
    event: E


@dataclass(frozen=True)
class RunRecord:
    """The events of a run, read once, and its other files, each read at first use."""

    path: Path
    lines: tuple[Line[Event], ...]

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """The record of the run in a folder; empty if there is no run."""
        return cls(Path(path), tuple(lines_since(Path(path) / METRICS)[0]))

    @cached_property
    def events(self) -> tuple[Event, ...]:
        return tuple(line.event for line in self.lines)

    def of(self, kind: type[E]) -> tuple[E, ...]:
        """The events of one kind, in the order of the file."""
        return tuple(event for event in self.events if isinstance(event, kind))

    # --- from the events

    @cached_property
    def steps(self) -> tuple[StepEvent, ...]:
        return self.of(StepEvent)

    @cached_property
    def evals(self) -> tuple[EvalEvent, ...]:
        return self.of(EvalEvent)

    @property
    def start(self) -> StartEvent | None:
        """The newest one: a run that was killed before its first checkpoint starts again."""
        return (self.of(StartEvent) or (None,))[-1]

    @property
    def end(self) -> Line[EndEvent] | None:
        """The last end event, and where its line starts."""
        ends = (Line(at, event) for at, event in reversed(self.lines) if isinstance(event, EndEvent))
        return next(ends, None)

    @property
    def is_finished(self) -> bool:
        return self.end is not None

    @property
    def last_step(self) -> int:
        """0 before the first step."""
        return self.steps[-1].step if self.steps else 0

    @property
    def total_steps(self) -> int | None:
        """As planned; None before the first step."""
        return next((event.total_steps for event in reversed(self.steps) if event.total_steps), None)

    @property
    def resumed_steps(self) -> tuple[int, ...]:
        """The steps after which the run was resumed."""
        return tuple(event.step for event in self.of(ResumeEvent))

    @property
    def ranks(self) -> tuple[tuple[int, int], ...]:
        """(step, number of ranks that shared the steps after it), at the start and wherever a resume changed it."""
        start = self.start
        found = [(0, max(1, start.world_size or 1) if start else 1)]
        for event in self.of(ResumeEvent):
            found = [one for one in found if one[0] < event.step] or found[:1]
            if (size := max(1, event.world_size or 1)) != found[-1][1]:
                found.append((event.step, size))
        return tuple(found)

    @property
    def has_several_ranks(self) -> bool:
        return self.ranks[-1][1] > 1 or len(self.ranks) > 1

    @property
    def launched(self) -> tuple[int, int]:
        """Ranks as last started: how many, and how many of them on each machine (all, if the plan does not say)."""
        size, local = self.ranks[-1][1], number_in(self.plan, "predicted", "ranks", "on_one_machine")
        return size, int(local) if local and 1 <= local <= size else size

    def ranks_in_words(self) -> str:
        """`2`, or for a run that went on with other ones: `4, then 2 from step 11 on`."""
        (_, first), *later = self.ranks
        return ", then ".join([str(first), *(f"{size} from step {step + 1:,} on" for step, size in later)])

    @property
    def failures(self) -> tuple[NonFiniteEvent | DeviceFailedEvent, ...]:
        return tuple(event for event in self.events if isinstance(event, (NonFiniteEvent, DeviceFailedEvent)))

    @property
    def peak_bytes(self) -> int | None:
        return max((event.peak_bytes for event in self.steps if event.peak_bytes), default=None)

    def medians(self) -> dict[str, float | None]:
        """Over the steps; None before the first."""
        return {
            "step_seconds": _median([event.step_seconds for event in self.steps]),
            "tokens_per_second": _median([event.tokens_per_second for event in self.steps]),
        }

    # --- the files; None where there is none that can be read

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The keys of config.yaml as they are written: another version may have had other ones."""
        try:
            return read_mapping(self.path / "config.yaml")[0]
        except InputError:
            return None

    @cached_property
    def environment(self) -> dict[str, Any] | None:
        return json_object(self.path / "environment.json")

    @cached_property
    def data(self) -> dict[str, Any] | None:
        return json_object(self.path / "data.json")

    @cached_property
    def plan(self) -> dict[str, Any] | None:
        return json_object(self.path / "plan.json")

    @cached_property
    def fingerprints(self) -> dict[str, Any] | None:
        return json_object(self.path / "fingerprints.json")

    @cached_property
    def evaluation(self) -> dict[str, Any] | None:
        return json_object(self.path / "evaluation.json")

    @cached_property
    def diagnosis(self) -> dict[str, Any] | None:
        return json_object(self.path / "diagnosis.json")


def json_object(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None where there is none that can be read."""
    try:
        found = parse_json(read_bytes(path, MAX_JSON_BYTES))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def parse_json(content: bytes) -> Any:
    """The value of a JSON text from a run or another trainer, bounded before it is built.

    Raises:
        ValueError: not JSON, nested too deeply, too many values, or text that is none.
    """
    check_count(content)
    try:
        found = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if is_deeper(found, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    check_text(content, found)
    return found


def number_in(content: Any, *keys: str) -> float | None:
    """The finite number below nested keys of a JSON file; None where something else is there, or nothing."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    is_number = isinstance(content, (int, float)) and not isinstance(content, bool)
    return content if is_number and abs(content) <= sys.float_info.max else None


def lines_since(path: Path, since: int = 0) -> tuple[list[Line[Event]], int]:
    """The events of a metrics.jsonl from a byte on, and the byte from which to read on later.

    A last line without its end may still grow: the byte to read on from is its beginning.
    """
    found: list[Line[Event]] = []
    offset = since
    with contextlib.suppress(OSError), open_regular(path) as file:
        file.seek(since)
        while offset < MAX_METRICS_BYTES and len(found) < MAX_EVENTS:
            line = file.readline(MAX_LINE_BYTES)
            if not line or (len(line) == MAX_LINE_BYTES and not line.endswith(b"\n")):
                break  # the end, or no metrics.jsonl: a run writes no such line
            if (event := from_line(line)) is not None:
                found.append(Line(offset, event))
            if not line.endswith(b"\n"):
                break
            offset += len(line)
    return found, offset


def _median(values: list[float]) -> float | None:
    """The upper one of two; NaN, which stands for a value that was not recorded, is left out."""
    known = sorted(value for value in values if not math.isnan(value))
    return known[len(known) // 2] if known else None
