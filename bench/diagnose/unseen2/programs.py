"""All programs of this set, in a fixed order."""

from __future__ import annotations

from bench.diagnose.unseen.registry import Unseen
from bench.diagnose.unseen2 import faults_machine, faults_rows, faults_text, faults_training, healthy, healthy_settings
from bench.diagnose.unseen2.registry import PROGRAMS

REGISTERED = (healthy, healthy_settings, faults_text, faults_rows, faults_training, faults_machine)


def programs() -> list[Unseen]:
    names = [program.name for program in PROGRAMS]
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)
    return list(PROGRAMS)
