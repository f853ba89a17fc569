"""The commands: parse, call the verb's function, print what it returns. No logic is here.

    main.main -> click parses -> solotune.api.VERB -> results.print_..., or one JSON object

How a command ends and with which exit code is in `main`, how `--json` prints one object alone in `output`.

Nothing heavy is imported here, so that `solotune --help` answers at once: torch, pydantic and rich come in with the
verb that needs them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from solotune.cli.output import console, escape_terminal, print_json
from solotune.errors import EXIT_CODES, IntegrityError
from solotune.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from solotune.display.progress import Display


class Result(Protocol):
    """What a verb returns."""

    def to_json(self) -> dict[str, Any]: ...


ResultT = TypeVar("ResultT", bound=Result)


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


def print_result(result: ResultT, printer: Callable[[ResultT, Console], None], as_json: bool) -> ResultT:
    """Prints what a verb returned, for people or as one JSON object."""
    if as_json:
        print_json(result.to_json())
    else:
        printer(result, console())
    return result


def run_shown(
    verb: Callable[[Display], ResultT],
    printer: Callable[[ResultT, Console], None],
    as_json: bool,
    logging_steps: int = 1,
) -> ResultT:
    """Calls a verb with a display, whose live line is gone however it ends, and prints its result."""
    from solotune.display.progress import make_display

    display = make_display(logging_steps, sys.stdout)
    try:
        result = verb(display)
    finally:
        display.finish()
    return print_result(result, printer, as_json)


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
    from solotune.api.doctor import doctor
    from solotune.cli.results import print_doctor

    report = print_result(doctor(), print_doctor, as_json)
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
    from solotune.api.init import init

    path = init(model, dataset, output, force)
    if as_json:
        print_json({"path": str(path)})
    else:
        click.echo(escape_terminal(f"wrote {path}; next: solotune data {path}"))


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
    from solotune.api.data import data
    from solotune.cli.results import print_data

    preview = run_shown(
        lambda display: data(config, overrides, show=show, display=display),
        lambda preview, console: print_data(preview, console, with_ids),
        as_json,
    )
    ctx.exit(3 if any(finding["severity"] == "error" for finding in preview.report.findings or ()) else 0)


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
    from solotune.api.plan import plan
    from solotune.cli.results import print_plan

    found = run_shown(lambda display: plan(config, overrides, gpu, display=display), print_plan, as_json)
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
    from solotune.api.train import train
    from solotune.cli.results import print_trained
    from solotune.config.load import load_config

    checked = load_config(config, overrides)
    run_shown(
        lambda display: train(checked, resume=resume, display=display), print_trained, as_json, checked.logging_steps
    )


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
    from solotune.api.evaluate import evaluate
    from solotune.cli.results import print_evaluation

    run_shown(lambda display: evaluate(run, display=display), print_evaluation, as_json)


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
    from solotune.api.diagnose import diagnose
    from solotune.cli.results import print_diagnosis

    found = run_shown(
        lambda display: diagnose(target, deep, budget, dataset, config, overrides, display=display),
        print_diagnosis,
        as_json,
    )
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
    from solotune.api.explain import explain

    print_result(explain(code), lambda found, _: click.echo(escape_terminal(found.text)), as_json)


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
    from solotune.api.chat import chat
    from solotune.display.progress import read_messages, show_answers

    session = chat(run)
    turns = []
    for text in read_messages(session.model_name) if prompt is None else [prompt]:
        if text == "/reset":
            session.reset()
            click.echo("forgotten", err=True)
        else:
            turns.append(show_answers(session, text, base, None if as_json else console()))
    if as_json:
        print_json({"model": session.model_name, "turns": turns})


@solotune.command()
@click.argument("run")
@json_option
@click.pass_context
def verify(ctx: click.Context, run: str, as_json: bool) -> None:
    """Check that a RUN's files are what it wrote.

    Every file against the sha256 that was recorded, nothing missing and nothing added; adapter and checkpoints of this
    config, and finite. What is wrong is named, and makes the exit code 5.

    \b
    Example:
      solotune verify runs/solotune-20260101-120000
    """
    from solotune.api.verify import verify
    from solotune.cli.results import print_verification

    found = print_result(verify(run), print_verification, as_json)
    ctx.exit(0 if found.ok else IntegrityError.exit_code)


@solotune.command()
@click.option("--root", default="runs", show_default=True, help="The folder that holds the run directories.")
@json_option
def runs(root: str, as_json: bool) -> None:
    """List the runs, oldest first.

    \b
    Example:
      solotune runs --root experiments
    """
    from solotune.api.runs import runs

    found = runs(root)
    if as_json:
        print_json({"runs": [run.to_json() for run in found]})
    else:
        from solotune.cli.results import print_runs

        print_runs(found, root, console())
