"""Command line verbs: parse the arguments, call the verb's function, print the result. No logic here.

    main.main -> click parses -> solotune.api.VERB -> results.print_..., or one JSON object

`main` turns errors into exit codes; `output` makes sure that `--json` prints exactly one object.

No heavy import at the top of this file, so that `solotune --help` is fast: torch, pydantic and rich are imported by the
verbs that need them.
"""

from __future__ import annotations

import os
import re
import shutil
import sys

import click

from solotune.cli.evaluate_command import evaluate
from solotune.cli.export_command import export
from solotune.cli.options import config_arguments, json_option
from solotune.cli.output import console, print_json, print_result, shown
from solotune.cli.report_command import report
from solotune.cli.serve_command import serve
from solotune.cli.watch_command import watch
from solotune.errors import EXIT_CODES, IntegrityError
from solotune.runtime.world import rank_of
from solotune.units import escape_terminal
from solotune.version import __version__


class Verbs(click.Group):
    """Group of verbs in the order of work; the help ends with the table of exit codes."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.get_short_help_str(100)) for name, verb in self.commands.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]}, subcommand_metavar="VERB ...")
@click.version_option(__version__, message="solotune %(version)s")
def solotune() -> None:
    """Fine-tune an LLM on one GPU, and see what was learned.

    \b
    From nothing to a tuned model:
      solotune doctor                  check this machine
      solotune init MODEL chats.jsonl  write solotune.yaml
      solotune data solotune.yaml      check the loss mask
      solotune plan solotune.yaml      memory and time
      solotune train solotune.yaml     train and compare
      solotune watch runs/RUN          show it elsewhere
      solotune diagnose runs/RUN       find out what is wrong
      solotune report runs/RUN         a page with everything
      solotune chat runs/RUN --base    chat with both models
      solotune export runs/RUN         merge, GGUF, ...
      solotune serve runs/RUN          OpenAI's API, locally
    """


@solotune.command()
@json_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check this machine: driver, CUDA, packages, memory, disk.

    Each failed check is shown with its fix. If a check fails, the exit code is 3. Nothing is written or downloaded.

    \b
    Example:
      solotune doctor
    """
    with shown("checking this machine"):
        from solotune.api.doctor import doctor
        from solotune.cli.results import print_doctor

        report = doctor()
    print_result(report, print_doctor, as_json)
    ctx.exit(0 if report.ok else 3)


