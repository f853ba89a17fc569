"""A conversation: what is typed, what is sent, what is printed, and what Ctrl-C does."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest
from inline_snapshot import snapshot
from rich.console import Console

from solotune.display.chat import Chat, WordWriter, about
from solotune.display.progress import make_console
from solotune.errors import InputError

HOSTILE = "[bold]x[/nope] \x1b[31mred\x1b]8;;http://a\x07link \x9b2J \u202egnp\r\x7f\ud800"


class Parrot:
    """A session that answers in pieces."""

    def __init__(self, pieces: tuple[str, ...] = ("  one", " two\n", "three"), prompt_format: str = "chat") -> None:
        self.prompt_format, self.model_name, self.pieces = prompt_format, "m + run", pieces
        self.system: str | None = "Be brief."
        self.trained_system: tuple[str, int, int] | None = ("Be brief.", 9, 9)
        self.asked: list[tuple[str, bool]] = []
        self.kept: list[tuple[str, str]] = []
        self.history: list[dict[str, str]] = []

    def reset(self, system: str | None = None) -> None:
        if system == "refused":
            raise InputError("refused")
        self.history = []
        self.system = self.system if system is None else system or None

    def messages(self, base: bool = False) -> list[dict[str, str]]:
        return self.history

    def keep(self, text: str, answer: str, base: bool = False) -> None:
        self.kept.append((text, answer))

    def reply(self, text: str, base: bool = False, on_text: Callable[[str], None] | None = None) -> str:
        self.asked.append((text, base))
        for piece in self.pieces:
            if piece == "^C":
                signal.raise_signal(signal.SIGINT)
            elif on_text is not None:
                on_text(piece)
        self.history += [{"role": "user", "content": text}, {"role": "assistant", "content": "done"}]
        return "done"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    left = iter([*lines, "/quit", "never"])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda prompt: next(left))


def test_commands_are_not_sent(monkeypatch, capsys, tmp_path):
    typed(monkeypatch, "hi", "", "/halp me", " /etc is a folder", "/system", "/system Be loud.", "/system none",
          "/system refused", "/save", "/reset", "/help")  # fmt: skip
    session = Parrot()
    Chat(session, make_console(io.StringIO())).run()
    assert [text for text, _ in session.asked] == ["hi", "/etc is a folder"]
    assert capsys.readouterr().err == snapshot("""\
m + run   /help: commands, /quit: exit
system prompt of the training rows: Be brief.
/halp: unknown command, not sent. Commands: /help, /reset, /system, /save, /quit. To send it, type a space before it.
system prompt of the training rows: Be brief.
system prompt: Be loud.
New conversation.
without system prompt; all training rows have one
New conversation.
refused
/save needs a file: /save chat.jsonl
New conversation.
/help    show these commands
/reset   start a new conversation
/system  show the system prompt; /system TEXT or /system none sets it and starts a new conversation
/save    save the conversation as a training row: /save FILE
/quit    exit (or Ctrl-D); Ctrl-C stops an answer
""")


def test_save_appends_a_training_row(monkeypatch, capsys, tmp_path):
    file = tmp_path / "chat.jsonl"
    typed(monkeypatch, f"/save {file}", "hi", f"/save {file}", "more", f"/save {file}", f"/save {tmp_path}")
    Chat(Parrot(), make_console(io.StringIO())).run()
    rows = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert [len(row) for row in rows] == [2, 4] and rows[0][0] == {"role": "user", "content": "hi"}
    said = capsys.readouterr().err
    assert "Nothing to save" in said and "Saved 4 messages as a row of" in said and "cannot be written" in said


def test_from_a_pipe_each_line_is_read_as_if_it_was_typed(monkeypatch, capsys):
    lines = "one\n\n  two\\nlines \n/reset \n/halp x\n/system Be loud.\n /etc\n/quit \nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    session = Parrot()
    chat = Chat(session, None, base=True)
    chat.run()
    assert [text for text, is_base in session.asked if is_base] == ["one", "two\\nlines", "/etc"]
    assert session.system == "Be loud." and len(session.history) == 4
    assert capsys.readouterr().err == snapshot("""\
