"""The parts of this set."""

from __future__ import annotations

from bench.diagnose.unseen.registry import Parts
from bench.diagnose.unseen2.bases import end_ids
from bench.diagnose.unseen4 import bases, tasks
from bench.diagnose.unseen4.programs import programs

PARTS = Parts("unseen4", programs, bases.load, bases.folder_of, end_ids, bases.linears, tasks.split, bases.TEMPLATES)
