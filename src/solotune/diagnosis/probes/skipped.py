"""Why a probe did not run."""

from __future__ import annotations


class Skipped(Exception):
    """The probe cannot run on this model; the message is the reason."""
