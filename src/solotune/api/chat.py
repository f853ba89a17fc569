"""`solotune chat`: chat with the model of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from solotune.training.trained_run import ChatSession


def chat(run: str | Path) -> ChatSession:
    """Load the model of a run for a conversation.

        session = solotune.chat("runs/demo")
        print(session.reply("Hello"))
        print(session.reply("Hello", base=True))  # the answer of the base model

    Raises:
        InputError: there is no run, or it has no adapter and no checkpoint yet.
    """
    from solotune.training.trained_run import ChatSession, TunedRun

    return ChatSession(TunedRun.open(run))
