"""Tokens per second and peak memory of the walkthrough's recipe on full rows, as `solotune train` runs it.

    python -m bench.recipe_step MODEL_FOLDER                               # rows of README's and engine.md's tables
    python -m bench.recipe_step MODEL_FOLDER --targets all
    python -m bench.recipe_step MODEL_FOLDER --base-precision fp8
    python -m bench.recipe_step MODEL_FOLDER --base-precision fp8 --targets all
    python -m bench.recipe_step MODEL_FOLDER --memory-budget 9GiB
    python -m bench.recipe_step MODEL_FOLDER --chats chats.jsonl           # real rows, packed, one epoch
    ... [--steps 6] [--json] [--profile] [key=value ...]
    torchrun --standalone --nproc-per-node=2 -m bench.recipe_step MODEL_FOLDER [base_sharding=true]

Every figure comes out of one call of `solotune.train`: the config is `examples/walkthrough.yaml` with overrides, two
micro-batches a step, and the rows are read, the plan made, the model loaded, the preflight run and the steps timed as
in any other run. Nothing is held out and no checkpoint is saved.

The rows are random words in a file of plain text, one row longer than `max_length` tokens, so that each is cut to
exactly `max_length` tokens, all supervised: no padding flatters or hurts, and another trainer can be measured beside it
without a data set. Figures are medians over the steps after the first two, which compile and record.

Under torchrun a step has twice the rows on two GPUs: tokens per second are those of all, memory is that of the first,
which prints. `bench.scaling` compares such a run with one on each card.

`--chats` takes rows out of a file instead; tokens are then those of the rows alone, without padding. `--profile` runs
one more step and says where the GPU's time went in it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import statistics
import string
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.machine import table
from bench.plan_cases import RECIPE
from solotune.config.load import load_config
from solotune.display.progress import SilentDisplay
from solotune.runtime.world import World

if TYPE_CHECKING:
    from solotune.run.events import StepEvent

COMMON = ("gradient_accumulation_steps=2", "validation_size=0", "save_strategy=no")
CHATS = ("packing=true", "num_train_epochs=1")
STEPS, NUM_WARM_UP = 6, 2


def world() -> World:
    """The ranks that torchrun has started."""
    return World.of_environment(os.environ)


def write_full_rows(path: Path, count: int, max_length: int) -> None:
    """Rows of `max_length` random words, the same on every call.

    A word is one token or more, and a bos or eos comes on top, so no row has fewer than `max_length` tokens.
    """
    generator = random.Random(0)

    def word() -> str:
        return "".join(generator.choices(string.ascii_lowercase, k=generator.randint(2, 8)))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps({"text": " ".join(word() for _ in range(max_length))}) + "\n")


def recipe_overrides(args: argparse.Namespace) -> list[str]:
    """What the command line changes in the recipe, all but where rows and run lie; the user's own keys come last."""
    keys = [f"model_name_or_path={args.model}", *COMMON]
    if args.chats:
        keys += CHATS
    if args.steps or not args.chats:
        keys.append(f"max_steps={(args.steps or STEPS) + args.profile}")
    if args.base_precision:
        keys.append(f"base_precision={args.base_precision}")
    if args.targets == "all":
        keys.append("lora_target_modules=all-linear")
    if args.memory_budget:
        keys.append(f"memory_budget={args.memory_budget}")
    return [*keys, *args.overrides]


def with_rows(args: argparse.Namespace, folder: Path) -> list[str]:
    """The overrides of the whole run: `recipe_overrides` and its rows, which are written into `folder`."""
    overrides = recipe_overrides(args)
    if args.chats:
        return [*overrides, f"dataset={args.chats}", "dataset_split=train"]
    config = load_config(RECIPE, overrides)
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * world().size
    write_full_rows(folder / "rows.jsonl", rows_per_step * config.max_steps, config.max_length)
    return [*overrides, f"dataset={folder / 'rows.jsonl'}", "dataset_split=train"]


