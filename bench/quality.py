"""What the base's precision costs in quality: SmolLM2-135M tuned on four bases, held-out loss before and after.

    python -m bench.quality --prepare chats.jsonl                       # with a network: the chats to tune on
    python -m bench.quality --chats chats.jsonl [--model FOLDER --gguf FILE] [--processes 6] [key=value ...]

Two tasks, each tuned by `solotune.train` on every base with seeds 0, 1, 2:

    demo    the shop messages of examples/tickets.jsonl, to strict JSON; whole shops are held out
    chats   human conversations of `chitchat-dataset` (MIT); 200 rows are held out

A seed decides the held-out rows, the adapter's start, the row order and the dropout, for all bases alike. So a base is
compared with the 16-bit one seed by seed, and the standard errors, over seeds, hold what changes with the rows too.
Percentages are of the 16-bit base's loss. On the demo that loss ends near 0, where percentages say little: nats and
exact match beside them do.

The weights come out of a 4-bit GGUF file (see examples/smollm2.py), and "16 bit" means those values in bf16: they lie
on a coarser grid than the original weights, which NF4 and fp8 have to round like any others.

Several runs share one card, each in a process of its own that takes the next run when it is done; compiled kernels are
shared through the compiler's cache. Runs that share no graph start first. Losses do not depend on any of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from bench.machine import RESULTS, machine, table
from examples import smollm2

BASES: dict[str, dict[str, str]] = {
    "bf16": {"base_precision": "bf16"},
    "fp8": {"base_precision": "fp8"},
    "nf4": {"base_precision": "nf4"},
    "nf4+fp8": {"base_precision": "nf4", "matmul_precision": "fp8"},
}
COMMON = {
    "lora_r": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.05,
    "lora_target_modules": "all-linear",
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
    "optim": "adamw_torch",  # 8-bit moments would add their own rounding to what is compared
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "eval_strategy": "no",
    "save_strategy": "no",
    "num_samples": 0,
}
TASKS: dict[str, dict[str, Any]] = {
    "demo": {
        "split_by": "shop",
        "validation_size": 60,
        "max_length": 256,
        "per_device_train_batch_size": 8,
        "learning_rate": 2e-3,
    },
    "chats": {"validation_size": 200, "max_length": 1024, "per_device_train_batch_size": 8, "learning_rate": 5e-4},
}
TICKETS = Path(__file__).parent.parent / "examples" / "tickets.jsonl"
CHATS_PACKAGE = "chitchat-dataset==0.9.0"
NUM_CHATS, MAX_CHATS_BYTES = 2000, 5_800_000
CHAT_CHARACTERS = (200, 5000)  # shorter ones teach nothing, longer ones are cut at 1,024 tokens
BAR_PERCENT = 0.5


class Run(NamedTuple):
    task: str
    base: str
    seed: int


def prepare(path: Path) -> None:
    """Writes a random part of the two-sided conversations of `chitchat-dataset`, the same on every call."""
    from bench.real_data import two_sided

    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, CHATS_PACKAGE]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith("dataset.json"))
            conversations = json.loads(wheel.read(name))
    lowest, highest = CHAT_CHARACTERS
    chats = [messages for one in conversations.values() if (messages := two_sided(one))]
    chats = [m for m in chats if lowest <= sum(len(turn["content"]) for turn in m) <= highest]
    random.Random(0).shuffle(chats)
    size, lines = 0, []
    for line in (json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in chats[:NUM_CHATS]):
        size += len(line.encode())
        if size > MAX_CHATS_BYTES:
            break
        lines.append(line)
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} of {len(chats)} chats, {path.stat().st_size:,} bytes")


def model_folder(folder: Path, gguf: Path | None) -> Path:
    """SmolLM2 as a Hugging Face folder, made from the GGUF file where that is given, else from its package."""
    folder = folder.expanduser().absolute()
    if gguf is None or smollm2.is_whole(folder):
        return smollm2.ensure(folder)
    if hashlib.sha256(gguf.read_bytes()).hexdigest() != smollm2.GGUF_SHA256:
        raise SystemExit(f"{gguf} is not {smollm2.GGUF_NAME} of {smollm2.PACKAGE}")
    folder.mkdir(parents=True, exist_ok=True)
    smollm2.convert(gguf, folder)
    return folder


def thinned(source: Path, limit: int | None, target: Path) -> tuple[Path, float]:
    """The rows, or about `limit` of them from all over the file, and the share that was kept."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    if limit is None or limit >= len(lines):
        return source, 1.0
    target.write_text("".join(lines[:: len(lines) // limit][:limit]), encoding="utf-8")
    return target, limit / len(lines)


def keys_of(run: Run, model: Path, rows: Path, share: float, steps: int, output: Path) -> dict[str, Any]:
    """The config of a run; with a part of the rows, a part of the held-out ones."""
    task = TASKS[run.task]
    return {
        **COMMON,
        **task,
        **BASES[run.base],
        "model_name_or_path": str(model),
        "dataset": str(rows),
        "validation_size": max(2, round(task["validation_size"] * share)),
        "max_steps": steps,
        "seed": run.seed,
        "output_dir": str(output),
    }


def measure(run: Run, keys: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """One run, in a process that may have done others before."""
    import torch

    import solotune

    started = time.perf_counter()
    result = solotune.train(keys, overrides)
    seconds = time.perf_counter() - started
    torch.compiler.reset()  # the next model's layers are the same code: without it their number meets dynamo's limit
    score = result.evaluation
    assert score is not None
    return {
        **run._asdict(),
        "before": score.base.loss,
        "before_row_stderr": score.base.stderr,
        "after": score.tuned.loss,
        "after_row_stderr": score.tuned.stderr,
        "exact_match": score.tuned.exact_match,
        "rows": score.tuned.rows,
        "tokens": score.tuned.tokens,
        "seconds": round(seconds, 1),
        "choices": [f"{choice.key}: {choice.value}" for choice in result.choices],
        "card": torch.cuda.get_device_name() if result.summary["device"] == "cuda" else "CPU",
    }


def measure_all(
    todo: Sequence[tuple[Run, dict[str, Any]]], overrides: Sequence[str], processes: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """What each run gave, and what went wrong in those that gave nothing."""
    done, errors = [], []
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = {pool.submit(measure, run, keys, overrides): run for run, keys in todo}
        for future in as_completed(futures):
            name = "{} {} seed {}".format(*futures[future])
            try:
                done.append(future.result())
            except Exception as error:  # the other runs are worth having
                errors.append(f"{name}: {type(error).__name__}: {error}")
                traceback.print_exception(error)
            else:
                print(
                    f"{name}: {done[-1]['before']:.4f} -> {done[-1]['after']:.4f}, {done[-1]['seconds']} s", flush=True
                )
    return sorted(done, key=lambda one: (one["task"], list(BASES).index(one["base"]), one["seed"])), errors


# --- from runs to a table


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float]:
    """The standard error of the mean over seeds; not a number for one seed."""
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), stderr


def paired(runs: Sequence[dict[str, Any]], task: str, base: str, against: str, key: str = "after") -> list[float]:
    """base - against for each seed that has both, in nats."""
    losses = {(one["base"], one["seed"]): one[key] for one in runs if one["task"] == task}
    seeds = sorted(seed for name, seed in losses if name == base and (against, seed) in losses)
    return [losses[base, seed] - losses[against, seed] for seed in seeds]


def in_percent(runs: Sequence[dict[str, Any]], task: str, base: str, key: str = "after") -> list[float]:
    """The same against the 16-bit base, each in per cent of its loss."""
    losses = {one["seed"]: one[key] for one in runs if one["task"] == task and one["base"] == "bf16"}
    seeds = sorted(one["seed"] for one in runs if one["task"] == task and one["base"] == base and one["seed"] in losses)
    return [100 * nats / losses[seed] for nats, seed in zip(paired(runs, task, base, "bf16", key), seeds, strict=True)]


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each task and base: means and standard errors over seeds, differences to the 16-bit base."""
    entries = []
    for task in dict.fromkeys(one["task"] for one in runs):
        for base in (base for base in BASES if any((one["task"], one["base"]) == (task, base) for one in runs)):
            own = [one for one in runs if (one["task"], one["base"]) == (task, base)]
            entry: dict[str, Any] = {"task": task, "base": base, "seeds": len(own), "rows": own[0]["rows"]}
            for key in ("before", "after", "exact_match"):
                entry[key] = mean_and_stderr([one[key] for one in own])
            if base != "bf16" and in_percent(runs, task, base):
                entry["before_percent"] = mean_and_stderr(in_percent(runs, task, base, "before"))
                entry["after_percent"] = mean_and_stderr(in_percent(runs, task, base))
                entry["after_nats"] = mean_and_stderr(paired(runs, task, base, "bf16"))
            entries.append(entry)
    return entries


def verdict(values: Sequence[float], limit: float, unit: str) -> str:
    """Whether the mean lies below `limit`, by two standard errors or not to be told."""
    if not values:
        return "not measured"
    mean, stderr = mean_and_stderr(values)
    if math.isnan(stderr):
        return f"not to be told from one seed ({mean:+.4g} {unit})"
    answer = "yes" if mean + 2 * stderr < limit else "no" if mean - 2 * stderr > limit else "within the error"
    return f"{answer} ({mean:+.4g} ± {stderr:.2g} {unit})"


def markdown(result: dict[str, Any]) -> str:
    """bench/results/quality.md."""

    def cell(pair: tuple[float, float] | None, digits: int, scale: float = 1, sign: str = "") -> str:
        if pair is None:
            return ""
        error = "" if math.isnan(pair[1]) else f" ± {pair[1] * scale:.{digits}f}"
        return f"{pair[0] * scale:{sign}.{digits}f}{error}"

    runs, lines = result["runs"], ["# Quality by the base's precision", "", "```", (__doc__ or "").strip(), "```", ""]
    facts = [f"{key} {value}" for key, value in result["machine"].items()]
    lines += [f"{', '.join(facts)}. {result['command']}: {len(runs)} runs in {result['seconds']:.0f} s.", ""]
    lines += ["Held-out nats per supervised token; ± is the standard error over seeds.", ""]
    rows = []
    for entry in result["summary"]:
        losses = [cell(entry["before"], 4), cell(entry["after"], 4), cell(entry["exact_match"], 1, 100)]
        over = [cell(entry.get(f"{when}_percent"), 2, 1, "+") for when in ("before", "after")]
        nats = cell(entry.get("after_nats"), 4, 1, "+")
        rows.append([entry["task"], entry["base"], entry["seeds"], entry["rows"], *losses, *over, nats])
    head = ["task", "base", "seeds", "rows", "before", "after", "exact match %"]
    head += ["before, % over bf16", "after, % over bf16", "after, nats over bf16"]
    lines += [table(head, rows), ""]
    for task in dict.fromkeys(one["task"] for one in runs):
        within = verdict(in_percent(runs, task, "fp8"), BAR_PERCENT, "%")
        below = verdict(paired(runs, task, "fp8", "nf4"), 0, "nats")
        lines += [f"- {task}: after tuning, fp8 less than {BAR_PERCENT} % above bf16: {within}"]
        lines += [f"- {task}: after tuning, fp8 below nf4: {below}"]
    lines += ["", "`yes` and `no` lie two standard errors from the limit: with three seeds, 91 % sure of the side."]
    lines += [f"- failed: {error}" for error in result["errors"]]
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", type=Path, metavar="FILE", help="write the chats to this file and exit")
    parser.add_argument("--chats", type=Path, metavar="FILE", help="needed for the task chats")
    parser.add_argument("--model", type=Path, default=smollm2.DEFAULT_FOLDER, metavar="FOLDER")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="make FOLDER from this file, without a network")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--limit", type=int, help="number of rows of each task, for a quick try")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="for quality.json and quality.md")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the config, for all runs")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.prepare:
        prepare(args.prepare)
        return 0
    if "chats" in args.tasks and args.chats is None:
        raise SystemExit("--chats FILE is needed (made by --prepare FILE), or --tasks demo")
    started = time.perf_counter()
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // args.processes)))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, cores // args.processes)))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "solotune-quality-inductor"))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model = model_folder(args.model, args.gguf)
    with tempfile.TemporaryDirectory(prefix="solotune-quality-") as scratch:
        sources = {"demo": TICKETS, "chats": args.chats}
        rows = {task: thinned(sources[task], args.limit, Path(scratch) / f"{task}.jsonl") for task in args.tasks}
        order = [Run(task, base, seed) for seed in args.seeds for task in args.tasks for base in args.bases]
        todo = [
            (run, keys_of(run, model, *rows[run.task], args.steps, Path(scratch) / "-".join(map(str, run))))
            for run in order
        ]
        runs, errors = measure_all(todo, args.set, args.processes)
    result = {
        "command": "`python -m bench.quality {}`".format(" ".join(Path(word).name for word in sys.argv[1:])),
        "machine": {**machine("torch", "transformers", "bitsandbytes"), "card": runs[0]["card"] if runs else "unknown"},
        "seconds": round(time.perf_counter() - started, 1),
        "settings": {"steps": args.steps, "limit": args.limit, "common": COMMON, "tasks": TASKS, "set": args.set},
        "summary": summarise(runs),
        "runs": runs,
        "errors": errors,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, ensure_ascii=False).replace("NaN", "null")
    (args.out / "quality.json").write_text(text + "\n", encoding="utf-8")
    (args.out / "quality.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result).split("```")[-1])
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
