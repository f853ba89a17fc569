"""`solotune chat`: chat with the model of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from solotune.display.notebook import showing
from solotune.display.progress import Display
from solotune.runtime.library_noise import quiet_libraries

if TYPE_CHECKING:
    from solotune.training.chat_session import ChatSession


@quiet_libraries()
def chat(run: str | Path, system: str | None = None, display: Display | None = None) -> ChatSession:
    """Load the model of a run for a conversation, in the format that it was trained on.

        session = solotune.chat("runs/demo")
        print(session.system)  # the system prompt that all training rows share, or None
        print(session.reply("Hello"))
        print(session.reply("Hello", base=True))  # the answer of the base model

    A model that was trained on plain text (`session.prompt_format` is `text`) continues each message as it is:

        session.reply("The capital of France is")  # " Paris"

    Args:
        system: the system prompt; by default the one that all training rows share, if they do; "": none.

    Raises:
        InputError: there is no run, or it has no adapter and no checkpoint yet; or the model was trained on plain text,
            which has no system prompt.
        IntegrityError: the base model is not the one of the training, or a file of the run is damaged.
        DeviceError: the GPU failed, or its memory is full.
    """
    from solotune.training.chat_session import ChatSession
    from solotune.training.trained_run import TunedRun

    with showing(display) as chosen:
        chosen.phase("loading model")
        return ChatSession(TunedRun.open(run), system, chosen.progress)
