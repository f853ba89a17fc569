"""The command `solotune evaluate`, as the other verbs in `commands`: parse, call the verb, print the result."""

from __future__ import annotations

import click

from solotune.cli.options import json_option
from solotune.cli.output import print_result, shown


def _as_lm_eval_writes_it(option: str) -> str:
    """`--num_fewshot`, as lm_eval's own command line has it, is `--num-fewshot`."""
    return option.replace("_", "-")


@click.command(context_settings={"token_normalize_func": _as_lm_eval_writes_it})
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--gate", is_flag=True, help="Exit with 3 unless the tuned model is better than its base.")
@click.option("--tasks", metavar="NAMES", help="Also ask both models these tasks of lm_eval: arc_easy,gsm8k,...")
@click.option("--include-path", metavar="FOLDER", help="Your own task files. The functions that they name are run.")
@click.option("--limit", type=float, metavar="N", help="Documents of each task, or (below 1) the share of them.")
@click.option(
    "--num-fewshot", type=int, metavar="N", help="Solved examples before each question. [default: the task's]"
)
@click.option("--apply-chat-template", "is_chat", is_flag=True, help="Ask the tasks as chats, as the run was trained.")
@json_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    run: str,
    overrides: tuple[str, ...],
    gate: bool,
    tasks: str | None,
    include_path: str | None,
    limit: float | None,
    num_fewshot: int | None,
    is_chat: bool,
    as_json: bool,
) -> None:
    """Compare the model of a RUN with its base on held-out rows.

    RUN is a run directory. Shows the loss per trained token and exact match, with standard errors, a paired test of the
    difference, and answers side by side. KEY=VALUE adds scores of the answers (metrics=[json]) or changes num_samples,
    max_new_tokens, metrics_rows and per_device_eval_batch_size.

    --tasks needs pip install 'solotune[lm-eval]'. Its options are those of lm_eval's own command line.

    \b
    Example:
      solotune evaluate runs/solotune-20260101-120000
    """
    with shown() as display:
        from solotune.api.evaluate import evaluate
        from solotune.cli.results import print_evaluation

        result = evaluate(
            run,
            display,
            overrides,
            tasks=tasks or (),
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            chat_template=is_chat,
        )
    print_result(result, print_evaluation, as_json)
    ctx.exit(3 if gate and result.verdict != "better" else 0)
