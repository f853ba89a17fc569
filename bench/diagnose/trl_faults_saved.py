"""What goes wrong in scripts with TRL and PEFT: the adapter, its precision, and what was saved and resumed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.diagnose.bases import KINDS, load
from bench.diagnose.recipe import linears
from bench.diagnose.trl_run import Run, change

# --- adapter and precision


@change("F56")
def names_of_another_model(run: Run, rng: random.Random) -> None:
    run.lora["target_modules"] = [linears(run.base)[0], "query_key_value", "dense_h_to_4h", "wo"]


@change("F62")
def rank_one_on_one_module(run: Run, rng: random.Random) -> None:
    run.lora |= {"r": 1, "lora_alpha": 2, "target_modules": [linears(run.base)[0]], "layers_to_transform": [0]}


@change("F59")
def both_matrices_random(run: Run, rng: random.Random) -> None:
    run.lora["init_lora_weights"] = False


@change("F60", "F75")
def both_matrices_zero(run: Run, rng: random.Random) -> None:
    run.touch.append(lambda trainer: _each(trainer.model, "lora_", lambda p: p.data.zero_()))


@change("F58", "F57")
def adapters_frozen_head_trained(run: Run, rng: random.Random) -> None:
    run.lora["modules_to_save"] = ["lm_head"]
    run.touch.append(lambda trainer: _each(trainer.model, "lora_", lambda p: p.requires_grad_(False)))


@change("F54", "F64")
def adapters_in_bfloat16(run: Run, rng: random.Random) -> None:
    run.sft["learning_rate"] = 3e-5
    run.touch.append(lambda trainer: _each(trainer.model, "lora_", _halve))


def _halve(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data.to(torch.bfloat16)


def _each(model: Any, part: str, edit: Callable[[Any], Any]) -> None:
    for name, parameter in model.named_parameters():
        if part in name:
            edit(parameter)


# --- saved and resumed


@change("F75")
def saved_before_training(run: Run, rng: random.Random) -> None:
    run.saved_at_start = run.saves_state = True


@change("F75")
def saved_without_tensors(run: Run, rng: random.Random) -> None:
    run.left.append(lambda run, output: _rewrite(output, lambda tensors: {}))


@change("F75", "F60")
def zeroed_afterwards(run: Run, rng: random.Random) -> None:
    run.left.append(
        lambda run, output: _rewrite(output, lambda tensors: {k: torch.zeros_like(v) for k, v in tensors.items()})
    )


def _rewrite(output: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from safetensors.torch import load_file, save_file

    file = output / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file, {"format": "pt"})


@change("F78")
def base_of_another_shape(run: Run, rng: random.Random) -> None:
    mine = run.base.kind
    other = next(n for n, kind in KINDS.items() if kind.family != mine.family and kind.held_out == mine.held_out)

    def renamed(run: Run, output: Path) -> None:
        file = output / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(load(other).folder)}))

    run.left.append(renamed)
    run.told = False


@change("F77")
def resumed_without_optimizer(run: Run, rng: random.Random) -> None:
    def lost(checkpoint: Path) -> None:
        for name in ("optimizer.pt", "scheduler.pt"):
            (checkpoint / name).unlink()

    run.resumed = lost


@change("F74")
def loss_summed_over_micro_batches(run: Run, rng: random.Random) -> None:
    run.sft |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "logging_steps": 1}

    def scaled(trainer: Any) -> None:
        plain = trainer.compute_loss
        times = run.sft["gradient_accumulation_steps"]

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            found = plain(*args, **kwargs)
            return (found[0] * times, *found[1:]) if isinstance(found, tuple) else found * times

        trainer.compute_loss = compute_loss

    run.touch.append(scaled)
