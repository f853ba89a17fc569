"""A conversation with the model of a run, asked as it was trained.

session = ChatSession(TunedRun.open("runs/demo"))
session.system                          the system prompt that all training rows share, or None
session.reply("Hello")                  in the run's format, up to the tokens that end its rows
session.reply("Hello", base=True)       the base's answer, in a conversation of its own
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from transformers import TextStreamer

from solotune import dataset
from solotune.errors import InputError
from solotune.evaluation import generation
from solotune.hardware.gpu_errors import device_errors
from solotune.model import lora
from solotune.model.loading import Progress
from solotune.result_repr import ResultRepr, Table
from solotune.runtime.library_noise import quiet_libraries
from solotune.training.trained_run import TunedRun

Messages = list[dict[str, str]]


class ChatSession(ResultRepr):
    """A conversation with a run's model; its base can answer too, for comparison.

    A model that was trained on plain text (`prompt_format: text`) is asked so too: each message is continued as it is,
    without chat template and history, and the answer keeps the white space around it.
    """

    def __init__(self, run: TunedRun, system: str | None = None, progress: Progress | None = None) -> None:
        """Args:
        system: the system prompt; None: the one that all training rows share, if they do; "": none.
        progress: called while the model loads.

        Raises:
            InputError: nothing to load, or a system prompt for a model that was trained on plain text.
        """
        self._config, self._tokenizer = run.config, run.tokenizer
        self.prompt_format = run.prompt_format
        self.trained_system = run.system_prompt  # with its rows and all rows
        """The most frequent system prompt of the training rows, its rows and all rows; None without one."""
        self.system = self._checked(system) if system is not None else run.shared_system_prompt
        self._model = run.load(progress)
        self._stops = generation.stop_ids(self._model, self._tokenizer, run.answer_ends)
        self.choices = [*run.choices, *run.choices_of(self._model)]
        self.model_name = f"{self._config.model_name_or_path} + {run.directory.path.name}"
        self.history: Messages = []
        self.base_history: Messages = []
        """The base's own conversation: with the tuned model's answers in it, it would copy them."""

    def figures(self) -> dict[str, object]:
        return {
            "model": self.model_name,
            "prompt_format": self.prompt_format,
            "system": self.system,
            "turns": len(self.history) // 2,
        }

    def tables(self) -> list[Table]:
        said = [("", self.history), ("The base's own conversation", self.base_history)]
        return [Table(title, (), [(turn["role"], turn["content"]) for turn in turns]) for title, turns in said]

    def reset(self, system: str | None = None) -> None:
        """Start a new conversation.

        Args:
            system: its system prompt; None: as before; "": none.

        Raises:
            InputError: a system prompt for a model that was trained on plain text.
        """
        if system is not None:
            self.system = self._checked(system)
        self.history, self.base_history = [], []

    def messages(self, base: bool = False) -> Messages:
        """The conversation so far, with its system prompt: a training row."""
        return [*self._opening(), *(self.base_history if base else self.history)]

    def keep(self, text: str, answer: str, base: bool = False) -> None:
        """Add a question and its answer to the conversation; nothing with plain text, which has no history."""
        if self.prompt_format == "chat":
            history = self.base_history if base else self.history
            history += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    @quiet_libraries()
    def reply(self, text: str, base: bool = False, on_text: Callable[[str], None] | None = None) -> str:
        """The model's answer to `text`, which becomes part of the conversation.

        Args:
            base: let the base model answer, in its own conversation.
            on_text: called with each piece of the answer as it is generated.

        Raises:
            InputError: the chat template refuses the conversation, or a text to continue is empty.
        """
        is_chat = self.prompt_format == "chat"
        messages = [*self.messages(base), {"role": "user", "content": text}]
        prompt = (
            dataset.render_prompt(self._tokenizer, messages) if is_chat else dataset.text_prompt(self._tokenizer, text)
        )
        streamer = None
        if on_text is not None:
            streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
            streamer.on_finalized_text = lambda text, stream_end=False: on_text(text)
        with device_errors(self._config.memory), lora.adapters_off(self._model.module) if base else nullcontext():
            ids = generation.generate(self._model, prompt, self._config.max_new_tokens, self._stops, streamer)
        answer = self._tokenizer.decode(ids, skip_special_tokens=True)
        if not is_chat:
            return answer
        answer = answer.strip()
        self.keep(text, answer, base)
        return answer

    def _opening(self) -> Messages:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _checked(self, system: str) -> str | None:
        if system and self.prompt_format == "text":
            raise InputError(
                "this model was trained on plain text, which has no system prompt",
                seen=f"system prompt {system[:60]!r}",
                change="leave the system prompt out, and write such words into the message, as the training rows do",
            )
        return system or None
