"""Planned and measured peak memory of an evaluation and of a training step, on this machine's GPU.

    python -m bench.evaluation_peaks [--only TEXT]

Each case is a model's shape with random weights that are made on the GPU (`bench.made_weights`), in a process of its
own: the plan for full rows, two steps with one row, then two evaluations of the case's rows. Peaks are what PyTorch's
allocator has given out in the second of each. A line a case; 30 to 45 s each, of which most is compiling.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.made_weights import make_checkpoint, make_weights_here
from bench.plan_cases import ALL, BF16, CODES, MODELS, RECIPE, STREAM, Case, of
from bench.plan_runs import random_rows

MIB = 1 << 20
NF4 = ("base_precision=nf4", CODES)
CASES = [  # rows: of an evaluation pass
    of("135M", "1x512", BF16),
    of("135M", "16x2048", BF16),
    of("1B", "4x8192", *NF4, learned=0.2),
    of("8B", "1x256", *NF4, learned=0.1),
    of("8B", "4x2048", *NF4),
    of("8B", "16x2048", *NF4, ALL, learned=0.3),
    of("8B", "4x2048", BF16),
    of("8B", "4x2048", "base_precision=nf4", STREAM),
]


def plan_of(case: Case, folder: Path) -> Any:
    """The plan for this machine's card."""
    from solotune.config.load import load_config
    from solotune.hardware import machine as environment
    from solotune.planning import plan_inputs, planner

    machine = environment.probe()
    keys = [f"model_name_or_path={folder}", f"max_length={case.tokens}", f"per_device_eval_batch_size={case.rows}"]
    keys += ["per_device_train_batch_size=1", "gradient_accumulation_steps=1", "gradient_checkpointing=true"]
    config, _ = environment.resolve_for_machine(load_config(RECIPE, [*keys, *case.overrides]), machine)
    card, free = plan_inputs.card_here(machine, False)
    evaluation = {"eval_batch": (case.rows, case.tokens), "eval_labels": round(case.tokens * case.learned)}
    work = replace(planner.full_rows(config.batches), supervised_share=case.learned, **evaluation)
    return planner.make_plan(config, plan_inputs.shapes_of(), card, work, free, host_free_bytes=machine.ram_free_bytes)


def measured(case: Case, folder: Path) -> dict[str, Any]:
    """Planned and measured peaks, in bytes; the model is made in `folder`."""
    make_checkpoint(folder, MODELS[case.model])
    plan = plan_of(case, folder)
    import torch

    from solotune.dataset.collate import collate
    from solotune.evaluation import scores
    from solotune.model.loading import load_model
    from solotune.training import loop
    from solotune.training.forward_backward import MicroBatchRunner
    from solotune.training.optimizer import make_optimizer

    make_weights_here()
    device = torch.device("cuda")
    model = load_model(plan.resolved, device, torch.bfloat16)

    def peak_of(run: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    optimizer = make_optimizer(plan.resolved.optimizer, [model.flat_params])
    runner, batch = MicroBatchRunner(model, False), collate(random_rows(case, 1), device)
    held_out = random_rows(case, case.rows)
    model.module.train()
    step = [peak_of(lambda: loop.train_step(model, [batch], optimizer, 1.0, (0, 1), runner)) for _ in range(2)][-1]
    evaluation = [peak_of(lambda: scores.score(model, held_out, case.rows)) for _ in range(2)][-1]
    peaks = plan.option.footprint.peaks
    return {"evaluation": (peaks.evaluation, evaluation), "step": (peaks.training, step)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cases with this text in their names")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        with tempfile.TemporaryDirectory() as temporary:
            print(json.dumps(measured(CASES[args.child], Path(temporary) / "model")))
        return
    for number, case in enumerate(CASES):
        if args.only not in case.name:
            continue
        command = [sys.executable, "-m", "bench.evaluation_peaks", "--child", str(number)]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            print(f"{case.name}: {ended.stderr.strip()[-400:]}", flush=True)
            continue
        words = [
            f"{what} {planned / MIB:,.0f} MiB planned, {found / MIB:,.0f} measured ({planned / found - 1:+.1%})"
            for what, (planned, found) in json.loads(ended.stdout.splitlines()[-1]).items()
        ]
        print(f"{case.name}: {'; '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
