"""Why a probe was not run."""

from __future__ import annotations


class Skipped(Exception):
    """It cannot be run on this training; the message says why, as a clause."""
