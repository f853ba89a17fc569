"""All programs of this set, in a fixed order."""

from __future__ import annotations

from bench.diagnose.unseen.registry import Unseen
from bench.diagnose.unseen3 import (
    faults_batch,
    faults_data,
    faults_files,
    faults_machine,
    faults_settings,
    faults_text,
    healthy,
    healthy_rows,
)
from bench.diagnose.unseen3.registry import PROGRAMS

REGISTERED = (healthy, healthy_rows, faults_text, faults_batch, faults_data, faults_settings, faults_machine,
              faults_files)  # fmt: skip


def programs() -> list[Unseen]:
    names = [program.name for program in PROGRAMS]
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)
    return list(PROGRAMS)
