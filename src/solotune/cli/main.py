"""Run a command line and return its exit code.

The codes are in `solotune.errors`. An expected error is printed as a message without a traceback. Any other exception
is a bug: its traceback is written to a file, and the message says which.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from signal import Signals
from typing import Any

import click

from solotune.cli.commands import solotune
from solotune.cli.output import open_closed_streams, print_json, stdout_for_json_only
from solotune.config.secrets import without_secrets
from solotune.errors import (
    EXIT_CODES,
    CheckError,
    InterruptedRunError,
    RankError,
    SolotuneError,
    StorageError,
    is_said,
    run_dir_of,
)
from solotune.run.atomic_io import append_line
from solotune.runtime import rank_processes, signals, watchdog
from solotune.runtime.library_noise import quieten
from solotune.runtime.world import rank_of
from solotune.units import escape_terminal, first_line
from solotune.version import __version__

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)  # errors of a stream; those of a file have its name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: default: those of the process. If given, the caller's signal handlers are left alone.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    is_ours = arguments is None  # False: called from Python, whose process and signals are left alone
    if (
        is_ours
    ):  # before torch is loaded; on a busy machine, threads that wait without sleeping take the time of all others
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    trains = given[:1] == ["train"]
    watched = watchdog.watched() if is_ours and trains else contextlib.nullcontext()
    rank = rank_of(os.environ) if trains else None
    try:
        has_launcher = trains and (rank is not None or "TORCHELASTIC_RUN_ID" in os.environ)
        with signals.handle_signals(is_ours, has_launcher, bool(rank)), watched:
            open_closed_streams()
            quieten()
            code = _run_as_rank(given, rank) if rank else _run(given, as_json)
            code = StorageError.exit_code if _loses_output() and code == 0 else code
    except signals.StopRequested as stop:  # before or after the command itself
        code = 128 + stop.number
    if is_ours and rank is not None:
        rank_processes.stay()
        _end_process(code)
    return code


def _end_process(code: int) -> None:
    """End this process of several ranks now: a thread of it may wait for a rank that is gone, in native code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _run_as_rank(given: list[str], rank: int) -> int:
    """Run `train` as a rank other than 0: it prints only errors of its own, since rank 0 says everything else."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        return _run([argument for argument in given if argument != "--json"], False, rank)


def _run(given: list[str], as_json: bool, rank: int = 0) -> int:
    try:
        stdout = stdout_for_json_only() if as_json else contextlib.nullcontext()
        with stdout, solotune.make_context("solotune", given) as ctx:
            solotune.invoke(ctx)
        return 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 0 if error.ctx is not None and error.ctx.parent is None else 2
    except click.UsageError as error:
        if rank and os.environ.get("LOCAL_RANK") != "0" and "TORCHELASTIC_RUN_ID" in os.environ:
            return 2  # torchrun gives all ranks of a machine the same arguments; the first says it
        usage = error.ctx.get_usage() if error.ctx is not None else ""
        return _fail(2, error.format_message(), as_json, after=usage)
    except InterruptedRunError as stop:
        if rank:
            return stop.exit_code
        return _fail(stop.exit_code, stop.in_sentences(), as_json, stop.to_json(), label="")
    except SolotuneError as error:
        if is_said(error):
            return error.exit_code
        text = str(error)
        if isinstance(error, RankError) and error.traceback:  # a bug on that rank
            run = run_dir_of(error)  # with the traceback in its log
            text += f"\n  {'log:':9}{run / 'log.txt' if run else _write_crash(error, error.traceback, given)}"
        return _fail(error.exit_code, text, as_json, error.to_json(), label=f"{f'rank {rank}: ' * bool(rank)}error:")
    except signals.StopRequested as stop:
        if rank:
            return 128 + stop.number
        return _fail(128 + stop.number, f"Stopped by {stop}.", as_json, label="")
    except KeyboardInterrupt as error:
        return _fail(130, f"Interrupted{f': {error}' if str(error) else ''}.", as_json, label="")
    except (BrokenPipeError, SystemExit):  # rich turns the first into the second
        return StorageError.exit_code
    except MemoryError:
        return _out_of_memory(as_json)
    except Exception as error:
        if _is_lost_memory_error(error):
            return _out_of_memory(as_json)
        if isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename is None:
            _loses_output()
            return _fail(StorageError.exit_code, f"cannot write output: {error.strerror}", as_json)
        if number := signals.received():  # a library replaced the exception of the signal
            return _fail(128 + number, f"Stopped by {Signals(number).name}.", as_json, label="")
        if is_said(error):
            return 1
        return _bug(error, given, as_json)


def _out_of_memory(as_json: bool) -> int:
    change = "close other programs, use a machine with more memory, or raise the limit of this process (ulimit -v)"
    return _fail(CheckError.exit_code, f"this machine does not have enough memory\n  change:  {change}", as_json)


def _is_lost_memory_error(error: Exception) -> bool:
    """Whether Python itself ran out of memory under `ulimit -v`, where even its MemoryError may find no memory."""
    is_limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    return is_limited and isinstance(error, SystemError)  # `returned NULL without setting an exception`


def _bug(error: Exception, given: Sequence[str], as_json: bool) -> int:
    problem = f"this is a bug of solotune: {first_line(error, with_type=True)}"
    text = "".join(traceback.format_exception(error))
    return _fail(1, f"{problem}\n  {'log:':9}{_write_crash(error, text, given)}", as_json)


def _loses_output() -> bool:
    """Whether stdout cannot be written: the reader of the pipe is gone, or the disk is full (this is printed).

    Stdout is then replaced by /dev/null; otherwise Python would print another error when it flushes stdout at exit.
    """
    try:
        sys.stdout.flush()
        return False
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _fail(StorageError.exit_code, f"cannot write to stdout: {error.strerror}", False)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return True


def _fail(
    code: int,
    message: str,
    as_json: bool,
    content: dict[str, object] | None = None,
    after: str = "",
    label: str = "error:",
) -> int:
    """Print why the command ended, on stderr and with `--json` as an object; returns `code`.

    Args:
        label: empty for an interruption, which is not an error.
    """
    message = without_secrets(message)
    styled_label = f"{click.style(label, fg='red', bold=True)} " if label else ""
    text = f"{styled_label}{escape_terminal(message)}" + (f"\n{escape_terminal(after)}" if after else "")
    with contextlib.suppress(OSError):  # stderr may be closed
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


def _write_crash(error: Exception, text: str, arguments: Sequence[str]) -> Path:
    """Write the traceback to the log of the run that it belongs to, or to a new file; returns its path."""
    text = without_secrets(f"solotune {__version__}, Python {sys.version.split()[0]}\n{text}")
    written = arguments[1:2] if arguments[:1] == ["evaluate"] else ()  # other verbs only look at a run
    for folder in (run_dir_of(error), *written):
        with contextlib.suppress(StorageError, OSError, TypeError, ValueError):
            if (Path(folder) / "config.yaml").is_file():  # type: ignore[arg-type]
                append_line(log := Path(folder) / "log.txt", text)  # type: ignore[arg-type]
                return log
    stamp = time.strftime("%Y%m%d-%H%M%S")
    handle, name = tempfile.mkstemp(prefix=f"solotune-crash-{stamp}-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    return Path(name)
