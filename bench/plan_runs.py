"""Predicted and measured peak memory and step time of many configs, on this machine's GPU.

    python -m bench.plan_runs [--set resident|streamed|70B] [--only TEXT ...] [--workers 8] [--out FOLDER] [--steps 4]
    ... --limit          as on a card that has no more memory than the case's memory_budget: plan and process

Each case (`bench.plan_cases`) is a model's shape, the walkthrough's config with overrides, and full rows of random
tokens. Settling, plan, model, optimizer and step are the product's own; only the weights are made on the GPU and the
rows in memory, instead of being read from files (`bench.recipe_step` measures a whole run). Passes:

0. alone: the speed of the link to the GPU;
1. in parallel: the plan of each case, and two steps of the same model with one layer, which fills the compiler's cache;
2. one process a model, one case after another, alone on the GPU: load, `--steps` steps, peak and median.

Writes `plan_runs.jsonl` (a line a case) and `plan_runs.md` (a table, and median and worst errors) into FOLDER, both as
far as they are known after each case. On one H200 with 16 cores the set `streamed` should take 7 minutes, of which 1.5
are the plans (8 to 25 s a case of 8B: 4 to 18 loading, 3 to 5 compiling from the cache); `70B` 6 minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.made_weights import make_checkpoint, make_weights_here
from bench.plan_cases import CASES, MODELS, RECIPE, SETS, Case
from solotune.config.settings import MICRO_BATCH

SETTLED = ("gradient_checkpointing", "base_residency", "base_precision", "base_offload", "activation_offload")


def config_of(case: Case, folder: Path, layers: int | None = None) -> Any:
    """The case's config, on a folder with the model's shape and no weights (`bench.made_weights`)."""
    from solotune.config.load import load_config
    from solotune.config.run_config import RunConfig

    path = folder / f"{case.model}-{layers or 'all'}"
    make_checkpoint(path, {**MODELS[case.model], **({"num_hidden_layers": layers} if layers else {})})
    rows = [] if case.rows_are_open else ["gradient_accumulation_steps=2"]
    mine = [f"model_name_or_path={path}", f"per_device_train_batch_size={case.rows}", f"max_length={case.tokens}"]
    config = load_config(RECIPE, ["gradient_checkpointing=auto", *rows, *mine, *case.overrides])
    if not case.rows_are_open:
        return config
    sources = {key: source for key, source in config.sources.items() if key not in MICRO_BATCH}
    return RunConfig.validated(config.model_dump(), sources, config.name)


def plan_of(case: Case, folder: Path, shapes: Any, link: float | None, is_limited: bool = False) -> Any:
    """The plan, for this machine's card as if it were empty.

    Args:
        shapes: as of `plan_inputs.shapes_of`; it keeps the shapes that several cases share.
        link: bytes a second from host memory to the card; None: measured now.
        is_limited: as if the card had no more memory than the case's `memory_budget`.
    """
    from solotune.hardware import machine as environment
    from solotune.planning import plan_inputs
    from solotune.planning.constants import CONTEXT_BYTES
    from solotune.planning.planner import bytes_of

    machine = environment.probe()
    machine = replace(machine, gpu_free_bytes=machine.gpu_bytes)  # the others that warm up are gone by then
    config, _ = environment.resolve_for_machine(config_of(case, folder), machine)
    if is_limited:
        size = bytes_of(str(config.memory_budget))
        machine = replace(machine, gpu_bytes=size, gpu_free_bytes=size - CONTEXT_BYTES)
        config = config.replaced("a card of that size", memory_budget="auto")
    card, free = plan_inputs.card_here(machine, config.use_cpu)
    card = card if link is None else replace(card, link_bytes=link)
    return plan_on(card, config, case, shapes, free, machine.ram_free_bytes)


def plan_on(card: Any, config: Any, case: Case, shapes: Any, free: int | None, host: int | None) -> Any:
    """The plan of a case's config on a card: full rows, of which the case's share is learned."""
    from solotune.planning import planner

    def work(config: Any) -> Any:
        return replace(planner.full_rows(config.batches), supervised_share=case.learned)

    return planner.make_plan(config, shapes, card, work(config), free, host_free_bytes=host, workloads=work)


def settled_config(case: Case, folder: Path, knobs: dict[str, Any], layers: int | None = None) -> Any:
    """The case's config as a run would have it: settled for this machine, with what the plan chose."""
    from solotune.hardware import machine as environment

    config, _ = environment.resolve_for_machine(config_of(case, folder, layers), environment.probe())
    return config.replaced("plan", **knobs)


