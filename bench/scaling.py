"""Training on several cards of one machine, beside one card: tokens per second, peak memory, losses.

    python -m bench.scaling --tokenizer FOLDER [--cards 2] [--only TEXT ...] [--steps 6] [--name scaling]

Each case is the walkthrough's recipe (4 rows of 2,048 tokens a micro-batch) with dropout 0, on a model's shape:

    one card     one process on each card at the same time, all with the same rows: their losses show the noise between
                 two runs; the speed is the median of all
    all cards    `torchrun --standalone --nproc-per-node=CARDS`: the same rows a step, dealt to the cards

A run is `solotune train` as it is: plan, loading, preflight, loop, report. Only where the loader would read a tensor
from the checkpoint, it gets a random one that is made on the card, the same on every rank; the checkpoint has the right
names and shapes and no bytes (a sparse file), so that a base of 141 GB needs no disk. FOLDER holds a tokenizer of at
most the shape's vocabulary. Figures are medians over the steps after the first two, which compile and record.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.machine import RESULTS, table, write_result
from bench.plan_cases import MODELS
from bench.recipe_step import RECIPE, write_full_rows

NUM_WARM_UP = 2
# Standard deviations. Each layer adds little to a large embedding: else 80 random layers multiply each rounding error,
# and two gradients of one fp8 step differ by 130 %.
SIZE, EMBEDDING, INTO_RESIDUAL = 0.02, 1.0, 0.0003
COMMON = ("validation_size=0", "save_strategy=no", "lora_dropout=0", "logging_steps=1", "num_samples=0")


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


def make_checkpoint(folder: Path, model: str, tokenizer: Path) -> None:
    """A folder with a shape's config.json, a tokenizer, and a weight file of zeros that takes no disk."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.mkdir()
    for path in tokenizer.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in ("config.json", "tokenizer.model"):
            shutil.copy(path, folder)
    ids = AutoTokenizer.from_pretrained(folder)
    sizes = {**MODELS[model], "dtype": "bfloat16", "bos_token_id": ids.bos_token_id, "eos_token_id": ids.eos_token_id}
    (folder / "config.json").write_text(json.dumps(sizes))
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    header, end = {}, 0
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name not in module.all_tied_weights_keys:
            begin, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)


def size_of(name: str) -> float:
    """The standard deviation of a weight matrix."""
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        return INTO_RESIDUAL
    return EMBEDDING if name.endswith("embed_tokens.weight") else SIZE


def make_weights_here() -> None:
    """Lets the loader take random tensors that are made on the device for those of the checkpoint."""
    import torch

    from solotune.model import loading
    from solotune.model.weight_files import read_header

    def read(files: list[Path], match: Any, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = torch.Generator(device).manual_seed(0)
        for path in files:
            for name, entry in read_header(path).items():
                shape = tuple(entry.shape)
                if len(shape) == 1:
                    yield match.names[name], torch.ones(shape, device=device, dtype=torch.bfloat16)
                else:
                    random = torch.randn(shape, device=device, dtype=torch.bfloat16, generator=generator)
                    yield match.names[name], random.mul_(size_of(name))

    loading.read_tensors = read


def train(overrides: Sequence[str]) -> None:
    """A run on made weights; under torchrun one rank of it."""
    import solotune
    from solotune.display.progress import PlainDisplay, make_console

    make_weights_here()
    solotune.train(RECIPE, list(overrides), display=PlainDisplay(1, make_console(sys.stderr)))


def run(case: Case, folder: Path, cards: int, ranks: int, steps: int) -> list[dict[str, Any]]:
    """The case's runs on `ranks` cards: one with all cards, or one on each.

    Raises SystemExit if one fails.
    """
    made, whole = [], case.accumulation * cards
    keys = [*COMMON, f"model_name_or_path={folder / case.model}", f"dataset={folder / 'rows.jsonl'}"]
    keys += ["dataset_split=train", f"gradient_accumulation_steps={whole // ranks}", f"max_steps={steps}"]
    for number in range(cards // ranks):
        run_folder = folder / f"run-{len(list(folder.glob('run-*')))}"
        worker = ["-m", "bench.scaling", "--tokenizer", "-", "--child", *keys, *case.overrides]
        start = [sys.executable] if ranks == 1 else ["torchrun", "--standalone", f"--nproc-per-node={ranks}"]
        environ = dict(os.environ)
        if ranks == 1:
            visible = environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(cards)))).split(",")
            environ["CUDA_VISIBLE_DEVICES"] = visible[number]
        log = (folder / f"{run_folder.name}.log").open("w+")
        command = [*start, *worker, f"output_dir={run_folder}"]
        made.append((run_folder, log, subprocess.Popen(command, stdout=log, stderr=log, env=environ)))
        run_folder.mkdir()
    found = []
    for run_folder, log, process in made:
        if process.wait():
            log.seek(0)
            raise SystemExit(f"{case.name} on {ranks} cards:\n{log.read()[-3000:]}")
        found.append(measured(run_folder))
    return found


def measured(run_folder: Path) -> dict[str, Any]:
    """What a run recorded."""
    events = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    timed = steps[NUM_WARM_UP:]
    planned = json.loads((run_folder / "plan.json").read_text())["predicted"]
    return {
        "tokens_per_second": round(statistics.median(step["tokens_per_second"] for step in timed)),
        "step_seconds": round(statistics.median(step["step_seconds"] for step in timed), 4),
        "peak_gib": round(max(step["peak_bytes"] for step in steps) / 2**30, 2),
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        "planned": {
            "step_seconds": round(planned["seconds"]["step"], 4),
            "peak_gib": round(planned["peak_bytes"] / 2**30, 2),
            "choices": [f"{one['key']}: {one['value']}" for one in planned["choices"]],
        },
    }


def furthest(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def row(name: str, cards: int, one: list[dict[str, Any]], both: dict[str, Any]) -> list[Any]:
    """A row of the table."""
    whole, planned = both["tokens_per_second"], both["planned"]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[""], help="only cases with one of these texts in their names")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--name", default="scaling", help="of the result file")
    parser.add_argument("--child", nargs="*", metavar="key=value", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        return train(args.child)
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result: dict[str, Any] = {"cards": args.cards, "card": card, "torch": torch.__version__, "cases": {}}
    with tempfile.TemporaryDirectory(prefix="scaling-") as temporary:
        folder = Path(temporary)
        write_full_rows(folder / "rows.jsonl", 4 * 2 * args.cards * args.steps, 2048)
        for case in [case for case in CASES if any(text in case.name for text in args.only)]:
            if not (folder / case.model).exists():
                make_checkpoint(folder / case.model, case.model, args.tokenizer)
            found: dict[str, Any] = {"one": run(case, folder, args.cards, 1, args.steps) if case.on_one else []}
            found["all"] = run(case, folder, args.cards, args.cards, args.steps)[0]
            result["cases"][case.name] = found
            print(json.dumps({case.name: found}), flush=True)
            write_result(args.name, result)  # what is measured stays, if the next one is stopped
            (RESULTS / f"{args.name}.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
