"""Why a run is flat: the questions of cheapest and most decisive first, and the floor of the task as an answer."""

from __future__ import annotations

from solotune.diagnosis.evidence import Probed, Signal
from solotune.diagnosis.subject import Subject


def plateau(subject: Subject, found: Probed) -> list[Signal]:
    return []
