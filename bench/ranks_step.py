"""Tokens per second and memory of a model's shape on the GPUs of one machine, its base whole on each or in parts.

    torchrun --standalone --nproc-per-node=2 -m bench.ranks_step 70B 4x2048 base_precision=fp8 base_sharding=true
    python -m bench.ranks_step 70B 4x2048 base_precision=fp8 base_offload=true                  one GPU, to compare with
    ... [--steps 6] [key=value ...]

The model is one of `bench.plan_cases`, its weights are random and made on each GPU (the same on all), the rows are full
and random; config, model, optimizer and step are the product's own. Each rank has two micro-batches a step. If not
given: all layers checkpointed, 4-bit weights not unpacked, the base on the card. Prints one JSON object; the step is
the median of those after the first two, which compile and record.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.plan_cases import MODELS, Case
from bench.plan_runs import config_of, make_weights_here, random_rows
from solotune.runtime.world import World, joined

GIVEN = ("gradient_checkpointing=true", "base_offload=false")
NUM_WARM_UP = 2


def share_of(case: Case, config: Any, world: World, device: Any, step: int) -> Any:
    """This rank's micro-batches of a step, and the counts of the whole step."""
    from solotune.dataset.collate import collate, num_labels
    from solotune.training.step_share import StepShare

    size, count = config.per_device_train_batch_size, config.gradient_accumulation_steps
    rows = random_rows(case, size * count * world.size)
    numbers = range(world.rank * count, (world.rank + 1) * count)
    batches = [collate(rows[i * size : (i + 1) * size], device) for i in numbers]
    tokens, labels = sum(len(row.input_ids) for row in rows), sum(map(num_labels, rows))
    return StepShare(batches, numbers, rows, tokens, labels, sum(row.total_weight for row in rows), world)


def measure(case: Case, config: Any, world: World, steps: int) -> dict[str, Any]:
    import torch

    from solotune.hardware import machine as environment
    from solotune.hardware.device_memory import peak_bytes
    from solotune.model.loading import load_model
    from solotune.training import loop
    from solotune.training.forward_backward import MicroBatchRunner
    from solotune.training.optimizer import make_optimizer

    device = torch.device("cpu" if config.use_cpu else "cuda")
    torch.manual_seed(0)  # the same weights on all ranks
    started = time.perf_counter()
    model = load_model(config, device, getattr(torch, environment.dtype_of(config.bf16)), world=world)
    load_seconds, loaded = time.perf_counter() - started, peak_bytes(device)
    if not config.use_cpu:
        torch.cuda.reset_peak_memory_stats()
    optimizer = make_optimizer(config.optimizer, [model.flat_params])
    model.module.train()
    runner, seconds, losses = MicroBatchRunner(model, config.takes_graphs), [], []
    for step in range(steps):
        share = share_of(case, config, world, device, step)
        started = time.perf_counter()
        result = loop.train_step(
            model, share.batches, optimizer, config.max_grad_norm, (0, step), runner, share
        )  # it waits for the device
        seconds.append(time.perf_counter() - started)
        losses.append(round(result.loss, 4))
    step_seconds = statistics.median(seconds[NUM_WARM_UP:])
    peaks = world.all_gather([loaded, peak_bytes(device)])
    found = {
        "case": case.name,
        "card": "CPU" if config.use_cpu else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ranks": world.size,
        "load_seconds": round(load_seconds, 1),
        "step_seconds": round(step_seconds, 3),
        "tokens_per_second": round(share.num_tokens / step_seconds),
        "tokens_per_second_each": round(share.num_tokens / step_seconds / world.size),
        "peak_gib": [round(peak / 2**30, 2) for _, peak in peaks],
        "peak_gib_loading": [round(peak / 2**30, 2) for peak, _ in peaks],
        "device_gib": round(model.ring.num_bytes_on_device / 2**30, 2) if model.ring else None,  # parts and ring
        "graphs": runner.unsupported_reason or bool(runner._graphs),
        "losses": losses,
    }
    if model.shared is not None:
        model.shared.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("rows", help="of a micro-batch, and their tokens: 4x2048")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    from solotune.api import ranks
    from solotune.hardware import machine as environment

    rows, tokens = map(int, args.rows.split("x"))
    shares = "base_sharding=true" in args.overrides
    given = [*GIVEN, "base_residency=quantized"] if not shares else GIVEN[:1]
    case, world = Case(args.model, rows, tokens, tuple(args.overrides)), World.of_environment(os.environ)
    with tempfile.TemporaryDirectory(prefix="ranks-step-") as folder, joined(world, ranks.departure_of):
        config = config_of(case._replace(overrides=(*given, *args.overrides)), Path(folder))
        config, _ = environment.resolve_for_machine(config, environment.probe())
        ranks.start(world, config, resume=False)
        make_weights_here()
        found = measure(case, config, world, args.steps)
        world.disconnect()
    if world.is_owner:
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
