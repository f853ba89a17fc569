"""The `solotune` command: parse, call the verb's function, print what it returns. No logic is here.

    main -> click parses -> solotune.verbs.VERB(...) -> print_..., or one JSON object

Two promises are kept at this one door. With `--json`, stdout carries exactly one JSON object, also for an error, and
whatever a library prints goes to stderr. And every way out has its exit code (`solotune.errors`): an expected error is
a message without a traceback; anything else is a bug, whose traceback goes to a file that the message names.

Nothing heavy is imported here, so that `solotune --help` answers at once: torch, pydantic and rich come in with the
verb that needs them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from solotune import __version__
from solotune.errors import EXIT_CODES, SolotuneError, StorageError

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


class Verbs(click.Group):
    """The group of verbs: in the order of work, with the table of exit codes below the help."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.get_short_help_str(100)) for name, verb in self.commands.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    help_text = "Print one JSON object on stdout, all else on stderr."
    return click.option("--json", "as_json", is_flag=True, help=help_text)(command)


def config_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(command)
    return click.argument("config", metavar="CONFIG")(command)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]}, subcommand_metavar="VERB ...")
@click.version_option(__version__, message="solotune %(version)s")
def solotune() -> None:
    """Fine-tune an LLM on one GPU, and see what was learned.

    \b
    From nothing to a tuned model:
      solotune doctor                       is this machine fit for it?
      solotune init MODEL chats.jsonl       writes solotune.yaml
      solotune data solotune.yaml           what will be learned, token by token
      solotune plan solotune.yaml           does it fit, and how long will it take?
      solotune train solotune.yaml          trains, then compares with the base
      solotune diagnose runs/RUN            is something wrong, and what?
      solotune chat runs/RUN --base         talk to both
    """


