"""Tokens per second, peak memory and load time of the walkthrough's recipe on full rows of random tokens.

    python -m bench.recipe_step MODEL_FOLDER [--steps 6] [key=value ...]

The config is `examples/walkthrough.yaml` with overrides; model, optimizer, schedule and step are the product's own.
Full rows of 2,048 tokens, every one supervised: no padding flatters or hurts, and whoever measures another trainer
beside it needs no data set. The first two steps are left out of the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from solotune import environment, training
from solotune.batch import collate
from solotune.config import load_config
from solotune.dataset import Example
from solotune.model import load_model

RECIPE = Path(__file__).parent.parent / "examples" / "walkthrough.yaml"


def random_tokens(count: int, length: int) -> list[Example]:
    """Full rows of ids from 1,000 to 120,000, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 120000, (count, length), generator=generator).numpy().astype(np.int32)
    return [Example(row, np.ones(length, dtype=bool), f"random:{i}", []) for i, row in enumerate(ids)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    machine = environment.probe()
    overrides = [f"model_name_or_path={args.model}", "gradient_accumulation_steps=2", *args.overrides]
    config, _ = environment.settle(load_config(RECIPE, overrides), machine)
    device = torch.device(environment.device_of(config, machine))
    started = time.perf_counter()
    model = load_model(config, device, getattr(torch, environment.dtype_of(config)))
    torch.cuda.synchronize()
    load_seconds = time.perf_counter() - started
    base_bytes = torch.cuda.memory_allocated()
    load_peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    rows = random_tokens(size * accumulation * args.steps, config.max_length)
    optimizer = training.make_optimizer(config, model.trainable)
    model.module.train()
    seconds, losses = [], []
    for step in range(args.steps):
        torch.cuda.synchronize()
        started = time.perf_counter()
        first = step * size * accumulation
        batches = [collate(rows[first + i * size : first + (i + 1) * size], device) for i in range(accumulation)]
        loss, _, _ = training.train_step(model, batches, optimizer, config.max_grad_norm)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(round(loss, 4))
    step_seconds = statistics.median(seconds[2:])
    result = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "trainable": model.num_trainable,
        "load_seconds": round(load_seconds, 1),
        "load_peak_gib": round(load_peak / 2**30, 2),
        "base_gib": round(base_bytes / 2**30, 2),
        "first_step_seconds": round(seconds[0], 1),
        "step_seconds": round(step_seconds, 3),
        "tokens_per_second": round(size * accumulation * config.max_length / step_seconds),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "losses": losses,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
