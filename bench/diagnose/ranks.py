"""Runs on several GPUs: their faults (F79 to F81, and names of wrappers as F78), and those in which nothing is wrong.

All ranks are trained in one process, one after the other, on their own part of each step's rows (`loop.step_of_ranks`).
"""

from __future__ import annotations

import random

import torch

from bench.diagnose.faults_training import unequal_answers
from bench.diagnose.recipe import Recipe
from bench.diagnose.registry import fault, healthy


def _of_ranks(recipe: Recipe, ranks: int) -> None:
    """A run on several GPUs, all of whose rows are those of the clean one."""
    recipe.ranks = ranks
    recipe.batch = max(recipe.batch // ranks, 1)
    recipe.set(world_size=ranks, per_device_train_batch_size=recipe.batch)


@fault("F79")
def gradients_not_exchanged(recipe: Recipe, rng: random.Random) -> None:
    """Every rank calls the model past its wrapper; their adapters were gathered afterwards."""
    _of_ranks(recipe, rng.choice((2, 4)))
    recipe.exchange, recipe.gathers = "none", True


@fault("F79")
def another_adapter_on_each_rank(recipe: Recipe, rng: random.Random) -> None:
    """The seed was set to seed + rank before the adapters were made; gradients are averaged."""
    _of_ranks(recipe, rng.choice((2, 4)))
    recipe.seed_of_rank = recipe.gathers = True


@fault("F79")
def half_of_the_tensors_exchanged(recipe: Recipe, rng: random.Random) -> None:
    """An all-reduce over a list of parameters that was made before the last layers had adapters."""
    _of_ranks(recipe, 2)
    recipe.exchange = "half"


@fault("F80")
def mean_of_means_of_ranks(recipe: Recipe, rng: random.Random) -> None:
    """Each rank divides by its own tokens, and the gradients are averaged."""
    unequal_answers(recipe, rng)
    recipe.batch = 4
    _of_ranks(recipe, rng.choice((2, 4)))
    recipe.divides_by = "own"


@fault("F80")
def summed_over_ranks(recipe: Recipe, rng: random.Random) -> None:
    """Divided by the tokens of all ranks, multiplied by their number for an average, and summed."""
    _of_ranks(recipe, rng.choice((2, 4)))
    recipe.exchange = "sum"


@fault("F80")
def divided_by_ranks_twice(recipe: Recipe, rng: random.Random) -> None:
    """Divided by the tokens of all ranks, and averaged by the wrapper."""
    _of_ranks(recipe, rng.choice((2, 3)))
    recipe.divides_by = "all and ranks"


@fault("F81")
def resumed_on_other_ranks(recipe: Recipe, rng: random.Random) -> None:
    """Half or twice as many GPUs were free when it was resumed, and the config stayed."""
    before, after = rng.choice(((2, 4), (4, 2), (2, 1)))
    _of_ranks(recipe, before)
    recipe.ranks_after = after
    recipe.seam = (int(recipe.steps * rng.uniform(0.4, 0.6)), frozenset())
    recipe.set(resume_from_checkpoint="checkpoint")


@fault("F78")
def names_of_a_wrapper(recipe: Recipe, rng: random.Random) -> None:
    """The state of a wrapped model was saved: compiled layers, FSDP, DistributedDataParallel."""
    old, new = rng.choice((
        ("layers.", "layers._orig_mod."), ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.model.", "module.base_model.model."), ("lora_A", "_fsdp_wrapped_module.lora_A"),
    ))  # fmt: skip

    def saves(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        changed = {name.replace(old, new, 1): tensor for name, tensor in state.items()}
        if changed.keys() == state.keys():  # another family calls its layers otherwise
            changed = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
        return changed

    recipe.saves = saves


@healthy()
def several_ranks(recipe: Recipe, rng: random.Random) -> None:
    """All is exchanged, and the adapters of all ranks are at hand."""
    _of_ranks(recipe, rng.choice((2, 4)))
    recipe.gathers = True


@healthy()
def ranks_with_unequal_answers(recipe: Recipe, rng: random.Random) -> None:
    """As F80's rows, and divided by the tokens of all ranks."""
    unequal_answers(recipe, rng)
    recipe.batch = 4
    _of_ranks(recipe, rng.choice((2, 4)))


@healthy()
def ranks_with_accumulation(recipe: Recipe, rng: random.Random) -> None:
    _of_ranks(recipe, 2)
    recipe.batch, recipe.accumulation = max(recipe.batch // 2, 1), 2
    recipe.set(per_device_train_batch_size=recipe.batch, gradient_accumulation_steps=2)


@healthy()
def resumed_on_as_many_ranks(recipe: Recipe, rng: random.Random) -> None:
    _of_ranks(recipe, 2)
    recipe.ranks_after = 2
    recipe.seam = (recipe.steps // 2, frozenset())
    recipe.set(resume_from_checkpoint="checkpoint")
