"""Predicted and measured peak memory and step time of many configs, on this machine's GPU.

    python -m bench.plan_runs [--only TEXT ...] [--workers 8] [--out FOLDER] [--steps 4]

Each case is a model's shape, the walkthrough's config with overrides, and full rows of random tokens. Settling, plan,
model, optimizer and step are the product's own; only the weights are made on the GPU and the rows in memory, instead of
being read from files (`bench.recipe_step` measures a whole run). Two passes:

1. in parallel: the plan of each case, and two steps of the same model with one layer, which fills the compiler's cache;
2. one process a model, one case after another, alone on the GPU: load, `--steps` steps, peak and median.

Writes `plan_runs.jsonl` (a line a case) and `plan_runs.md` (a table, and median and worst errors) into FOLDER.
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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from solotune.training.optimizer import make_optimizer

RECIPE = Path(__file__).parent.parent / "examples" / "walkthrough.yaml"
ALL = "lora_target_modules=all-linear"
KEEP, REDO = "gradient_checkpointing=false", "gradient_checkpointing=true"
CODES, MIRROR = "base_residency=quantized", "base_residency=dequantized"
BF16, FP8 = "base_precision=bf16", "base_precision=fp8"


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocab: int, tied: bool, **more: Any):
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv, "max_position_embeddings": 131072}
    names = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2}
    return {**names, **sizes, **attention, "tie_word_embeddings": tied, **more}


QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 128}
MODELS: dict[str, dict[str, Any]] = {
    "135M": _llama(576, 1536, 30, 9, 3, 49152, True),
    "0.5B": _llama(896, 4864, 24, 14, 2, 151936, True, **QWEN2),
    "1B": _llama(2048, 8192, 16, 32, 8, 128256, True, head_dim=64),
    "1.7B": _llama(2048, 6144, 28, 16, 8, 151936, True, **QWEN3),
    "3B": _llama(3072, 8192, 28, 24, 8, 128256, True, head_dim=128),
    "8B": _llama(4096, 14336, 32, 32, 8, 128256, False, head_dim=128),
}


class Case(NamedTuple):
    model: str
    rows: int
    tokens: int
    overrides: tuple[str, ...]
    learned: float = 1.0  # share of each row's tokens, at its end

    @property
    def name(self) -> str:
        words = (f"{self.rows}x{self.tokens}", *self.overrides, *([f"learned={self.learned}"] * (self.learned < 1)))
        return f"{self.model} {' '.join(words)}"


def _cases() -> Iterator[Case]:
    def of(model: str, shape: str, *overrides: str, learned: float = 1.0) -> Case:
        rows, tokens = map(int, shape.split("x"))
        return Case(model, rows, tokens, overrides, learned)

    yield of("135M", "8x512", KEEP, MIRROR, ALL)
    yield of("135M", "4x2048", KEEP, BF16, ALL)
    yield of("135M", "1x8192", KEEP, BF16)
    yield of("135M", "16x2048", REDO, CODES, ALL)
    yield of("135M", "8x2048", KEEP, BF16, ALL, "lora_r=64")
    yield of("135M", "4x1024", KEEP, BF16, "torch_compile=false")
    yield of("0.5B", "4x2048", KEEP, MIRROR)
    yield of("0.5B", "8x2048", KEEP, BF16, ALL)
    yield of("0.5B", "2x4096", KEEP, FP8, ALL)
    yield of("0.5B", "16x512", REDO, CODES, learned=0.3)
    yield of("1B", "4x2048", KEEP, MIRROR)
    yield of("1B", "8x2048", KEEP, FP8, ALL)
    yield of("1B", "1x16384", KEEP, BF16)
    yield of("1B", "8x1024", CODES, ALL, "lora_r=64", "gradient_checkpointing=8")
    yield of("1.7B", "4x2048", KEEP, MIRROR)
    yield of("1.7B", "2x4096", REDO, BF16, ALL)
    yield of("1.7B", "16x512", KEEP, FP8, learned=0.3)
    yield of("3B", "4x2048", KEEP, CODES)
    yield of("3B", "4x2048", KEEP, BF16, ALL)
    yield of("3B", "1x8192", KEEP, FP8)
    yield of("3B", "4x2048", "memory_budget=8GiB")
    yield of("8B", "4x2048", REDO, CODES)
    yield of("8B", "4x2048", KEEP, MIRROR)
    yield of("8B", "4x2048", KEEP, MIRROR, ALL)
    yield of("8B", "4x2048", KEEP, FP8)
    yield of("8B", "4x2048", KEEP, FP8, ALL)
    yield of("8B", "4x2048", "memory_budget=9.5GiB")
    yield of("8B", "4x2048", "memory_budget=16GiB", ALL)
    yield of("8B", "4x2048", "memory_budget=24GiB")
    yield of("8B", "4x2048", "memory_budget=40GiB")
    yield of("8B", "4x2048", "memory_budget=60GiB", BF16, ALL)
    yield of("8B", "4x2048", "memory_budget=24GiB", FP8)
    yield of("8B", "1x16384", "memory_budget=24GiB", ALL, "lora_r=32")
    yield of("8B", "1x16384", KEEP, FP8)
    yield of("8B", "16x512", KEEP, CODES, learned=0.3)
    yield of("8B", "4x2048", REDO, CODES, "optim=adamw_torch", "lora_dropout=0.0")


CASES = list(_cases())


def config_of(case: Case, folder: Path, layers: int | None = None) -> Any:
    """The case's config, on a folder that has config.json alone."""
    from solotune.config.load import load_config

    path = folder / f"{case.model}-{layers or 'all'}"
    path.mkdir(exist_ok=True)
    sizes = {**MODELS[case.model], **({"num_hidden_layers": layers} if layers else {})}
    (path / "config.json").write_text(json.dumps({**sizes, "dtype": "bfloat16"}))
    mine = [f"model_name_or_path={path}", f"per_device_train_batch_size={case.rows}", f"max_length={case.tokens}"]
    defaults = ["gradient_checkpointing=auto", "gradient_accumulation_steps=2"]
    return load_config(RECIPE, [*defaults, *mine, *case.overrides])


