"""All programs of the unseen split, in a fixed order."""

from __future__ import annotations

from bench.diagnose.unseen import faults_rows, faults_training, healthy, own
from bench.diagnose.unseen.registry import PROGRAMS, Unseen

REGISTERED = (faults_rows, faults_training, healthy, own)


def programs() -> list[Unseen]:
    names = [program.name for program in PROGRAMS]
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)
    return list(PROGRAMS)