system prompt of the training rows: Be brief.
New conversation.
/halp: unknown command, not sent. Commands: /help, /reset, /system, /save, /quit. To send it, type a space before it.
system prompt: Be loud.
New conversation.
""")
    assert chat.turns[0] == {"prompt": "one", "base": "done", "tuned": "done"}
    monkeypatch.setattr(sys, "stdin", io.StringIO("  two\\nlines \n"))
    text = Parrot(prompt_format="text")
    Chat(text, None).run()
    assert text.asked == [("  two\nlines ", False)]


def test_answers_stream_as_they_come():
    session, stream = Parrot(), io.StringIO()
    chat = Chat(session, make_console(stream))
    chat.once("hi")
    assert chat.turns == [{"prompt": "hi", "tuned": "done"}]
    assert stream.getvalue() == "tuned    one two\nthree\n"
    stream.truncate(0)
    stream.seek(0)
    silent = Parrot(pieces=())
    silent.reply = lambda text, base=False, on_text=None: ""  # type: ignore[method-assign]
    Chat(silent, make_console(stream)).once("hi")
    assert stream.getvalue() == "tuned  (nothing)\n"


def test_a_hostile_answer_cannot_control_the_terminal():
    stream = Terminal()
    Chat(Parrot(pieces=(HOSTILE,)), Console(file=stream, width=40, color_system=None, force_terminal=True)).once("hi")
    text = stream.getvalue()
    text.encode()
    assert not set(text) & set("\x1b\x9b\x07\x7f\r\u202e") and "[/nope]" in text


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(monkeypatch):
    typed(monkeypatch, "long?", "next")
    stream = io.StringIO()
    session = Parrot(pieces=("one ", "^C", "two"))
    chat = Chat(session, make_console(stream), base=True)
    chat.run()
    assert session.kept == [("long?", "one"), ("next", "one")]
    assert chat.turns[0] == {"prompt": "long?", "base": "one"}  # the tuned model is not asked either
    assert "one  (stopped)\n" in stream.getvalue()


@pytest.mark.parametrize("columns", [20, 33, 80])
def test_words_are_not_broken_at_the_edge(columns):
    words = "replacement of the wardrobe's handle is covered by the extraordinary guarantee".split()
    stream = io.StringIO()
    console = Console(file=stream, width=columns, force_terminal=True, color_system=None)
    writer = WordWriter(console, indent=7)
    text = " ".join(words) + "\n\tx" + "y" * 100
    for start in range(0, len(text), 5):  # pieces end inside words
        writer.write(text[start : start + 5])
    writer.end()
    lines = stream.getvalue().split("\n")
    assert len(lines[0]) <= columns - 7 and all(len(line.expandtabs()) <= columns for line in lines)
    assert [word for line in lines for word in line.split()][: len(words)] == words
    assert "".join(stream.getvalue().split()) == "".join(text.split())


def test_what_is_said_about_the_system_prompt():
    session = Parrot()
    assert about(session) == "system prompt of the training rows: Be brief."
    session.system = "Be\nloud."
    assert about(session) == "system prompt: Be loud."
    session.system = None
    assert about(session) == "without system prompt; all training rows have one"
    session.trained_system = ("Be brief.", 3, 9)
    assert about(session).startswith("without system prompt; 3 of 9 training rows begin with: Be brief.")
    session.trained_system = None
    assert about(session) == ""
    assert "continued as it is" in about(Parrot(prompt_format="text"))


def test_ctrl_c_at_the_prompt_does_not_exit(monkeypatch, capsys):
    def interrupted(prompt: str) -> str:
        if prompts.append(prompt) or len(prompts) == 1:
            signal.raise_signal(signal.SIGINT)
        return "hi" if len(prompts) == 2 else "/quit"

    prompts: list[str] = []
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", interrupted)
    session = Parrot()
    Chat(session, make_console(io.StringIO())).run()
    assert session.asked == [("hi", False)] and "(/quit or Ctrl-D exits)" in capsys.readouterr().err


def test_lines_can_be_edited():
    """On a real terminal: Up brings the last line back, Ctrl-D exits."""
    code = (
        "import sys; from tests.display.test_chat import Parrot; from solotune.display.chat import Chat;"
        "from solotune.display.progress import make_console; from solotune.runtime.signals import handle_signals\n"
        "with handle_signals(True):\n s = Parrot(('ok',)); Chat(s, make_console(sys.stdout)).run()\n"
        "print('ASKED', [t for t, _ in s.asked], 'END')"
    )
    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], preexec_fn=lambda: os.login_tty(child), env=env)
    os.close(child)
    seen = ""

    def until(text: str, count: int = 1) -> None:
        nonlocal seen
        while seen.count(text) < count:
            ready, _, _ = select.select([parent], [], [], 60)
            assert ready, seen
            seen += os.read(parent, 4096).decode(errors="replace")

    try:
        until("you    ")
        os.write(parent, b"hello\n")
        until("ok")
        until("you    ", 2)
        os.write(parent, b"\x1b[A!\n")  # Up, and one character more
        until("ok", 2)
        until("you    ", 3)
        os.write(parent, b"\x04")
        until(" END")
    finally:
        process.kill()
        process.wait()
        os.close(parent)
    assert "ASKED ['hello', 'hello!'] END" in seen
