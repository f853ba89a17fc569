"""`Finding`: the result of a rule on rows, in the shape that data.json, `solotune data` and the diagnosis share.

Finding.of("F08", "warning", message="...", evidence={...}, fix="...")     slug and suspect from the catalogue
finding.signal                                                             the same as a signal for the diagnosis
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from solotune.diagnosis.catalogue import FAULTS
from solotune.diagnosis.evidence import Kind, Signal

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
"""Worst first."""

_WORTH: dict[Severity, tuple[Kind, float]] = {"error": ("invariant", 0.9), "warning": ("measured", 0.6)}
"""Kind and weight of the signal; `info` is no sign of a fault."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault in the data, with its evidence and the change that fixes it."""

    code: str
    slug: str
    suspect: str
    severity: Severity
    message: str
    evidence: dict[str, Any]
    fix: str

    @classmethod
    def of(
        cls, code: str, severity: Severity, *, message: str, evidence: dict[str, Any], fix: str, slug: str = ""
    ) -> Finding:
        """A finding of a fault of the catalogue.

        Args:
            slug: of the fault's second form (`catalogue.ALIASES`); by default the fault's own.
        """
        fault = FAULTS[code]
        return cls(code, slug or fault.slug, fault.suspect, severity, message, evidence, fix)

    @classmethod
    def from_json(cls, found: Any) -> Finding | None:
        """A finding from JSON; None if the value is not one."""
        is_one = isinstance(found, Mapping) and set(found) == set(cls.__dataclass_fields__)
        return cls(**found) if is_one else None

    def to_json(self) -> dict[str, Any]:
        """The shape in data.json."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def signal(self) -> Signal | None:
        """The signal for a diagnosis; None for `info`."""
        if self.severity not in _WORTH:
            return None
        kind, weight = _WORTH[self.severity]
        return Signal(self.code, kind, self.message, weight, self.evidence, fix=self.fix)
