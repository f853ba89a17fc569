"""All programs of this set, in a fixed order."""

from __future__ import annotations

from bench.diagnose.unseen.registry import Unseen
from bench.diagnose.unseen4 import (
    faults_batch,
    faults_data,
    faults_machine,
    faults_settings,
    faults_text,
    healthy,
)
from bench.diagnose.unseen4.registry import PROGRAMS

REGISTERED = (healthy, faults_text, faults_batch, faults_data, faults_settings, faults_machine)


def programs() -> list[Unseen]:
    names = [program.name for program in PROGRAMS]
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)
    return list(PROGRAMS)
