"""`solotune chat`: chat with the model of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from solotune.training.trained_run import ChatSession


def chat(run: str | Path) -> ChatSession:
    """Load the model of a run for a conversation, in the format that it was trained on.

        session = solotune.chat("runs/demo")
        print(session.reply("Hello"))
        print(session.reply("Hello", base=True))  # the answer of the base model

    A model that was trained on plain text (`session.prompt_format` is `text`) continues each message as it is:

        session.reply("The capital of France is")  # " Paris"

    Raises:
        InputError: there is no run, or it has no adapter and no checkpoint yet.
    """
    from solotune.training.trained_run import ChatSession, TunedRun

    return ChatSession(TunedRun.open(run))
