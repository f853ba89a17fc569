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
SEVERITY_WORDS: dict[Severity, str] = {"error": "fault", "warning": "remark", "info": "note"}
"""What people read."""

_WORTH: dict[Severity, tuple[Kind, float]] = {"error": ("invariant", 0.9), "warning": ("remark", 0.3)}
"""Kind and weight of the signal; `info` is no sign of a fault."""
_STATISTIC: tuple[Kind, float] = ("measured", 0.7)
"""Of an error that is a statistic: beyond its control, but no equation."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault in the data, with its evidence and the change that fixes it.

    `error` is a fault: an invariant is violated, or a statistic is beyond its control. `warning` is a remark: true of
    the data, no harm measured. `info` is worth a line, and is not part of a diagnosis.
    """

    code: str
    slug: str
    suspect: str
    severity: Severity
    message: str
    evidence: dict[str, Any]
    fix: str
    affected: float | None = None
    is_statistic: bool = False

    @classmethod
    def of(
        cls,
        code: str,
        severity: Severity,
        *,
        message: str,
        evidence: dict[str, Any],
        fix: str,
        slug: str = "",
        affected: float | None = None,
        is_statistic: bool = False,
    ) -> Finding:
        """A finding of a fault of the catalogue.

        Args:
            slug: of the fault's second form (`catalogue.ALIASES`); by default the fault's own.
            affected: 0 to 1, the share of the rows or answers that it concerns; among equally certain faults the
                larger is named first.
            is_statistic: an error that is no violated equation, but a statistic beyond its control.
        """
        fault = FAULTS[code]
        return cls(code, slug or fault.slug, fault.suspect, severity, message, evidence, fix, affected, is_statistic)

    @classmethod
    def from_json(cls, found: Any) -> Finding | None:
        """A finding from JSON; None if the value is not one."""
        names = set(cls.__dataclass_fields__)
        is_one = isinstance(found, Mapping) and names - {"affected", "is_statistic"} <= set(found) <= names
        return cls(**found) if is_one else None

    def to_json(self) -> dict[str, Any]:
        """The shape in data.json."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def word(self) -> str:
        """The severity for people: fault, remark or note."""
        return SEVERITY_WORDS[self.severity]

    @property
    def signal(self) -> Signal | None:
        """The signal for a diagnosis; None for `info`."""
        if self.severity not in _WORTH:
            return None
        kind, weight = _STATISTIC if self.is_statistic and self.severity == "error" else _WORTH[self.severity]
        return Signal(self.code, kind, self.message, weight, self.evidence, fix=self.fix, affected=self.affected)