class Clock(SilentDisplay):
    """Keeps what a run tells while it works: its steps, when each phase began, and the kernels of one step."""

    def __init__(self, profile_from_end: int | None) -> None:
        """Args:
        profile_from_end: the step to profile, 0 for the last; None for none.
        """
        self.steps: list[StepEvent] = []
        self.phase_seconds: dict[str, float] = {}
        self.kernels: dict[str, Any] | None = None
        self._from_end = profile_from_end
        self._phase, self._since = "", time.perf_counter()
        self._profiler: Any = None

    def phase(self, name: str) -> None:
        now = time.perf_counter()
        self.phase_seconds[self._phase] = now - self._since
        self._phase, self._since = name, now
        print(name, file=sys.stderr, flush=True)

    def begin(self, total_steps: int, done: int = 0) -> None:
        self.phase("training")

    def step(self, metrics: StepEvent) -> None:
        self.steps.append(metrics)
        print(f"step {metrics.step}: {metrics.tokens_per_second:,.0f} tokens/s", file=sys.stderr, flush=True)
        if self._profiler is not None:
            self.kernels = kernel_times(self._profiler, metrics.step_seconds)
            self._profiler = None
        elif self._from_end is not None and metrics.total_steps - metrics.step == self._from_end + 1:
            self._profiler = start_profiler()


@dataclass(frozen=True)
class Measured:
    """What `solotune train` recorded, and the steps of it that count."""

    run: Path
    clock: Clock
    summary: dict[str, Any]
    choices: list[str]  # of machine, plan and loader
    timed: Sequence[StepEvent]

    def to_json(self) -> dict[str, Any]:
        import torch

        steps, on_cuda = self.clock.steps, self.summary["device"] == "cuda"
        predicted, tried = (self.read("plan.json")[part] for part in ("predicted", "preflight"))
        result = {
            "card": torch.cuda.get_device_name() if on_cuda else "CPU",
            "torch": torch.__version__,
            "ranks": world().size,
            "trainable": self.summary["trainable_parameters"],
            "load_seconds": round(self.clock.phase_seconds["loading model"], 1),
            "first_step_seconds": round(tried["first_step_seconds"] if tried else steps[0].step_seconds, 1),
            "step_seconds": round(statistics.median(step.step_seconds for step in self.timed), 3),
            "tokens_per_second": round(statistics.median(step.tokens_per_second for step in self.timed)),
            "peak_gib": round(max(step.peak_bytes for step in steps) / 2**30, 2),
            "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if on_cuda else None,
            "predicted": {
                "step_seconds": round(predicted["seconds"]["step"], 3),
                "tokens_per_second": round(predicted["tokens_per_second"]),
                "peak_gib": round(predicted["peak_bytes"] / 2**30, 2),
                "choices": predicted["choices"],
            },
            "choices": self.choices,
            "losses": [step.loss for step in steps],
            "grad_norms": [step.grad_norm for step in steps],
        }
        return {**result, **({"kernels": self.clock.kernels} if self.clock.kernels else {})}

    def read(self, name: str) -> Any:
        return json.loads((self.run / name).read_text(encoding="utf-8"))


def measure(args: argparse.Namespace, folder: Path) -> Measured | None:
    """One run of `solotune train`, with its rows and its files in `folder`; None on a rank that records nothing."""
    import torch

    import solotune

    if args.profile and not torch.cuda.is_available():
        raise SystemExit("--profile needs CUDA: it counts the time of kernels on a GPU")
    num_untimed = int(bool(args.chats))  # an epoch's last step may be shorter
    clock = Clock(num_untimed if args.profile else None)
    overrides = [*with_rows(args, folder), f"output_dir={folder / 'run'}"]
    result = solotune.train(RECIPE, overrides, display=clock)
    if not world().is_owner:
        return None
    whole = clock.steps[: max(1, len(clock.steps) - num_untimed - args.profile)]
    choices = [f"{choice.key}: {choice.value}" for choice in result.choices]
    found = Measured(result.run_dir, clock, result.summary, choices, whole[NUM_WARM_UP:])
    if not found.timed:
        raise SystemExit(f"{len(whole)} whole steps, of which the first {NUM_WARM_UP} do not count: more are needed")
    if not args.chats:
        require_full_rows(found)
    return found


