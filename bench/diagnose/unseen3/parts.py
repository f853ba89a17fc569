"""The parts of this set."""

from __future__ import annotations

from bench.diagnose.unseen.registry import Parts
from bench.diagnose.unseen2.bases import end_ids
from bench.diagnose.unseen3 import bases, tasks
from bench.diagnose.unseen3.programs import programs

PARTS = Parts("unseen3", programs, bases.load, bases.folder_of, end_ids, bases.linears, tasks.split, bases.TEMPLATES)