def plan_of(case: Case, folder: Path) -> tuple[Any, Any]:
    """(the plan, for this machine's card as if it were empty; the config settled for the machine)."""
    from dataclasses import replace

    from solotune.hardware import machine as environment
    from solotune.planning import plan_inputs, planner

    machine = environment.probe()
    machine = replace(machine, gpu_free_bytes=machine.gpu_bytes)  # the others that warm up are gone by then
    config, _ = environment.resolve_for_machine(config_of(case, folder), machine)
    card, free = plan_inputs.card_here(machine, config.use_cpu)
    work = replace(planner.full_rows(config.batches), supervised_share=case.learned)
    return planner.make_plan(config, plan_inputs.shapes_of(), card, work, free), config


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


def make_weights_here() -> None:
    """Lets `load_model` take random tensors that are made on the GPU for those of a checkpoint."""
    import torch

    from solotune.model import loading
    from solotune.model.weights import TensorMatch

    shapes: dict[str, torch.Size] = {}

    def match(module: Any, files: Any) -> TensorMatch:
        shapes.clear()
        tied = set(module.all_tied_weights_keys)
        shapes.update({k: t.shape for k, t in module.state_dict(keep_vars=True).items() if k not in tied})
        return TensorMatch({name: name for name in shapes})

    def read(files: Any, match: Any, dtype: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in shapes.items():
            make = torch.ones if len(shape) == 1 else torch.randn
            tensor = make(shape, device="cuda", dtype=torch.bfloat16)
            yield name, tensor if len(shape) == 1 else tensor.mul_(0.02)

    loading.weight_files, loading.unread_files = (lambda folder: []), (lambda folder, files: [])
    loading.match_names, loading.read_tensors = match, read


def run(case: Case, config: Any, steps: int) -> dict[str, Any]:
    """Loads, trains `steps` steps, and says what it took."""
    import torch

    from solotune.dataset.collate import collate
    from solotune.hardware import machine as environment
    from solotune.model.loading import load_model
    from solotune.training import loop
    from solotune.training.forward_backward import MicroBatchRunner

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
    size, accumulation = case.rows, config.gradient_accumulation_steps
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
    }