@solotune.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check this machine: driver, CUDA, packages, memory, disk.

    Every check that fails comes with what mends it, and makes the exit code 3. Nothing is written or downloaded.

    \b
    Example:
      solotune doctor
    """
    from solotune import verbs

    report = verbs.doctor()
    if as_json:
        print_json(report.to_json())
    else:
        from solotune.printing import print_doctor

        print_doctor(report, _console())
    ctx.exit(0 if report.ok else 3)


@solotune.command()
@click.argument("model")
@click.argument("dataset")
@click.option("-o", "--output", default="solotune.yaml", show_default=True, help="The config file to write.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@json_option
def init(model: str, dataset: str, output: str, force: bool, as_json: bool) -> None:
    """Write a commented config for a MODEL and a DATASET.

    MODEL is a folder or an id on the hub; DATASET a file (jsonl, json, csv, parquet) or an id. All keys are in it with
    their defaults and their help.

    \b
    Example:
      solotune init HuggingFaceTB/SmolLM2-135M-Instruct chats.jsonl
    """
    from solotune import verbs

    path = verbs.init(model, dataset, output, force)
    if as_json:
        print_json({"path": str(path)})
    else:
        click.echo(f"wrote {path}; next: solotune data {path}")


@solotune.command()
@config_arguments
@click.option("--show", type=click.IntRange(min=0), default=1, show_default=True, help="Rows to show.")
@click.option("--ids", "with_ids", is_flag=True, help="Show each token of these rows by itself, with its id.")
@json_option
@click.pass_context
def data(ctx: click.Context, config: str, overrides: tuple[str, ...], show: int, with_ids: bool, as_json: bool) -> None:
    """Show what training would learn: rows, split, tokens, mask.

    The model's own chat template is applied, so what is shown is what the model sees; what it learns is marked. Faults
    of the data are named with their fix; one that is an error makes the exit code 3.

    \b
    Example:
      solotune data solotune.yaml --show 3 max_length=1024
    """
    from solotune import verbs
    from solotune.terminal import make_display

    display = make_display(1, sys.stdout)
    try:
        preview = verbs.data(config, overrides, show=show, display=display)
    finally:
        display.finish()
    if as_json:
        print_json(preview.to_json())
    else:
        from solotune.printing import print_data

        print_data(preview, _console(), with_ids)
    ctx.exit(3 if any(finding["severity"] == "error" for finding in preview.report.findings) else 0)


@solotune.command()
@config_arguments
@click.option(
    "--gpu", metavar="NAME", help="Plan for this card: h100, a100-80, l4, 4090, ... (default: this machine's)."
)
@json_option
@click.pass_context
def plan(ctx: click.Context, config: str, overrides: tuple[str, ...], gpu: str | None, as_json: bool) -> None:
    """Say what a run will need and take, before it runs.

    Peak memory by category, seconds, and the knobs that are turned within memory_budget, each with its reason. Needs
    no GPU and no weights. What does not fit is named with the nearest change that does, and makes the exit code 3.

    \b
    Example:
      solotune plan solotune.yaml --gpu 4090 max_length=4096
    """
    from solotune import verbs
    from solotune.terminal import make_display

    display = make_display(1, sys.stdout)
    try:
        found = verbs.plan(config, overrides, gpu, display=display)
    finally:
        display.finish()
    if as_json:
        print_json(found.to_json())
    else:
        from solotune.printing import print_plan

        print_plan(found, _console())
    ctx.exit(0 if found.fits else 3)


@solotune.command()
@config_arguments
@click.option("--resume", is_flag=True, help="Continue the run in output_dir, or the newest run of this config.")
@json_option
def train(config: str, overrides: tuple[str, ...], resume: bool, as_json: bool) -> None:
    """Train, save the adapter, compare it with its base.

    All of it lands in one run directory. Ctrl-C finishes the step in hand and saves a checkpoint; --resume goes on from
    there as if nothing had happened.

    \b
    Example:
      solotune train solotune.yaml learning_rate=1e-4 output_dir=runs/low
    """
    from solotune import verbs
    from solotune.config import load_config
    from solotune.terminal import make_display

    checked = load_config(config, overrides)
    display = make_display(checked.logging_steps, sys.stdout)
    try:
        result = verbs.train(checked, resume=resume, display=display)
    finally:
        display.finish()
    if as_json:
        print_json(result.to_json())
    else:
        from solotune.printing import print_trained

        print_trained(result, _console())


@solotune.command()
@click.argument("run")
@json_option
def evaluate(run: str, as_json: bool) -> None:
    """Compare a RUN's model with its base on the held-out rows.

    RUN is a run directory. Loss per learned token and exact match, with standard errors, and answers side by side.

    \b
    Example:
      solotune evaluate runs/solotune-20260101-120000
    """
    from solotune import verbs
    from solotune.terminal import make_display

    display = make_display(1, sys.stdout)
    try:
        evaluation = verbs.evaluate(run, display=display)
    finally:
        display.finish()
    if as_json:
        print_json(evaluation.to_json())
    else:
        from solotune.printing import print_evaluation

        print_evaluation(evaluation, _console())


@solotune.command()
@click.argument("target")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--deep", is_flag=True, help="Probe longer, on more batches.")
@click.option("--budget", type=click.FloatRange(min=0), metavar="SECONDS", help="For the probes; 0: rules alone.")
@click.option("--config", metavar="FILE", help="Of a foreign folder: the config that made it.")
@click.option("--dataset", metavar="DATA", help="Of a foreign folder: what it was trained on.")
@json_option
@click.pass_context
def diagnose(
    ctx: click.Context,
    target: str,
    overrides: tuple[str, ...],
    deep: bool,
    budget: float | None,
    config: str | None,
    dataset: str | None,
    as_json: bool,
) -> None:
    """Name what is wrong with a training, or say that nothing is.

    TARGET is a config (before the run), a run directory (during or after it), or the output folder of TRL, PEFT or
    another trainer. Rules look at settings, rows, curves and files; then probes experiment on the model. A fault makes
    the exit code 3; the answer is also in the run's diagnosis.json.

    \b
    Example:
      solotune diagnose runs/solotune-20260101-120000
    """
    from solotune import verbs
    from solotune.terminal import make_display

    display = make_display(1, sys.stdout)
    try:
        found = verbs.diagnose(target, deep, budget, dataset, config, overrides, display=display)
    finally:
        display.finish()
    if as_json:
        print_json(found.to_json())
    else:
        from solotune.printing import print_diagnosis

        print_diagnosis(found, _console())
    ctx.exit(3 if found.is_fault else 0)


@solotune.command()
@click.argument("code")
@json_option
def explain(code: str, as_json: bool) -> None:
    """Explain a fault: how it shows, why it matters, its fix.

    CODE is a fault (F17, or its name pad-masks-terminator) or one of the fifteen suspects (S4).

    \b
    Example:
      solotune explain F17
    """
    from solotune import verbs

    found = verbs.explain(code)
    if as_json:
        print_json(found.to_json())
    else:
        click.echo(_inert(found.text))


@solotune.command()
@click.argument("run")
@click.option("--base", is_flag=True, help="Show the base model's answer too.")
@click.option("--prompt", help="Ask this one thing and leave.")
@json_option
def chat(run: str, base: bool, prompt: str | None, as_json: bool) -> None:
    """Talk to a RUN's model.

    On a terminal /reset forgets the conversation and /quit leaves; out of a pipe each line is one message.

    \b
    Example:
      solotune chat runs/solotune-20260101-120000 --base --prompt "Hello"
    """
    from solotune import verbs
    from solotune.terminal import read_messages, show_answers

    session = verbs.chat(run)
    turns = []
    for text in read_messages(session.model_name) if prompt is None else [prompt]:
        if text == "/reset":
            session.reset()
            click.echo("forgotten", err=True)
        else:
            turns.append(show_answers(session, text, base, None if as_json else _console()))
    if as_json:
        print_json({"model": session.model_name, "turns": turns})


@solotune.command()
@click.option("--root", default="runs", show_default=True, help="The folder that holds the run directories.")
@json_option
def runs(root: str, as_json: bool) -> None:
    """List the runs, oldest first.

    \b
    Example:
      solotune runs --root experiments
    """
    from solotune import verbs

    found = verbs.runs(root)
    if as_json:
        print_json({"runs": [run.to_json() for run in found]})
    else:
        from solotune.printing import print_runs

        print_runs(found, root, _console())


# --- the door


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code; nothing but SystemExit leaves this function."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in given
    quieten()
    try:
        door = _stdout_for_json_only() if as_json else contextlib.nullcontext()
        with door, solotune.make_context("solotune", given) as ctx:
            solotune.invoke(ctx)
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
    except KeyboardInterrupt as error:
        return _fail(130, f"interrupted{f': {error}' if str(error) else ''}", as_json)
    except BrokenPipeError:
        # The reader has gone. Python would complain once more when it flushes stdout on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return StorageError.exit_code
    except Exception as error:
        problem = (
            f"this is a bug of solotune: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
        return _fail(1, f"{problem}\n  {'log:':9}{_write_crash(error, given)}", as_json)


def _fail(code: int, message: str, as_json: bool, content: dict[str, object] | None = None, after: str = "") -> int:
    click.echo(
        f"{click.style('error:', fg='red', bold=True)} {_inert(message)}" + (f"\n{after}" if after else ""), err=True
    )
    if as_json:
        unknown = {"exit_code": code, "meaning": EXIT_CODES[code], "problem": message}
        print_json(content or {"error": unknown})
    return code


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


_json_stream: IO[str] | None = None


@contextlib.contextmanager
def _stdout_for_json_only() -> Iterator[None]:
    """Sends all that is written to stdout to stderr, native code's output too; `print_json` alone gets through."""
    global _json_stream
    before, saved_fd = sys.stdout, None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if before.fileno() == 1:
            before.flush()
            saved_fd = os.dup(1)
            os.dup2(2, 1)
    stream = before if saved_fd is None else os.fdopen(saved_fd, "w", encoding="utf-8", closefd=False)
    _json_stream = stream
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        stream.flush()
        _json_stream, sys.stdout = None, before
        if saved_fd is not None:
            os.dup2(saved_fd, 1)
            os.close(saved_fd)