def random_rows(case: Case, count: int) -> list[Any]:
    from solotune.dataset import Example

    rng = np.random.default_rng(0)
    learned = np.arange(case.tokens) >= round(case.tokens * (1 - case.learned))
    top = MODELS[case.model]["vocab_size"]
    return [
        Example(rng.integers(10, top, case.tokens).astype(np.int32), learned, f"random:{i}", []) for i in range(count)
    ]


def run(case: Case, config: Any, steps: int) -> dict[str, Any]:
    """Loads, trains `steps` steps, and says what it took."""
    import torch

    from solotune.dataset.collate import collate
    from solotune.hardware import machine as environment
    from solotune.model.loading import load_model
    from solotune.training import loop
    from solotune.training.forward_backward import MicroBatchRunner
    from solotune.training.optimizer import make_optimizer

    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    device = torch.device("cuda")
    started = time.perf_counter()
    model = load_model(config, device, getattr(torch, environment.dtype_of(config.bf16)))
    torch.cuda.synchronize()
    load_seconds = time.perf_counter() - started
    loaded_bytes = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = make_optimizer(config.optimizer, [model.flat_params])
    model.module.train()
    size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    rows = random_rows(case, size * accumulation)
    runner, seconds = MicroBatchRunner(model, config.takes_graphs), []
    for step in range(steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        batches = [collate(rows[i * size : (i + 1) * size], device) for i in range(accumulation)]
        loop.train_step(model, batches, optimizer, config.max_grad_norm, (0, step), runner)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    step_seconds = statistics.median(seconds[1:])
    return {
        "load_seconds": load_seconds,
        "first_step_seconds": seconds[0],
        "step_seconds": step_seconds,
        "tokens_per_second": size * accumulation * case.tokens / step_seconds,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "loaded_bytes": loaded_bytes,
        "between_steps_bytes": torch.cuda.memory_allocated(),
        "host_bytes": sum(getattr(part, "num_bytes_on_host", 0) for part in vars(model).values()),
    }


def predict(case: Case, folder: Path, shapes: Any, is_limited: bool) -> dict[str, Any]:
    """First pass of a case: its plan; and the compiler's cache filled by two steps of one layer."""
    link = json.loads((folder / "link.json").read_text())
    plan = plan_of(case, folder, shapes, link, is_limited)
    settled = {key: getattr(plan.resolved, key) for key in (*SETTLED, *MICRO_BATCH)}
    found = {"case": case.name, "predicted": plan.to_json(), "settled": settled}
    if plan.resolved.torch_compile:
        make_weights_here()
        depth = MODELS[case.model]["num_hidden_layers"]
        wanted = plan.resolved.gradient_checkpointing
        kinds = [True, False] if not isinstance(wanted, bool) and 0 < wanted < depth else [bool(wanted)]
        for is_checkpointed in kinds:
            knobs = {**found["settled"], "gradient_checkpointing": is_checkpointed}
            run(case, settled_config(case, folder, knobs, layers=1), 2)
    return found


def limit_memory(card_bytes: int) -> None:
    """Let this process have as much memory as on a card of that size, in which CUDA itself takes a part, too."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    used_by_cuda = total - free - torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((card_bytes - used_by_cuda) / total)


def measure(cases: Iterable[Case], folder: Path, steps: int, is_limited: bool) -> Iterator[dict[str, Any]]:
    """Second pass: the cases of one model, in this process."""
    from solotune.hardware import machine as environment
    from solotune.planning.planner import bytes_of

    environment.probe()  # lets the allocator's segments grow, as in a run; it is too late once torch is loaded
    import torch

    from solotune.errors import DeviceError

    make_weights_here()
    for case in cases:
        before = json.loads((folder / f"{CASES.index(case)}.json").read_text())
        config = settled_config(case, folder, before["settled"])
        if is_limited:
            limit_memory(bytes_of(str(config.memory_budget)))
        try:
            yield {**before, "measured": run(case, config, steps)}
        except (torch.OutOfMemoryError, DeviceError) as error:
            yield {**before, "error": str(error).split("\n")[0]}


def errors_of(result: dict[str, Any]) -> tuple[float, float]:
    """Predicted less measured, as shares of the measured: (peak, step)."""
    predicted, measured = result["predicted"], result["measured"]
    step = predicted["seconds"]["step"] / measured["step_seconds"] - 1
    return predicted["peak_bytes"] / measured["peak_bytes"] - 1, step


def summary(results: list[dict[str, Any]]) -> str:
    """A Markdown table, and the errors' medians and extremes below it."""
    lines = ["| case | peak GiB: predicted | measured | error | tokens/s: predicted | measured | step error |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    found = []
    for result in results:
        if "measured" not in result:
            lines.append(f"| {result['case']} | {result.get('error', 'not run')} | | | | | |")
            continue
        peak, step = errors_of(result)
        found.append((peak, step))
        predicted, measured = result["predicted"], result["measured"]
        gib = [f"{part['peak_bytes'] / 2**30:.2f}" for part in (predicted, measured)]
        speed = [f"{part['tokens_per_second']:,.0f}" for part in (predicted, measured)]
        cells = [result["case"], *gib, f"{peak:+.1%}", *speed, f"{step:+.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    if found:
        peaks, steps = zip(*found, strict=True)
        worst = [f"{max(map(abs, some)):.1%}" for some in (peaks, steps)]
        median = [f"{statistics.median(map(abs, some)):.1%}" for some in (peaks, steps)]
        lines += [
            "",
            f"{len(found)} runs. Peak: median error {median[0]}, worst {worst[0]}, most under {min(peaks):+.1%}.",
        ]
        lines.append(f"Step: median error {median[1]}, worst {worst[1]}.")
        lines += _host_memory(results)
    return "\n".join(lines) + "\n"


def _host_memory(results: list[dict[str, Any]]) -> list[str]:
    """The worst error of pinned memory: streamed layers and offloaded inputs, without the embedding."""
    errors = []
    for result in results:
        if pinned := result.get("measured", {}).get("host_bytes"):
            planned = result["predicted"]["host_by_category"]
            errors.append((planned["layers"] + planned["activations"]) / pinned - 1)
    return [f"Pinned host memory: worst error {max(map(abs, errors)):.1%} of {len(errors)} runs."] if errors else []


def _child(mode: str, numbers: list[int], folder: Path, args: argparse.Namespace) -> Iterator[str]:
    """The lines that a process of its own prints, as they come."""
    command = [sys.executable, "-m", "bench.plan_runs", "--child", mode, "--folder", str(folder)]
    command += ["--steps", str(args.steps), *["--limit"] * args.limit]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            [*command, *map(str, numbers)], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child:
            yield from child.stdout or ()
        if child.returncode:
            errors.seek(0)
            print(f"case {numbers}: {errors.read().strip()[-1500:]}", file=sys.stderr, flush=True)


def _batches(numbers: list[int], workers: int) -> list[list[int]]:
    """Cases that share a process of the first pass: of one shape, so that it is computed once, and few."""
    groups: dict[Any, list[int]] = {}
    for number in numbers:
        case = CASES[number]
        of_shape = [word for word in case.overrides if word.startswith(("lora_", "base_precision=", "torch_compile="))]
        groups.setdefault((case.model, *sorted(of_shape)), []).append(number)
    size = -(-len(numbers) // workers)
    return [group[at : at + size] for group in groups.values() for at in range(0, len(group), size)]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, default="resident")
    parser.add_argument("--only", nargs="*", default=[""], help="only cases with one of these texts in their names")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--limit", action="store_true", help="limit the memory to the case's memory_budget")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--child", choices=["link", "predict", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("numbers", nargs="*", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_child(args: argparse.Namespace) -> None:
    """A process of one of the passes."""
    if args.child == "link":
        from solotune.hardware import link

        (args.folder / "link.json").write_text(json.dumps(link.host_to_device_bytes_per_second()))
    elif args.child == "predict":
        from solotune.planning import plan_inputs

        shapes = plan_inputs.shapes_of()
        for number in args.numbers:
            found = predict(CASES[number], args.folder, shapes, args.limit)
            (args.folder / f"{number}.json").write_text(json.dumps(found))
    else:
        for result in measure([CASES[number] for number in args.numbers], args.folder, args.steps, args.limit):
            print(json.dumps(result), flush=True)


def main() -> None:
    args = _arguments()
    if args.child:
        return _in_child(args)
    chosen = [i for i, c in enumerate(CASES) if c in SETS[args.set] and any(text in c.name for text in args.only)]
    if args.list:
        print("\n".join(CASES[number].name for number in chosen))
        return
    folder = Path(tempfile.mkdtemp(prefix="plan-runs-"))
    started = time.perf_counter()
    list(_child("link", [], folder, args))
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda some: list(_child("predict", some, folder, args)), _batches(chosen, args.workers)))
    print(f"planned and compiled in {time.perf_counter() - started:.0f} s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    with open(args.out / "plan_runs.jsonl", "w", encoding="utf-8") as file:
        for model in reversed(MODELS):
            ready = [n for n in chosen if CASES[n].model == model and (folder / f"{n}.json").is_file()]
            if not ready:
                continue
            for line in _child("measure", ready, folder, args):
                if line.startswith("{"):
                    results.append(json.loads(line))
                    file.write(line)
                    file.flush()
                    (args.out / "plan_runs.md").write_text(summary(results), encoding="utf-8")
            print(f"{model} measured after {time.perf_counter() - started:.0f} s", flush=True)
    print(summary(results))


if __name__ == "__main__":
    main()
