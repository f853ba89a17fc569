"""The parts of this set."""

from __future__ import annotations

from bench.diagnose.unseen import bases, tasks
from bench.diagnose.unseen.programs import programs
from bench.diagnose.unseen.registry import Parts

TEMPLATES = {"phi3-tags": "phi", "granite-roles": "granite3", "cohere-turns": "cohere", "stablelm-seek": "deepseek"}
PARTS = Parts("unseen", programs, bases.load, bases.folder_of, bases.end_ids, bases.linears, tasks.split, TEMPLATES)
