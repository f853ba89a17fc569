"""Saving, resuming, merging and loading gone wrong: F75 to F78, in loops and in folders.

How: save_pretrained before train(), a state dict with a wrapper's prefix, checkpoints thinned to save disk space, a
merge into other weights than the adapter was learned on.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import torch

from bench.diagnose.unseen2.registry import tell
from bench.diagnose.unseen3.registry import overridden, program


@program("F75", on="said/waybill/folder")
def saved_before_it_was_trained(made: Any, rng: random.Random) -> None:
    """The lines for saving stand above those for training."""
    made.saves_at_start = True


@program("F75", on="phi/ferry/alone")
def an_empty_state(made: Any, rng: random.Random) -> None:
    """A filter on names that no tensor has: the file holds nothing."""
    made.saves = lambda state: {}


@program("F75", on="hun/waybill/own")
def zeros_in_the_file(made: Any, rng: random.Random) -> None:
    """The adapter's file was overwritten by that of a fresh adapter."""
    made.after.append(lambda output, model: _rewrite(output, lambda n, t: torch.zeros_like(t) if "lora_B" in n else t))


def _rewrite(folder: Path, change: Any, names: Any = None) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.rglob("adapter_model.safetensors"):
        state = load_file(file)
        save_file({(names(n) if names else n): change(n, t).contiguous() for n, t in state.items()}, file)


def _merged(model: Any, rounded: Any) -> Any:
    """The adapters, merged into a base whose linears were rounded."""
    whole = copy.deepcopy(model)
    for name, parameter in whole.named_parameters():
        if "base_layer.weight" in name:
            parameter.data = rounded(parameter.data)
    return whole.merge_and_unload()


def _levels(weight: torch.Tensor, levels: int) -> torch.Tensor:
    step = weight.abs().amax(dim=1, keepdim=True) / levels
    return (weight / step).round() * step


@program("F76", on="said/steps/loop")
def merged_into_rounded_weights(made: Any, rng: random.Random) -> None:
    """Learned on the base in full precision, merged into a copy of two bits."""
    made.merged = lambda model: _merged(model, lambda w: _levels(w, 2))


@program("F76", on="fold/ledger/loop")
def learned_on_rounded_weights(made: Any, rng: random.Random) -> None:
    """Learned on a base of a few levels, merged into the original."""
    originals: dict[str, torch.Tensor] = {}

    def prepare(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "lm_head" not in name:
                originals[name] = parameter.data.clone()
                parameter.data = _levels(parameter.data, 2)

    def merged(model: Any) -> Any:
        whole = copy.deepcopy(model)
        for name, parameter in whole.named_parameters():
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            if "base_layer.weight" in name and plain in originals:
                parameter.data = originals[plain].clone()
        return whole.merge_and_unload()

    made.prepare.append(prepare)
    made.merged = merged


def _thinned(checkpoint: Path) -> None:
    for name in ("optimizer.pt", "scheduler.pt"):
        (checkpoint / name).unlink(missing_ok=True)


@program("F77", on="smol/ferry/alone")
def resumed_from_a_thinned_checkpoint(made: Any, rng: random.Random) -> None:
    """Optimizer and schedule were deleted to save space; Trainer resumes without them."""
    made.resumed = _thinned


@program("F77", on="hun/steps/loop")
def resumed_with_weights_alone(made: Any, rng: random.Random) -> None:
    """A new optimizer, the schedule from its start, the same rows again."""
    seam = made.steps // 2
    made.seam = (seam, frozenset({"optimizer", "schedule", "order"}))
    tell(made, warmup_steps=5)

    def rate(self: Any, old: Any, step: int) -> float:
        return old(step - seam if step >= seam else step)

    def before(self: Any, old: Any, step: int, optimizer: Any, source: Any, parameters: Any) -> Any:
        if step == seam:
            return self.optimizer(parameters), self.batches(self.train_rows)
        return optimizer, source

    overridden(made, rate=rate, before=before)


@program("F78|F75", on="said/mood/alone")
def names_with_a_wrapper(made: Any, rng: random.Random) -> None:
    """Saved from a compiled and wrapped model: no name is known when it is loaded."""

    def saves(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name.replace("base_model.model.", "_orig_mod.module."): tensor for name, tensor in state.items()}

    made.saves = saves


@program("F78", on="fold/snip/own")
def renamed_after_the_run(made: Any, rng: random.Random) -> None:
    """A script for another tool renamed the adapter's tensors."""
    made.after.append(lambda output, model: _rewrite(output, lambda n, t: t, lambda n: n.replace("base_model.", "")))
