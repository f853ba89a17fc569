"""A conversation in a terminal or a pipe: read messages, carry out commands, stream the answers.

    Chat(session, console, base=True).run()

On a terminal lines can be edited (readline), words are never broken at the right edge, and Ctrl-C stops the answer and
not the program. From a pipe each line is read as if it was typed. A line that begins with `/` is a command; with a
space before it, it is a message.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from solotune.errors import SolotuneError
from solotune.run.atomic_io import append_line
from solotune.runtime.signals import StopRequested, ctrl_c_interrupts
from solotune.units import escape_terminal

COMMANDS = {
    "/help": "show these commands",
    "/reset": "start a new conversation",
    "/system": "show the system prompt; /system TEXT or /system none sets it and starts a new conversation",
    "/save": "save the conversation as a training row: /save FILE",
    "/quit": "exit (or Ctrl-D); Ctrl-C stops an answer",
}
MAX_SHOWN_SYSTEM = 200
LABEL = 7  # columns of "tuned  "


class Session(Protocol):
    """What is chatted with: `training.chat_session.ChatSession`."""

    prompt_format: str
    model_name: str
    system: str | None
    trained_system: tuple[str, int, int] | None

    def reset(self, system: str | None = None) -> None: ...

    def messages(self, base: bool = False) -> list[dict[str, str]]: ...

    def keep(self, text: str, answer: str, base: bool = False) -> None: ...

    def reply(self, text: str, base: bool = False, on_text: Callable[[str], None] | None = None) -> str: ...


class Chat:
    """A conversation with a session; answers go to `console` (None: they are only returned), the rest to stderr."""

    def __init__(self, session: Session, console: Console | None, base: bool = False) -> None:
        self._session, self._console, self._base = session, console, base
        self.turns: list[dict[str, str]] = []
        """The answers: prompt, tuned, and base if it is asked too."""

    def once(self, prompt: str) -> None:
        """Send one message."""
        self._note(about(self._session))
        self._answer(prompt)

    def run(self) -> None:
        """Read messages to the end, from the terminal or from a pipe."""
        is_typed = sys.stdin.isatty()
        if is_typed:
            self._note(f"{self._session.model_name}   /help: commands, /quit: exit")
        self._note(about(self._session))
        for text in _typed() if is_typed else _piped():
            if text.rstrip() == "/quit":
                return
            if text.startswith("/"):
                self._command(text)
            else:
                self._answer(self._written(text))

    def _written(self, text: str) -> str:
        """The message as it is sent: a text to continue keeps its blanks, and \\n in it is a line break."""
        return text.replace("\\n", "\n") if self._session.prompt_format == "text" else text.strip()

    def _command(self, text: str) -> None:
        name, _, value = text.rstrip().partition(" ")
        value = value.strip()
        if name == "/reset":
            self._session.reset()
            self._note("New conversation.")
        elif name == "/system":
            self._system(value)
        elif name == "/save":
            self._save(value)
        elif name == "/help":
            self._note("\n".join(f"{known:9}{what}" for known, what in COMMANDS.items()))
        else:
            known = ", ".join(COMMANDS)
            self._note(f"{name}: unknown command, not sent. Commands: {known}. To send it, type a space before it.")

    def _system(self, value: str) -> None:
        if value:
            try:
                self._session.reset("" if value == "none" else value)
            except SolotuneError as error:
                self._note(str(error))
                return
        self._note(about(self._session) or "without system prompt, as the training rows are")
        if value:
            self._note("New conversation.")

    def _save(self, value: str) -> None:
        if not value:
            self._note("/save needs a file: /save chat.jsonl")
            return
        messages = self._session.messages()
        if not messages or messages[-1]["role"] != "assistant":
            self._note(
                "Nothing to save: there is no answer yet, or the model was trained on plain text (no conversation)."
            )
            return
        line = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        try:
            append_line(Path(value).expanduser(), line)
        except SolotuneError as error:
            self._note(str(error))
            return
        self._note(f"Saved {len(messages)} messages as a row of {value}.")

    def _answer(self, text: str) -> None:
        turn = {"prompt": text}
        self.turns.append(turn)
        for name in ("base", "tuned") if self._base else ("tuned",):
            turn[name], is_stopped = self._reply(name, text)
            if is_stopped:
                break

    def _reply(self, name: str, text: str) -> tuple[str, bool]:
        """The answer, and whether Ctrl-C stopped it."""
        is_base, console, pieces = name == "base", self._console, []
        if console is None:
            return self._session.reply(text, base=is_base), False
        writer = WordWriter(console, indent=LABEL)
        console.print(Text(f"{name:{LABEL}}", "bold"), end="")

        def show(piece: str) -> None:
            pieces.append(piece)
            writer.write(escape_terminal(piece))

        try:
            with ctrl_c_interrupts() if sys.stdin.isatty() else contextlib.nullcontext():
                answer = self._session.reply(text, base=is_base, on_text=show)
        except StopRequested:
            raise
        except KeyboardInterrupt:
            answer = "".join(pieces).strip()
            self._session.keep(text, answer, is_base)
            writer.end()
            console.print(Text(" (stopped)", "dim"))
            return answer, True
        writer.end()
        console.print(Text("" if answer else "(nothing)", "dim"))
        return answer, False

    def _note(self, text: str) -> None:
        if text:
            print(escape_terminal(text), file=sys.stderr, flush=True)


def about(session: Session) -> str:
    """How the model is asked: its system prompt, and where that comes from."""
    if session.prompt_format == "text":
        return "Trained on plain text: each message is continued as it is, without chat template."
    trained = session.trained_system
    if session.system:
        shown = " ".join(session.system.split())
        shown = shown if len(shown) <= MAX_SHOWN_SYSTEM else shown[:MAX_SHOWN_SYSTEM] + " ..."
        is_trained = trained is not None and trained[0] == session.system and trained[1] >= trained[2]
        return f"system prompt{' of the training rows' if is_trained else ''}: {shown}"
    if trained is None:
        return ""
    text, rows, total = trained
    if rows >= total:
        return "without system prompt; all training rows have one"
    return (
        f"without system prompt; {rows:,} of {total:,} training rows begin with: {' '.join(text.split())[:80]} "
        "(--system TEXT or /system TEXT sets one)"
    )


class WordWriter:
    """Write a stream of text to a console without breaking words at its right edge; on a pipe the text as it is."""

    def __init__(self, console: Console, indent: int = 0) -> None:
        self._console, self._column = console, indent
        self._width = console.width if console.is_terminal else 0
        self._word = ""

    def write(self, text: str) -> None:
        """Write all complete words."""
        if not self._width:
            self._print(text)
            return
        for char in text:
            if char in " \n\t":
                self.end()
                self._blank(char)
            else:
                self._word += char
                if cell_len(self._word) >= self._width:  # longer than a line: broken wherever that is
                    self._flush()

    def end(self) -> None:
        """Write the last word."""
        if self._word:
            self._flush()

    def _flush(self) -> None:
        width = cell_len(self._word)
        if self._column and self._column + width > self._width:
            self._print("\n")
            self._column = 0
        self._print(self._word)
        self._column += width
        self._word = ""

    def _blank(self, char: str) -> None:
        width = 0 if char == "\n" else 8 - self._column % 8 if char == "\t" else 1
        if char == "\n" or self._column + width >= self._width:
            self._print("\n")
            self._column = 0
        else:
            self._print(char)
            self._column += width

    def _print(self, text: str) -> None:
        self._console.print(Text(text), end="", soft_wrap=True)
        self._console.file.flush()


def _piped() -> Iterator[str]:
    yield from (line.rstrip("\n") for line in sys.stdin if line.strip())


def _typed() -> Iterator[str]:
    """What is typed on a terminal, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and a history)
    while True:
        try:
            with ctrl_c_interrupts():
                text = input("\nyou    ")
        except EOFError:
            print()
            return
        except StopRequested:
            raise
        except KeyboardInterrupt:
            print("  (/quit or Ctrl-D exits)", file=sys.stderr)
            continue
        if text.strip():
            yield text