def print_json(content: Any) -> None:
    """The one JSON object; NaN and infinities, which JSON lacks, become null."""
    stream = _json_stream or sys.stdout
    stream.write(json.dumps(_finite(content), indent=2, ensure_ascii=False, default=str) + "\n")
    stream.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_crash(error: Exception, arguments: Sequence[str]) -> Path:
    """The traceback, into the log of the run that it concerns, or else into a file of its own."""
    text = f"solotune {__version__}, Python {sys.version.split()[0]}\n" + "".join(traceback.format_exception(error))
    for folder in (getattr(error, "run_dir", None), *arguments[1:2]):
        with contextlib.suppress(OSError, TypeError, ValueError):
            if (Path(folder) / "config.yaml").is_file():  # type: ignore[arg-type]
                with open(Path(folder) / "log.txt", "a", encoding="utf-8") as file:  # type: ignore[arg-type]
                    file.write(text)
                return Path(file.name)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    handle, name = tempfile.mkstemp(prefix=f"solotune-crash-{stamp}-", suffix=".log")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    return Path(name)


def _console() -> Console:
    from solotune.terminal import make_console

    return make_console(sys.stdout)


def _inert(text: str) -> str:
    from solotune.terminal import inert

    return inert(text)


if __name__ == "__main__":
    raise SystemExit(main())
