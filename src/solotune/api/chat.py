"""`solotune chat`: talk to a run's model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from solotune.training.trained_run import ChatSession


def chat(run: str | Path) -> ChatSession:
    """Loads a run's model to talk to.

    Raises:
        InputError: no run there, or nothing saved in it yet.
    """
    from solotune.training.trained_run import ChatSession, TunedRun

    return ChatSession(TunedRun.open(run))
