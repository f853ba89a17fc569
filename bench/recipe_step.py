"""Tokens per second, peak memory and load time of the walkthrough's recipe on full rows of random tokens.

    python -m bench.recipe_step MODEL_FOLDER [--steps 6] [--chats FILE] [--profile] [key=value ...]

The config is `examples/walkthrough.yaml` with overrides; model, optimizer, schedule and step are the product's own.
Full rows of 2,048 tokens, every one supervised: no padding flatters or hurts, and whoever measures another trainer
beside it needs no data set. The first two steps are left out of the median. `--profile` adds where the GPU's time of
one more step goes. `--chats` takes real rows out of a file instead, packed, and tokens are those of the rows alone.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from solotune import dataset, environment, training
from solotune.batch import Batch, collate, collate_packs
from solotune.config import RunConfig, load_config
from solotune.dataset import Example
from solotune.model import load_model
from solotune.passes import Passes

RECIPE = Path(__file__).parent.parent / "examples" / "walkthrough.yaml"


def random_tokens(count: int, length: int) -> list[Example]:
    """Full rows of ids from 1,000 to 120,000, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 120000, (count, length), generator=generator).numpy().astype(np.int32)
    return [Example(row, np.ones(length, dtype=bool), f"random:{i}", []) for i, row in enumerate(ids)]


def random_batches(config: RunConfig, steps: int, device: torch.device) -> Callable[[int], list[Batch]]:
    """The micro-batches of a step: rows of random tokens."""
    size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    rows = random_tokens(size * accumulation * steps, config.max_length)

    def batches(step: int) -> list[Batch]:
        first = step * size * accumulation
        return [collate(rows[first + i * size : first + (i + 1) * size], device) for i in range(accumulation)]

    return batches


def chat_batches(config: RunConfig, device: torch.device) -> tuple[Callable[[int], list[Batch]], int]:
    """The same for the packed rows of the config's data, and how many whole steps they make."""
    rows = dataset.prepare(config, dataset.load_tokenizer(config)).train
    packs, shape = training.packs_of(config, rows)
    schedule = training.Schedule.of(config, len(packs))
    steps = list(schedule.steps(0))[:-1]

    def batches(step: int) -> list[Batch]:
        return [collate_packs([[rows[r] for r in packs[i]] for i in part], device, shape) for part in steps[step]]

    return batches, len(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--chats")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    machine = environment.probe()
    overrides = [f"model_name_or_path={args.model}", "gradient_accumulation_steps=2", *args.overrides]
    if args.chats:
        overrides += [
            f"dataset={args.chats}",
            "dataset_split=train",
            "packing=true",
            "validation_size=0",
            "num_train_epochs=1",
        ]
    config, _ = environment.settle(load_config(RECIPE, overrides), machine)
    device = torch.device(environment.device_of(config, machine))
    started = time.perf_counter()
    model = load_model(config, device, getattr(torch, environment.dtype_of(config)))
    torch.cuda.synchronize()
    load_seconds = time.perf_counter() - started
    base_bytes = torch.cuda.memory_allocated()
    load_peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    batches_of = random_batches(config, args.steps, device)
    if args.chats:
        batches_of, args.steps = chat_batches(config, device)
    optimizer = training.make_optimizer(config, [model.joined])
    model.module.train()
    passes = Passes(model, config)
    seconds, speeds, losses = [], [], []

    def run(step: int) -> None:
        torch.cuda.synchronize()
        started = time.perf_counter()
        batches = batches_of(step)
        loss = training.train_step(model, batches, optimizer, config.max_grad_norm, passes=passes).loss
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        speeds.append(sum(batch.num_tokens for batch in batches) / seconds[-1])
        losses.append(round(loss, 4))

    for step in range(args.steps):
        run(step)
    settled = slice(min(2, args.steps - 1), None)
    result = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "trainable": model.num_trainable,
        "load_seconds": round(load_seconds, 1),
        "load_peak_gib": round(load_peak / 2**30, 2),
        "base_gib": round(base_bytes / 2**30, 2),
        "first_step_seconds": round(seconds[0], 1),
        "step_seconds": round(statistics.median(seconds[settled]), 3),
        "tokens_per_second": round(statistics.median(speeds[settled])),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "losses": losses,
    }
    print(json.dumps(result), flush=True)
    if args.profile:
        print(json.dumps(kernel_times(lambda: run(args.steps - 1))), flush=True)


KINDS = {
    "attention": "flash|fmha|cudnn|attention",
    "gemm": "gemm|cutlass|nvjet|xmma|wgmma|splitK",
    "nf4": "kDequantize|dequantize",
    "optimizer": "kOptimizer|multi_tensor|adam",
    "element-wise": "triton|elementwise|reduce|copy|cat|index|Memcpy|Memset",
}


def kernel_times(step: Callable[[], None]) -> dict[str, Any]:
    """Milliseconds of one step by kind of kernel, the time no kernel ran, and the kernels that took longest."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        step()
        whole = 1e3 * (time.perf_counter() - started)
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    kinds: dict[str, float] = {}
    for event in events:
        kind = next((kind for kind, names in KINDS.items() if re.search(names, event.key)), "other")
        kinds[kind] = kinds.get(kind, 0) + event.self_device_time_total / 1e3
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:30]
    return {
        "step_ms": round(whole, 1),
        **{f"{kind}_ms": round(ms, 1) for kind, ms in kinds.items()},
        "no_kernel_ms": round(whole - sum(kinds.values()), 1),
        "longest": [f"{e.self_device_time_total / 1e3:.1f} ms, {e.count} x {e.key[:90]}" for e in longest],
    }


if __name__ == "__main__":
    main()