def predict(case: Case, folder: Path) -> dict[str, Any]:
    """First pass of a case: its plan; and the compiler's cache filled by two steps of one layer."""
    plan, _ = plan_of(case, folder)
    keys = ("gradient_checkpointing", "base_residency", "base_precision", "activation_offload")
    found = {"case": case.name, "predicted": plan.to_json(), "settled": {k: getattr(plan.resolved, k) for k in keys}}
    if plan.resolved.torch_compile:
        make_weights_here()
        depth = MODELS[case.model]["num_hidden_layers"]
        wanted = plan.resolved.gradient_checkpointing
        kinds = [True, False] if not isinstance(wanted, bool) and 0 < wanted < depth else [bool(wanted)]
        for is_checkpointed in kinds:
            knobs = {**found["settled"], "gradient_checkpointing": is_checkpointed}
            run(case, settled_config(case, folder, knobs, layers=1), 2)
    return found


def measure(cases: Iterable[Case], folder: Path, steps: int) -> Iterator[dict[str, Any]]:
    """Second pass: the cases of one model, in this process."""
    import torch

    make_weights_here()
    for case in cases:
        before = json.loads((folder / f"{CASES.index(case)}.json").read_text())
        config = settled_config(case, folder, before["settled"])
        try:
            yield {**before, "measured": run(case, config, steps)}
        except torch.OutOfMemoryError as error:
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
    return "\n".join(lines) + "\n"


def _child(mode: str, numbers: list[int], folder: Path, steps: int) -> Iterator[str]:
    """The lines that a process of its own prints, as they come."""
    command = [sys.executable, "-m", "bench.plan_runs", "--child", mode, "--folder", str(folder), "--steps", str(steps)]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(
            [*command, *map(str, numbers)], stdout=subprocess.PIPE, stderr=errors, text=True
        ) as child:
            yield from child.stdout or ()
        if child.returncode:
            errors.seek(0)
            print(f"case {numbers}: {errors.read().strip()[-1500:]}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="only cases with one of these texts in their names")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--child", choices=["predict", "measure"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("numbers", nargs="*", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "predict":
        for number in args.numbers:
            (args.folder / f"{number}.json").write_text(json.dumps(predict(CASES[number], args.folder)))
        return
    if args.child == "measure":
        for result in measure([CASES[number] for number in args.numbers], args.folder, args.steps):
            print(json.dumps(result), flush=True)
        return
    chosen = [i for i, case in enumerate(CASES) if any(text in case.name for text in args.only)]
    if args.list:
        print("\n".join(CASES[number].name for number in chosen))
        return
    folder = Path(tempfile.mkdtemp(prefix="plan-runs-"))
    started = time.perf_counter()
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda number: list(_child("predict", [number], folder, args.steps)), chosen))
    print(f"planned and compiled in {time.perf_counter() - started:.0f} s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    with open(args.out / "plan_runs.jsonl", "w", encoding="utf-8") as file:
        for model in dict.fromkeys(CASES[number].model for number in reversed(chosen)):
            ready = [n for n in chosen if CASES[n].model == model and (folder / f"{n}.json").is_file()]
            for line in _child("measure", ready, folder, args.steps) if ready else ():
                if line.startswith("{"):
                    results.append(json.loads(line))
                    file.write(line)
                    file.flush()
            print(f"{model} measured after {time.perf_counter() - started:.0f} s", flush=True)
    text = summary(results)
    (args.out / "plan_runs.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
