"""The `solotune` command: parse, call the verb's function, print what it returns. No logic is here.

    main -> click parses -> solotune.verbs.VERB(...) -> print_..., or one JSON object

How a command ends, with which exit code, and that `--json` prints one object alone, is `door.py`'s.

Nothing heavy is imported here, so that `solotune --help` answers at once: torch, pydantic and rich come in with the
verb that needs them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from solotune import __version__, door
from solotune.door import console, inert, print_json
from solotune.errors import EXIT_CODES, IntegrityError


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

        print_doctor(report, console())
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
        click.echo(inert(f"wrote {path}; next: solotune data {path}"))


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

        print_data(preview, console(), with_ids)
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

        print_plan(found, console())
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

        print_trained(result, console())


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

        print_evaluation(evaluation, console())


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

        print_diagnosis(found, console())
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
        click.echo(inert(found.text))


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
    from solotune import verbs

    found = verbs.verify(run)
    if as_json:
        print_json(found.to_json())
    else:
        from solotune.printing import print_verification

        print_verification(found, console())
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
    from solotune import verbs

    found = verbs.runs(root)
    if as_json:
        print_json({"runs": [run.to_json() for run in found]})
    else:
        from solotune.printing import print_runs

        print_runs(found, root, console())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code; nothing but SystemExit leaves this function."""
    return door.pass_through(solotune, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