@solotune.command()
@click.argument("arguments", nargs=-1, metavar="[MODEL] [DATASET] [KEY=VALUE]...")
@click.option("-o", "--output", default="solotune.yaml", show_default=True, help="Config file to write.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@click.option("--all", "every_key", is_flag=True, help="List all other keys too, with their defaults and help.")
@click.option("--from", "source", metavar="FILE", help="Translate a config of Axolotl, LLaMA-Factory, TRL or Unsloth.")
@json_option
def init(
    arguments: tuple[str, ...], output: str, force: bool, every_key: bool, source: str | None, as_json: bool
) -> None:
    """Write a config for a MODEL and a DATASET, fitted to both.

    MODEL is a folder or a hub id, DATASET a file (jsonl, json, csv, parquet) or a hub id. It reads both, and proposes
    columns, max_length, held-out rows, batch and steps that fit this machine, each with its reason. Settings that are
    given as KEY=VALUE stay as they are.

    \b
    Example:
      solotune init Qwen/Qwen3-8B chats.jsonl
    """
    from solotune.errors import program

    is_key = [re.match(r"\w+=", one) is not None for one in arguments]
    overrides = [one for one, is_one in zip(arguments, is_key, strict=True) if is_one]
    names = [one for one, is_one in zip(arguments, is_key, strict=True) if not is_one]
    if len(names) > 2:
        raise click.UsageError(f"init takes one MODEL and one DATASET (a file or a folder), not {len(names)} names.")
    model, dataset = [*names, None, None][:2]
    with shown() as display:
        from solotune.api.init import init

        path = init(model, dataset, output, force, every_key, source, display, overrides)
    if as_json:
        print_json({"path": str(path)})
    else:
        click.echo(escape_terminal(f"Wrote {path}. Next: {program()} data {path}"))


@solotune.command()
@config_arguments
@click.option("--show", type=click.IntRange(min=0), default=1, show_default=True, help="Number of rows to show.")
@click.option("--ids", "with_ids", is_flag=True, help="Show each token of these rows with its id.")
@json_option
@click.pass_context
def data(ctx: click.Context, config: str, overrides: tuple[str, ...], show: int, with_ids: bool, as_json: bool) -> None:
    """Show the training data: rows, split, tokens, loss mask.

    Rows are shown as the model sees them, with its chat template; tokens that are trained on are marked. Problems in
    the data are shown with their fix. If one of them is an error, the exit code is 3.

    \b
    Example:
      solotune data solotune.yaml --show 3 max_length=1024
    """
    with shown() as display:
        from solotune.api.data import data
        from solotune.cli.results import print_data

        preview = data(config, overrides, show=show, display=display)
    print_result(preview, lambda preview, console: print_data(preview, console, with_ids), as_json)
    ctx.exit(3 if preview.is_fault else 0)


@solotune.command()
@config_arguments
@click.option(
    "--gpu",
    metavar="NAME",
    help="GPU to plan for: h100, a100-80, l4, 4090, ..., or several: h100x2 (default: this machine's).",
)
@click.option("--host-memory", metavar="SIZE", help="Free RAM of the host with --gpu, for layers that stream: 64GiB.")
@json_option
@click.pass_context
def plan(
    ctx: click.Context,
    config: str,
    overrides: tuple[str, ...],
    gpu: str | None,
    host_memory: str | None,
    as_json: bool,
) -> None:
    """Predict memory and time of a run before it starts.

    Shows peak memory by category, seconds, and which settings solotune chose for you, and why. Needs no GPU and no
    weights. If it does not fit, the smallest change that makes it fit is shown (exit code 3).

    Frozen layers that do not fit on the GPU stream from host memory (base_offload). It is then shown how much of it the
    run pins, how much it may, and how fast the link is: measured for the GPU in this machine, else the usual one. With
    several GPUs they may be split over them instead (base_sharding).

    \b
    Example:
      solotune plan solotune.yaml --gpu 4090 max_length=4096
      solotune plan solotune.yaml --gpu h100x2
      solotune plan solotune.yaml --gpu l4 --host-memory 64GiB
    """
    if rank_of(os.environ):
        return  # rank 0 plans for all
    with shown() as display:
        from solotune.api.plan import plan
        from solotune.cli.results import print_plan

        found = plan(config, overrides, gpu, display=display, host_memory=host_memory)
    print_result(found, print_plan, as_json)
    ctx.exit(0 if found.fits and not found.is_fault else 3)


@solotune.command()
@config_arguments
@click.option("--resume", is_flag=True, help="Continue the run in output_dir, or the newest run of this config.")
@json_option
def train(config: str, overrides: tuple[str, ...], resume: bool, as_json: bool) -> None:
    """Train, save the adapter, compare it with the base model.

    Everything is saved in one run directory. Ctrl-C finishes the current step and saves a checkpoint; --resume
    continues from there.

    \b
    Example:
      solotune train solotune.yaml learning_rate=1e-4
    """
    with shown() as display:
        from solotune.api.ranks import failing_together
        from solotune.config.load import load_config
        from solotune.runtime.world import World

        with failing_together(World.of_environment(os.environ)):
            checked = load_config(config, overrides)  # a mistake in it is known before the slow imports
        display.logging_steps = checked.logging_steps

        from solotune.api.train import train
        from solotune.cli.results import print_trained

        result = train(checked, resume=resume, display=display)
    print_result(result, print_trained, as_json)


solotune.add_command(watch)


solotune.add_command(evaluate)


@solotune.command()
@click.argument("target")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--deep", is_flag=True, help="Experiment longer, on more batches.")
@click.option(
    "--budget",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Time limit for the experiments on the model; 0 skips them.",
)
@click.option("--config", metavar="FILE", help="The config used for training (only for folders of other tools).")
@click.option("--dataset", metavar="DATA", help="The training data (only for folders of other tools).")
@click.option("--base", metavar="MODEL", help="The base model (only for folders of other tools).")
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
    base: str | None,
    as_json: bool,
) -> None:
    """Find out what is wrong with a run, if anything.

    TARGET is a config (before the run), a run directory (during or after it), the output folder of another trainer
    (TRL, transformers, PEFT, LLaMA-Factory, Axolotl, Unsloth, ms-swift), or a log (*.jsonl, TensorBoard, W&B offline,
    MLflow, a console log). First, rules check settings, rows, curves and files; then experiments (probes) test the
    model. If a fault is found, the exit code is 3. The result is also saved in the run's diagnosis.json.

    The data, config and base model of another trainer are searched in its folder, in the parent folder, and in data/
    and config/ of both; the result lists what was found. Other paths and hub ids in these files are never opened: pass
    them with --base, --dataset and --config.

    \b
    Example:
      solotune diagnose runs/solotune-20260101-120000
    """
    with shown() as display:
        from solotune.api.diagnose import diagnose
        from solotune.cli.results import print_diagnosis

        found = diagnose(target, deep, budget, dataset, config, overrides, display=display, base=base)
    print_result(found, print_diagnosis, as_json)
    ctx.exit(3 if found.is_fault else 0)


