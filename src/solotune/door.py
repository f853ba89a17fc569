"""The command's door: every way out has its exit code, and stdout carries what was promised.

    pass_through(group, arguments) -> exit code

With `--json`, stdout carries exactly one JSON object, also for an error, and whatever a library prints goes to stderr.
Every way out has its code (`solotune.errors`): an expected error is a message without a traceback; anything else is a
bug, whose traceback goes to a file that the message names.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from signal import Signals
from typing import IO, TYPE_CHECKING, Any

import click

from solotune import __version__, signals, watchdog
from solotune.errors import EXIT_CODES, CheckError, SolotuneError, StorageError
from solotune.secrets import without_secrets
from solotune.storage import append_line, json_text

if TYPE_CHECKING:
    from rich.console import Console

NOISY = (
    "transformers",
    "datasets",
    "huggingface_hub",
    "bitsandbytes",
    "torch",
    "filelock",
    "fsspec",
    "urllib3",
    "httpx",
)


UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)  # of a stream; a file's error has its name


def pass_through(command: click.Group, arguments: Sequence[str] | None = None) -> int:
    """Runs a command line, the process's own where none is given, and returns its exit code; nothing is raised."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    is_ours = arguments is None  # the process; else a caller's, whose signals and life are not ours
    watched = watchdog.watched() if is_ours and given[:1] == ["train"] else contextlib.nullcontext()
    try:
        with signals.heeded(is_ours), watched:
            _open_closed_streams()
            quieten()
            code = _run(command, given, as_json)
            return StorageError.exit_code if _loses_output() and code == 0 else code
    except signals.StopRequested as stop:  # on the way in or out
        return 128 + stop.number


def _run(command: click.Group, given: list[str], as_json: bool) -> int:
    try:
        door = _stdout_for_json_only() if as_json else contextlib.nullcontext()
        with door, command.make_context("solotune", given) as ctx:
            command.invoke(ctx)
        return 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0 if error.ctx is not None and error.ctx.parent is None else 2
    except click.UsageError as error:
        usage = error.ctx.get_usage() if error.ctx is not None else ""
        return _fail(2, error.format_message(), as_json, after=usage)
    except SolotuneError as error:
        return _fail(error.exit_code, str(error), as_json, error.to_json())
    except signals.StopRequested as stop:
        return _fail(128 + stop.number, f"stopped by {stop}", as_json)
    except KeyboardInterrupt as error:
        return _fail(130, f"interrupted{f': {error}' if str(error) else ''}", as_json)
    except (BrokenPipeError, SystemExit):  # rich makes the latter of the former
        return StorageError.exit_code
    except MemoryError:
        change = "close other programs, use a larger machine, or raise the limit of this process (ulimit -v)"
        return _fail(CheckError.exit_code, f"this machine's memory does not suffice\n  change:  {change}", as_json)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename is None:
            _loses_output()
            return _fail(StorageError.exit_code, f"output cannot be written: {error.strerror}", as_json)
        if number := signals.received():  # a library made something else of the interruption
            return _fail(128 + number, f"stopped by {Signals(number).name}", as_json)
        return _bug(error, given, as_json)


def _bug(error: Exception, given: Sequence[str], as_json: bool) -> int:
    said = str(error).splitlines()[0] if str(error) else ""
    problem = f"this is a bug of solotune: {type(error).__name__}: {said}"
    return _fail(1, f"{problem}\n  {'log:':9}{_write_crash(error, given)}", as_json)


def _open_closed_streams() -> None:
    """`solotune ... >&-`: what is written goes nowhere, and not into the next file that is opened as number 1."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_WRONLY)
            os.dup2(handle, number)
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def _loses_output() -> bool:
    """Whether stdout takes nothing any more: its reader has gone, or its disk is full, which is said.

    It is then sent nowhere, for Python would complain once more when it flushes stdout on its way out.
    """
    try:
        sys.stdout.flush()
        return False
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _fail(StorageError.exit_code, f"stdout cannot be written: {error.strerror}", False)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True


def _fail(code: int, message: str, as_json: bool, content: dict[str, object] | None = None, after: str = "") -> int:
    message = without_secrets(message)
    text = f"{click.style('error:', fg='red', bold=True)} {inert(message)}" + (f"\n{inert(after)}" if after else "")
    with contextlib.suppress(OSError):  # nobody may be there to read it
        click.echo(text, err=True)
    if as_json:
        unknown = {"exit_code": code, "meaning": EXIT_CODES[code], "problem": message}
        with contextlib.suppress(StorageError, BrokenPipeError):
            print_json(_without_secrets(content or {"error": unknown}))
    return code


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    return without_secrets(value) if isinstance(value, str) else value


def quieten() -> None:
    """Keeps libraries' progress bars, warnings and log lines off the screen; a variable the user has set stays."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers follows this one too
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


_json_stream: ContextVar[IO[str] | None] = ContextVar("json_stream", default=None)  # stdout, kept for `print_json`


@contextlib.contextmanager
def _stdout_for_json_only() -> Iterator[None]:
    """Sends all that is written to stdout to stderr, native code's output too; `print_json` alone gets through."""
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
    """The one JSON object; NaN and infinities, which JSON lacks, become null."""
    stream = _json_stream.get() or sys.stdout
    try:
        stream.write(json_text(content, default=str))
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError("stdout cannot be written", seen=error.strerror) from error


def _write_crash(error: Exception, arguments: Sequence[str]) -> Path:
    """The traceback, into the log of the run that it concerns, or else into a file of its own."""
    text = f"solotune {__version__}, Python {sys.version.split()[0]}\n" + "".join(traceback.format_exception(error))
    text = without_secrets(text)
    for folder in (getattr(error, "run_dir", None), *arguments[1:2]):
        with contextlib.suppress(StorageError, OSError, TypeError, ValueError):
            if (Path(folder) / "config.yaml").is_file():  # type: ignore[arg-type]
                append_line(log := Path(folder) / "log.txt", text)  # type: ignore[arg-type]
                return log
    stamp = time.strftime("%Y%m%d-%H%M%S")
    handle, name = tempfile.mkstemp(prefix=f"solotune-crash-{stamp}-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    return Path(name)


def console() -> Console:
    from solotune.terminal import make_console

    return make_console(sys.stdout)


def inert(text: str) -> str:
    from solotune import terminal

    return terminal.inert(text)
