"""Output of the command line: a first line at once, exactly one JSON object on stdout, and closed or failing streams.

With `--json`, stdout has exactly one JSON object, also after an error; everything that libraries print goes to stderr.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeVar

from solotune.errors import StorageError
from solotune.hub.download_progress import shown_by
from solotune.run.atomic_io import json_text

if TYPE_CHECKING:
    from rich.console import Console

    from solotune.display.progress import PlainDisplay

_json_stream: ContextVar[IO[str] | None] = ContextVar("json_stream", default=None)  # stdout, kept for `print_json`


class Result(Protocol):
    """Result of a verb."""

    def to_json(self) -> dict[str, Any]: ...


ResultT = TypeVar("ResultT", bound=Result)


@contextlib.contextmanager
def shown(doing: str = "loading libraries", stream: IO[str] | None = None) -> Iterator[PlainDisplay]:
    """A display whose live line is removed even after an error. Its first line comes before the slow imports: make
    them inside this block.

    Args:
        doing: the first line.
        stream: default: stdout.
    """
    from solotune.display.progress import make_display

    display = make_display(1, stream or sys.stdout)
    display.phase(doing)
    try:
        with shown_by(display.progress):
            yield display
    finally:
        display.finish()


def print_result(result: ResultT, printer: Callable[[ResultT, Console], None], as_json: bool) -> None:
    """Print the result of a verb, for people or as one JSON object."""
    if as_json:
        print_json(result.to_json())
    else:
        printer(result, console())


@contextlib.contextmanager
def stdout_for_json_only() -> Iterator[None]:
    """Redirect stdout to stderr, also for native code; only `print_json` still writes to stdout."""
    before, saved_fd = sys.stdout, None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if before.fileno() == 1:
            before.flush()
            saved_fd = os.dup(1)
            os.dup2(2, 1)
    stream = before if saved_fd is None else os.fdopen(saved_fd, "w", encoding="utf-8", closefd=False)
    token = _json_stream.set(stream)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            stream.flush()
        _json_stream.reset(token)
        sys.stdout = before
        if saved_fd is not None:
            os.dup2(saved_fd, 1)
            os.close(saved_fd)


def print_json(content: Any) -> None:
    """Print the one JSON object; NaN and infinity, which JSON does not have, become null."""
    stream = _json_stream.get() or sys.stdout
    try:
        stream.write(json_text(content, default=str))
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError("cannot write to stdout", seen=error.strerror) from error


def open_closed_streams() -> None:
    """Open closed streams (`solotune ... >&-`) on /dev/null, so that no other file gets descriptor 1 or 2."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_WRONLY)
            os.dup2(handle, number)
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def console() -> Console:
    from solotune.display.progress import make_console

    return make_console(sys.stdout)