def require_full_rows(found: Measured) -> None:
    """Raises SystemExit where a row has not exactly `max_length` tokens, so that padding would count as speed."""
    config, data = load_config(found.run / "config.yaml"), found.read("data.json")
    if data["tokens"]["total"] != data["rows"]["kept"] * config.max_length:
        raise SystemExit(f"rows of {config.max_length} tokens were meant; data.json has {data['tokens']}")


def start_profiler() -> Any:
    """A started profiler of the GPU's kernels."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CUDA])
    profiler.start()
    return profiler


KINDS = {
    "attention": "flash|fmha|cudnn|attention",
    "gemm": "gemm|cutlass|nvjet|xmma|wgmma|splitK",
    "nf4": "kDequantize|dequantize",
    "optimizer": "kOptimizer|multi_tensor|adam",
    "element-wise": "triton|elementwise|reduce|copy|cat|index|Memcpy|Memset",
}


def kernel_times(profiler: Any, step_seconds: float) -> dict[str, Any]:
    """Milliseconds of one step by kind of kernel, the time no kernel ran, and the kernels that took longest."""
    import torch

    torch.cuda.synchronize()
    profiler.stop()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    kinds: dict[str, float] = {}
    for event in events:
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "other")
        kinds[kind] = kinds.get(kind, 0) + event.self_device_time_total / 1e3
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:30]
    return {
        "step_ms": round(1e3 * step_seconds, 1),
        **{f"{kind}_ms": round(ms, 1) for kind, ms in kinds.items()},
        "no_kernel_ms": round(1e3 * step_seconds - sum(kinds.values()), 1),
        "longest": [f"{e.self_device_time_total / 1e3:.1f} ms, {e.count} x {e.key[:90]}" for e in longest],
    }


def command_of(arguments: Sequence[str]) -> str:
    """The command that gives a row, without the folders of this machine."""
    words = [Path(word).name if "=" not in word and "/" in word else word for word in arguments]
    ranks = world().size
    start = ["torchrun", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else ["python"]
    return shlex.join([*start, "-m", "bench.recipe_step", *(word for word in words if word != "--json")])


def table_row(result: dict[str, Any]) -> str:
    """A Markdown table of one row."""
    planned = result["predicted"]
    cells = {
        "command": f"`{result['command']}`",
        "tokens/s": result["tokens_per_second"],
        "peak GiB": round(result["peak_gib"], 1),
        "step s": result["step_seconds"],
        "planned: tokens/s": planned["tokens_per_second"],
        "planned: GiB": round(planned["peak_gib"], 1),
        "planned: step s": planned["step_seconds"],
        "the plan chose": ", ".join(f"{one['key']}: {one['value']}" for one in planned["choices"]) or "nothing",
    }
    cards = f"{result['ranks']} x {result['card']}" if result["ranks"] > 1 else result["card"]
    return f"{cards}, torch {result['torch']}\n\n{table(list(cells), [list(cells.values())])}"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder or hub id, with its tokenizer")
    parser.add_argument("--base-precision", choices=["nf4", "fp8"], help="default: nf4")
    parser.add_argument("--targets", choices=["qkvo", "all"], default="qkvo", help="linears with an adapter")
    parser.add_argument("--memory-budget", metavar="SIZE", help="such as 9GiB; default: the free memory of the GPU")
    parser.add_argument("--steps", type=int, help=f"default: {STEPS}; with --chats one epoch")
    parser.add_argument("--chats", metavar="FILE")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory(prefix="recipe-step-") as folder:
        if (found := measure(args, Path(folder))) is None:
            return
        result = {"command": command_of(arguments), **found.to_json()}
    if args.json:
        print(json.dumps(result), flush=True)
        return
    print(table_row(result))
    if args.profile:
        print(json.dumps(result["kernels"], indent=1), flush=True)


if __name__ == "__main__":
    main()
