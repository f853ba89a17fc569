"""Losses, gradient norms and adapters of a streamed base beside those of a resident one, step by step, on one GPU.

    python -m bench.stream_bits [--model 8B] [--layers 8] [--steps 20] [--nondeterministic]

The widths are those of a real model; its weights are random. Every base precision is trained four times from the same
seed: resident, resident again, streamed, and streamed with the activations in host memory too. Without the second run
equal bits would show nothing. Attention's backward adds in any order unless PyTorch's deterministic algorithms are on,
so they are; cuDNN's attention, which compiled layers take on Hopper cards, has no such algorithm, and its noise stays.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.made_weights import make_weights_here
from bench.plan_cases import Case
from bench.plan_runs import config_of, random_rows
from solotune.dataset.collate import collate
from solotune.hardware import machine as environment
from solotune.model.loading import load_model
from solotune.training import loop
from solotune.training.forward_backward import MicroBatchRunner
from solotune.training.optimizer import make_optimizer

RUNS = {
    "resident again": {},
    "streamed": {"base_offload": True},
    "streamed, activations too": {"base_offload": True, "activation_offload": True},
}
GPU = torch.device("cuda")


def train(case: Case, folder: Path, layers: int, steps: int, **keys: Any) -> list[tuple[float, float, torch.Tensor]]:
    """(loss, gradient norm, adapters) of each step."""
    gc.collect()
    torch.cuda.empty_cache()
    config, _ = environment.resolve_for_machine(config_of(case, folder, layers), environment.probe())
    config = config.replaced("bench", **keys)
    torch.manual_seed(0)
    model = load_model(config, GPU, torch.bfloat16)
    model.module.train()
    for number, layer in enumerate(model.lora_layers.values()):
        torch.nn.init.normal_(layer.lora_B, std=0.01, generator=torch.Generator(GPU).manual_seed(number))
    optimizer = make_optimizer(config.optimizer, [model.flat_params])
    rows, runner, found = random_rows(case, case.rows * steps), MicroBatchRunner(model, config.takes_graphs), []
    for step in range(steps):
        batch = collate(rows[step * case.rows : (step + 1) * case.rows], GPU)
        result = loop.train_step(model, [batch], optimizer, config.max_grad_norm, (0, step), runner)
        found.append((result.loss, result.grad_norm, model.flat_params.detach().clone()))
    assert runner.unsupported_reason is None, runner.unsupported_reason
    return found


def compare(one: list[Any], other: list[Any]) -> str:
    """Number of steps with equal bits, and the largest differences."""
    equal = sum(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(one, other, strict=True))
    loss = max(abs(a[0] - b[0]) for a, b in zip(one, other, strict=True))
    adapters = max((a[2] - b[2]).abs().max().item() for a, b in zip(one, other, strict=True))
    return f"{equal} of {len(one)} | {loss:.2g} | {adapters:.2g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8B")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--nondeterministic", action="store_true")
    args = parser.parse_args()
    torch.use_deterministic_algorithms(not args.nondeterministic, warn_only=True)
    make_weights_here()
    case = Case(args.model, 2, 1024, ())
    print("| base | run | steps with equal bits | largest difference: loss | adapters |\n|---|---|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("nf4", "bf16", "fp8"):
            keys: dict[str, Any] = {"base_precision": precision, "gradient_checkpointing": True, "base_offload": False}
            keys |= {"base_residency": "quantized"} if precision == "nf4" else {}
            train(case, Path(folder), args.layers, 2, **keys)  # compiles, and chooses kernels
            resident = train(case, Path(folder), args.layers, args.steps, **keys)
            for name, changed in RUNS.items():
                other = train(case, Path(folder), args.layers, args.steps, **keys | changed)
                print(f"| {precision} | {name} | {compare(resident, other)} |", flush=True)


if __name__ == "__main__":
    main()
