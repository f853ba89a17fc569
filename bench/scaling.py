"""Training on several cards of one machine, beside one card: tokens per second, peak memory, losses.

    python -m bench.scaling --tokenizer FOLDER [--cards 2] [--only TEXT ...] [--steps 6] [--name scaling]

Each case is `bench.recipe_step` (4 rows of 2,048 tokens a micro-batch) with dropout 0, on a model's shape whose random
weights are made on the card (`bench.made_weights`), the same on every rank:

    one card     one process on each card at the same time, all with the same rows: their losses show the noise between
                 two runs; the speed is the median of all
    all cards    `torchrun --standalone --nproc-per-node=CARDS`: the same rows a step, dealt to the cards

FOLDER holds a tokenizer of at most the shape's vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bench import recipe_step
from bench.machine import RESULTS, table, write_result
from bench.made_weights import make_checkpoint, make_weights_here
from bench.plan_cases import MODELS

COMMON = ("lora_dropout=0", "logging_steps=1", "num_samples=0")


class Case(NamedTuple):
    model: str
    accumulation: int  # micro-batches of each card
    overrides: tuple[str, ...] = ()
    on_one: bool = True  # also on one card

    @property
    def name(self) -> str:
        return " ".join((self.model, *self.overrides))


CASES = [
    Case("8B", 2),
    Case("8B", 2, ("base_precision=fp8",)),
    Case("70B", 1),
    Case("70B", 1, ("base_precision=fp8",), on_one=False),
    Case("70B", 1, ("base_precision=fp8", "base_sharding=true"), on_one=False),
    Case("70B", 1, ("base_precision=fp8", "memory_budget=79GiB"), on_one=False),  # the plan has to shard it
]


def run_recipe(words: Sequence[str]) -> None:
    """`bench.recipe_step` with these words, on made weights; under torchrun one rank of it."""
    make_weights_here()
    recipe_step.main([*words, "--json"])


def run(case: Case, folder: Path, cards: int, ranks: int, steps: int) -> list[dict[str, Any]]:
    """What `bench.recipe_step` measured on `ranks` cards: in one run with all cards, or in one on each.

    Raises SystemExit if one fails.
    """
    words = [str(folder / case.model), "--steps", str(steps), *COMMON, *case.overrides]
    words.append(f"gradient_accumulation_steps={case.accumulation * cards // ranks}")
    start = [sys.executable] if ranks == 1 else ["torchrun", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*start, "-m", "bench.scaling", "--child", *words]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cards)))).split(",")

    def one_run(number: int) -> subprocess.CompletedProcess[str]:
        own = {"CUDA_VISIBLE_DEVICES": visible[number]} if ranks == 1 else {}
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **own})

    with ThreadPoolExecutor(cards // ranks) as pool:
        runs = list(pool.map(one_run, range(cards // ranks)))
    for ended in runs:
        if ended.returncode:
            raise SystemExit(f"{case.name} on {ranks} cards:\n{ended.stderr[-3000:]}")
    return [json.loads(ended.stdout.splitlines()[-1]) for ended in runs]


def furthest(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def row(name: str, cards: int, one: list[dict[str, Any]], both: dict[str, Any]) -> list[Any]:
    """A row of the table."""
    whole, planned = both["tokens_per_second"], both["predicted"]
    cells = [
        name,
        "",
        f"{whole:,}",
        "",
        both["peak_gib"],
        f"{planned['step_seconds']} / {both['step_seconds']}",
        "",
        "",
    ]
    if one:
        alone = statistics.median(run["tokens_per_second"] for run in one)
        cells[1], cells[3] = f"{alone:,.0f}", f"{whole / alone:.3f}"
        noise = max(furthest(one[0]["losses"], run["losses"]) for run in one)
        cells[6], cells[7] = f"{noise:.1e}", f"{min(furthest(run['losses'], both['losses']) for run in one):.1e}"
    return cells


def markdown(result: dict[str, Any]) -> str:
    """bench/results/scaling.md."""
    cards = result["cards"]
    head = ["case", "1 card, tok/s", f"{cards} cards, tok/s in all", "ratio", "peak GiB a card",
            "step s: planned / measured", "losses: one card against itself", f"{cards} cards against one"]  # fmt: skip
    rows = [row(name, cards, found["one"], found["all"]) for name, found in result["cases"].items()]
    lines = ["# Several cards beside one", "", "```", (__doc__ or "").strip(), "```", ""]
    lines += [f"{cards} x {result['card']}, torch {result['torch']}.", "", table(head, rows), ""]
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return run_recipe(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[""], help="only cases with one of these texts in their names")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--name", default="scaling", help="of the result file")
    args = parser.parse_args()
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result: dict[str, Any] = {"cards": args.cards, "card": card, "torch": torch.__version__, "cases": {}}
    with tempfile.TemporaryDirectory(prefix="scaling-") as temporary:
        folder = Path(temporary)
        for case in [case for case in CASES if any(text in case.name for text in args.only)]:
            make_checkpoint(folder / case.model, MODELS[case.model], args.tokenizer)
            found: dict[str, Any] = {"one": run(case, folder, args.cards, 1, args.steps) if case.on_one else []}
            found["all"] = run(case, folder, args.cards, args.cards, args.steps)[0]
            result["cases"][case.name] = found
            print(json.dumps({case.name: found}), flush=True)
            write_result(args.name, result)  # what is measured stays, if the next one is stopped
            (RESULTS / f"{args.name}.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
