"""Run chat templates in a separate process with limits, because a template is a program that comes with a model.

    sandbox().render(source, variables) -> text
    sandbox().render_marked(source, variables) -> text, spans of its `{% generation %}` blocks

This is the only place of solotune where a template runs (`scripts/lint_calls.py` bans others); `template.render_chat`
gives it what transformers' `apply_chat_template` would.

Jinja's sandbox forbids code, but does not limit work: `{{ 'x' * 1000000000 }}` takes 41 s and the memory it asks for,
already at compile time. So templates are compiled and rendered in one child process (`template_process`), which may
spend CPU_SECONDS per row (MEAN_SECONDS on average) and use MAX_BYTES in total; exceeding them ends the child, not the
run, and the template is refused at that row. Every row is rendered there, not a sample: a template can wait for one
special row. What took too long once is refused at once when it is asked for again, since rules ask for the same chats
again and again.

One child serves the whole process, because starting one takes 0.1 s. It ends when its parent ends and closes its pipe.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import marshal
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path
from typing import IO, Any

from solotune.dataset.chat import template_process
from solotune.errors import InputError, SolotuneError

CPU_SECONDS = 2.0  # per row; a long one takes some milliseconds
WALL_SECONDS = 120.0  # for a machine so busy that the child hardly runs
TOTAL_SECONDS = 120.0  # of one template; more than that only for rows that take MEAN_SECONDS at most, on average
MEAN_SECONDS = 0.2  # hundreds of times what a row takes
SECONDS_PER_BYTE = 4e-6  # in addition, for long rows
MAX_BYTES = 512 << 20
MAX_CHARACTERS = 1 << 20  # or four times the size of the row; a template itself has 1 MiB at most
_MAX_REMEMBERED = 256  # renderings that took too long


class TemplateLimitError(SolotuneError):
    """A template needed too much time or memory.

    Not an `InputError`: those mean that a row is refused, and probes catch them; this ends the run at once.
    """

    exit_code, meaning = InputError.exit_code, InputError.meaning


class TemplateRefusal(Exception):
    """The error message that a template raised."""


class TemplateSyntax(Exception):
    """A template that Jinja cannot parse."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class Sandbox:
    """The child process, started at first use and restarted after a template has ended it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._numbers: dict[str, int] = {}
        self._sent: set[int] = set()
        self._spent: dict[int, list[float]] = {}  # number of a template -> texts, bytes, seconds
        self._too_much: dict[bytes, str] = {}  # sha256 of a request that took too long -> what was seen
        self._lock = threading.Lock()

    def check(self, source: str) -> None:
        """Compile a template.

        Raises:
            TemplateSyntax: it does not parse.
            TemplateRefusal: it fails in another way.
            TemplateLimitError: it needs too much time or memory.
        """
        self._ask(source, None)

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """Render a template with variables of plain data.

        Raises:
            TemplateSyntax, TemplateRefusal, TemplateLimitError: as `check`.
        """
        return self._ask(source, variables)

    def render_marked(self, source: str, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Render a template; returns the text, and the spans `[begin, end)` of its `generation` blocks in characters.

        Raises:
            TemplateSyntax, TemplateRefusal, TemplateLimitError: as `check`.
        """
        spans, _, text = self._ask(source, variables, is_marked=True).partition("\n")
        return text, [(begin, end) for begin, end in json.loads(spans)]

    def _ask(self, source: str, variables: dict[str, Any] | None, is_marked: bool = False) -> str:
        with self._lock:
            number = self._numbers.setdefault(source, len(self._numbers))
            if self._too_much and (known := self._too_much.get(_digest(number, variables, is_marked))):
                raise _limit(known)
            child = self._running()
            request = _bytes_of((number, None if number in self._sent else source, variables, is_marked))
            assert child.stdin is not None and child.stdout is not None
            kind, text, started = b"", "", time.monotonic()
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(struct.pack("<I", len(request)) + request)
                child.stdin.flush()
                kind, text = _answer(child.stdout, 4 * max(MAX_CHARACTERS, 4 * len(request)))
            if not kind:
                seen = self._ended(child)
                # a wait that was too long may be the machine's
                if "CPU time" in seen and len(self._too_much) < _MAX_REMEMBERED:
                    self._too_much[_digest(number, variables, is_marked)] = seen
                raise _limit(seen)
            if kind in (b"t", b"g", b"e", b"l"):
                self._sent.add(number)
            self._count(number, len(request), time.monotonic() - started)
        if kind in (b"t", b"g"):
            return text
        if kind == b"s":
            line, _, message = text.partition("\n")
            raise TemplateSyntax(int(line), message)
        if kind == b"e":
            raise TemplateRefusal(text)
        raise _limit(f"more than {MAX_BYTES >> 20} MiB" if kind == b"m" else f"a text of {text} characters")

    def _count(self, number: int, num_bytes: int, seconds: float) -> None:
        """Add a rendering to those of its template; each may be quick enough, and 100,000 of them not.

        Raises:
            TemplateLimitError: they take too long on average.
        """
        seconds = min(seconds, CPU_SECONDS)  # more is the machine's, or a process that was stopped
        texts, total_bytes, total = spent = self._spent.setdefault(number, [0.0, 0.0, 0.0])
        texts, total_bytes, total = spent[:] = texts + 1, total_bytes + num_bytes, total + seconds
        if total > TOTAL_SECONDS and total > texts * MEAN_SECONDS + total_bytes * SECONDS_PER_BYTE:
            del self._spent[number]
            raise _limit(f"{total / texts:.1f} s per row on average, over {texts:,.0f} rows")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._owner != os.getpid() or self._child.poll() is not None:
            import jinja2
            import markupsafe

            places = {str(Path(str(module.__file__)).parents[1]) for module in (jinja2, markupsafe)}
            limits = [str(limit) for limit in (CPU_SECONDS, MAX_BYTES, MAX_CHARACTERS)]
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", template_process.__file__, *limits, *sorted(places)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: os.environ[name] for name in ("TZ", "LD_LIBRARY_PATH") if name in os.environ},
                cwd="/",
            )
            self._owner, self._sent = os.getpid(), set()
        return self._child

    def _ended(self, child: subprocess.Popen[bytes]) -> str:
        """Why a child does not answer; it is ended if it still runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1)
        code = child.poll()
        self._end()
        if code == -signal.SIGPROF:
            return f"more than {CPU_SECONDS:g} s of CPU time"
        if code is None:
            return f"no answer within {WALL_SECONDS:g} s"
        return f"its process ended with exit code {code}"

    def close(self) -> None:
        """End the child process, and forget what took too long."""
        self._too_much.clear()
        self._end()

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()


def _digest(number: int, variables: dict[str, Any] | None, is_marked: bool) -> bytes:
    return hashlib.sha256(_bytes_of((number, variables, is_marked))).digest()


def _bytes_of(request: tuple[Any, ...]) -> bytes:
    """A request for the child.

    Raises:
        TemplateRefusal: it holds a value that is not plain data, or is nested too deeply.
    """
    try:
        return marshal.dumps(request)
    except ValueError as error:
        raise TemplateRefusal(f"the messages hold a value that a template cannot be given: {error}") from None


def _answer(stream: IO[bytes], max_bytes: int) -> tuple[bytes, str]:
    """Read (kind, text); an empty kind if the child has ended, does not answer in time, or writes too much."""
    until = time.monotonic() + WALL_SECONDS
    head = _read(stream, 5, until)
    if len(head) < 5:
        return b"", ""
    (length,) = struct.unpack("<I", head[1:])
    content = _read(stream, length, until) if length <= max_bytes else b""
    return (head[:1], content.decode(errors="replace")) if len(content) == length else (b"", "")


def _read(stream: IO[bytes], length: int, until: float) -> bytes:
    """Read this many bytes; fewer if the child ends or the time is over."""
    pieces, left = [], length
    while left and select.select([stream], [], [], max(0.0, until - time.monotonic()))[0]:
        piece = os.read(stream.fileno(), left)
        if not piece:
            break
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _limit(seen: str) -> TemplateLimitError:
    return TemplateLimitError(
        "the model's chat template needs too much time or memory",
        seen=seen,
        allowed=f"{CPU_SECONDS:g} s of CPU time per row, {MAX_BYTES >> 20} MiB, {MAX_CHARACTERS:,} characters",
        change="set chat_template_path to another template, or use another model",
    )


@cache
def sandbox() -> Sandbox:
    """The sandbox of this process."""
    made = Sandbox()
    atexit.register(made.close)
    return made
