"""The events of a run: the lines of metrics.jsonl. Only this module writes and reads them.

    {"event": "step", "step": 3, "total_steps": 120, ...}        to_line(StepEvent(step=3, ...))
    from_line(line) -> StepEvent | ... | None

A class is one kind of line; its fields are the line's keys, in this order. A field that has its default value is left
out of the line.

Reading is tolerant, since another version, a crash or an editor may have written the line. Unknown keys are ignored. A
key that is missing or has another type gives the value for "not recorded": NaN, 0, None, an empty text or list. Only
`step` is required: without it the event's place in the run is unknown. A line that is not an event gives None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from solotune.hub.safe_files import is_deeper

MAX_DEPTH = 16  # of a line
MAX_INT = 2**63 - 1  # the largest int64: readers put these numbers into arrays


@dataclass(frozen=True)
class StartEvent:
    """Start of a run; a count is None if the version that wrote the line did not record it."""

    step: int
    total_steps: int | None
    train_rows: int | None
    train_sequences: int | None
    packing_fill: float | None  # share of the packed positions that hold a token; None without packing
    validation_rows: int | None
    trainable_parameters: int | None
    parameters: int | None
    trainable_fits: list[Any]  # {"r", "target_modules"}: the adapters that have this number of parameters
    base_bytes: int | None
    device: str
    adapters: dict[str, Any] | None = None  # see `AdapterCoverage.to_json`
    world_size: int | None = None  # ranks that share each step; None: one


@dataclass(frozen=True)
class ResumeEvent:
    """A run continues after `step`."""

    step: int
    exact: bool
    inexact: list[str]  # reasons why it is not exact
    passed_over: list[str]  # newer checkpoints, each with what is wrong with it
    world_size: int | None = None  # ranks that share each step from here on; None: one


@dataclass(frozen=True)
class PreflightEvent:
    """Memory and time of the largest step, run before training: see `preflight.Preflight`."""

    rows: int
    places: int
    loaded_bytes: int
    optimizer_bytes: int
    peak_bytes: int
    first_step_seconds: float
    step_seconds: float
    evaluation_peak_bytes: int
    gradient_error: float | None
    free_bytes: int | None


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step. `loss` is nats per supervised token over the whole step, by weight."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    token_accuracy: float
    learning_rate: float
    grad_norm: float  # before clipping
    num_tokens: int  # without padding
    num_supervised: int
    total_weight: float  # of the supervised tokens: their number, unless the data has weights
    step_seconds: float
    tokens_per_second: float
    peak_bytes: int


@dataclass(frozen=True)
class EvalEvent:
    """The held-out rows after `step`: nats per supervised token and its standard error, share of exact answers."""

    step: int
    exact_match: float
    loss: float
    stderr: float
    tokens: int
    best_step: int | None = None  # of the best evaluation so far, beyond noise; None: it is not asked for


@dataclass(frozen=True)
class SaveEvent:
    """The checkpoint of `step` is complete and on the disk."""

    step: int
    path: str  # the folder's name below checkpoints/


@dataclass(frozen=True)
class NonFiniteEvent:
    """Something was NaN or infinite in `step`, or in the checkpoint after it (then only `tensors` is set)."""

    step: int
    rows: list[str] | None = None  # of the step
    seen: str | None = None
    tensors: list[str] | None = None  # where it starts
    bad_rows: list[str] | None = None  # rows that show it alone
    verdict: str | None = None  # transient or reproducible


@dataclass(frozen=True)
class DeviceFailedEvent:
    """The accelerator failed: out of memory, or lost."""

    problem: str
    seen: str | None


@dataclass(frozen=True)
class DiagnosedEvent:
    """The monitor found a fault during training."""

    code: str  # F54
    kind: str  # of the signal: measured, invariant, curve, ...
    says: str


@dataclass(frozen=True)
class EndEvent:
    """End of a run."""

    step: int
    peak_bytes: int


Event = (
    StartEvent
    | ResumeEvent
    | PreflightEvent
    | StepEvent
    | EvalEvent
    | SaveEvent
    | NonFiniteEvent
    | DeviceFailedEvent
    | DiagnosedEvent
    | EndEvent
)

NAMES: dict[type[Event], str] = {
    StartEvent: "start",
    ResumeEvent: "resume",
    PreflightEvent: "preflight",
    StepEvent: "step",
    EvalEvent: "eval",
    SaveEvent: "save",
    NonFiniteEvent: "non_finite",
    DeviceFailedEvent: "device_failed",
    DiagnosedEvent: "diagnosed",
    EndEvent: "end",
}


_ENCODER = json.JSONEncoder(ensure_ascii=False)


def to_line(event: Event) -> str:
    """The line of an event, with its line break at the end."""
    defaults = vars(type(event))  # of a field that has none, nothing
    values = {name: value for name, value in vars(event).items() if name not in defaults or value is not defaults[name]}
    return _ENCODER.encode({"event": NAMES[type(event)], **values}) + "\n"


def from_line(line: bytes) -> Event | None:
    """The event of a line; None if it is incomplete, not JSON, of an unknown kind or without its step."""
    try:
        found = json.loads(line.decode())
        kind, readers = _KINDS[found["event"]]
        if is_deeper(found, MAX_DEPTH):
            return None
        values = {name: read(found.get(name)) for name, read in readers}
    except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError):
        return None
    return None if values.get("step", 0) is None else kind(**values)


# --- reading one value: the value, or the one for "not recorded"


def _int_or_none(value: Any) -> int | None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    return value if is_int and abs(value) <= MAX_INT else None


def _int(value: Any) -> int:
    return _int_or_none(value) or 0


def _float(value: Any) -> float:
    found = _float_or_none(value)
    return math.nan if found is None else found


def _float_or_none(value: Any) -> float | None:
    return value if isinstance(value, float) else _int_or_none(value)


def _str_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _str(value: Any) -> str:
    return _str_or_none(value) or ""


def _strings_or_none(value: Any) -> list[str] | None:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else None


def _strings(value: Any) -> list[str]:
    return _strings_or_none(value) or []


_READERS: dict[str, Callable[[Any], Any]] = {
    "int": _int,
    "int | None": _int_or_none,
    "float": _float,
    "float | None": _float_or_none,
    "str": _str,
    "str | None": _str_or_none,
    "bool": lambda value: value is True,
    "list[str]": _strings,
    "list[str] | None": _strings_or_none,
    "list[Any]": lambda value: value if isinstance(value, list) else [],
    "dict[str, Any] | None": lambda value: value if isinstance(value, dict) else None,
}

# name -> (class, [(field, how it is read)]); annotations are texts here
_KINDS: dict[str, tuple[type[Event], list[tuple[str, Callable[[Any], Any]]]]] = {
    name: (kind, [(f.name, _int_or_none if f.name == "step" else _READERS[str(f.type)]) for f in fields(kind)])
    for kind, name in NAMES.items()
}