@solotune.command()
@click.argument("code", required=False)
@json_option
def explain(code: str | None, as_json: bool) -> None:
    """Explain a fault: symptoms, why it matters, its fix.

    CODE is a fault (F17, or its name pad-masks-terminator) or one of the fifteen suspects (S4). Without CODE, the
    suspects are listed.

    \b
    Example:
      solotune explain F17
    """
    from solotune.api.explain import explain

    width = min(80, shutil.get_terminal_size().columns)
    print_result(explain(code), lambda found, _: click.echo(escape_terminal(found.wrapped(width))), as_json)


@solotune.command()
@click.argument("run")
@click.option("--base", is_flag=True, help="Show the answer of the base model too.")
@click.option("--prompt", help="Send this message, print the answer and exit.")
@click.option(
    "--system", metavar="TEXT|none", help="System prompt. [default: that of the training rows, if all have it]"
)
@json_option
def chat(run: str, base: bool, prompt: str | None, system: str | None, as_json: bool) -> None:
    """Chat with the model of a RUN.

    Messages are formatted as in training: with the chat template, and with the system prompt that all training rows
    share. Answers stop at the tokens that end the training rows. If the model was trained on plain text (prompt and
    completion), it continues each message, and \\n in a message is a line break. With --base, the base model answers
    too, in a separate conversation. RUN is a folder, a name in runs/, or latest.

    /help lists the commands (/reset, /system, /save, /quit); a message that begins with / needs a space before it. On
    a terminal, Ctrl-C stops an answer. From a pipe, each line is read as if it was typed.

    \b
    Example:
      solotune chat runs/solotune-20260101-120000 --base
    """
    with shown(stream=sys.stderr) as display:  # stdout has only the answers
        from solotune.api.chat import chat
        from solotune.display.chat import Chat

        session = chat(run, "" if system == "none" else system, display=display)
    conversation = Chat(session, None if as_json else console(), base)
    if prompt is None:
        conversation.run()
    else:
        conversation.once(prompt)
    if as_json:
        asked = {"model": session.model_name, "prompt_format": session.prompt_format, "system": session.system}
        print_json({**asked, "turns": conversation.turns})


solotune.add_command(report)
solotune.add_command(export)
solotune.add_command(serve)


@solotune.command()
@click.argument("run")
@json_option
@click.pass_context
def verify(ctx: click.Context, run: str, as_json: bool) -> None:
    """Check that the files of a RUN are unchanged.

    Compares each file with its recorded sha256, and looks for missing and added files. Adapter and checkpoints must
    match the config and have finite values. If there is a problem, the exit code is 5.

    \b
    Example:
      solotune verify runs/solotune-20260101-120000
    """
    with shown("checking the run's files"):
        from solotune.api.verify import verify
        from solotune.cli.results import print_verification

        found = verify(run)
    print_result(found, print_verification, as_json)
    ctx.exit(0 if found.ok else IntegrityError.exit_code)


@solotune.command()
@click.option("--root", default="runs", show_default=True, help="Folder with the run directories.")
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
        from solotune.cli.run_list import print_runs

        print_runs(found, root, console())
