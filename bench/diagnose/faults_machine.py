"""Faults of environment (S1), quantisation (S10), precision (S11), saving and serving (S15)."""

from __future__ import annotations

import random
from typing import Any

import torch

from bench.diagnose.loop import build, default_loss
from bench.diagnose.machinery import in_nf4, lora_parameters, of_8b, rounded
from bench.diagnose.recipe import Recipe
from bench.diagnose.registry import Needs, fault


@fault("F01")
def no_library_for_this_cuda(recipe: Recipe, rng: random.Random) -> None:
    """An override points to a version that bitsandbytes has no binary for: the run ends while it loads the model."""
    wanted = rng.choice(("99", "117", "101"))
    of_8b(recipe)
    recipe.environment.update(
        versions={"torch": "2.11.0+cu128", "bitsandbytes": "0.49.0", "transformers": "5.24.0", "peft": "0.21.2"},
        BNB_CUDA_VERSION=wanted,
        bitsandbytes_error=f"Configured CUDA binary not found at libbitsandbytes_cuda{wanted}.so",
    )

    def prepare(_model: Any) -> None:
        raise RuntimeError(
            "CUDA Setup failed despite GPU being available. Configured CUDA binary not found at "
            f"libbitsandbytes_cuda{wanted}.so (BNB_CUDA_VERSION={wanted}). Please run python -m bitsandbytes"
        )

    recipe.prepare.append(prepare)


@fault("F02")
def renamed_argument(recipe: Recipe, rng: random.Random) -> None:
    """The script says max_seq_length, a wrapper drops what it does not know, and the default holds."""
    wanted = rng.choice((24, 32))
    recipe.asked = {**recipe.settings, "max_seq_length": wanted}
    del recipe.asked["max_length"]
    recipe.set(max_length=1024)
    recipe.max_length = 1024


@fault("F03")
def changed_default(recipe: Recipe, rng: random.Random) -> None:
    """The intended file has a rate, the script passes none, and this version's default is another."""
    recipe.asked = dict(recipe.settings)
    recipe.learning_rate = 2e-5
    recipe.set(learning_rate=2e-5, gradient_checkpointing=True)


@fault("F49")
def quantised_twice(recipe: Recipe, rng: random.Random) -> None:
    """The checkpoint is AWQ or GPTQ already, and 4-bit is asked for."""
    method = rng.choice(("awq", "gptq"))
    of_8b(recipe)
    recipe.model_config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    recipe.is_static = True


@fault("F50")
def computes_in_float32(recipe: Recipe, rng: random.Random) -> None:
    """4-bit, and the compute dtype left at its default."""
    of_8b(recipe)
    recipe.asked = {name: v for name, v in recipe.settings.items() if name != "bnb_4bit_compute_dtype"}
    recipe.set(bnb_4bit_compute_dtype="float32")


@fault("F51")
def quantisation_ignored(recipe: Recipe, rng: random.Random) -> None:
    """4-bit was asked for when the model was already there: nothing is quantised."""
    recipe.set(base_precision="nf4", bnb_4bit_compute_dtype="bfloat16", bf16=True, load_in_4bit=True)


@fault("F52", Needs.SEPARATE)
def head_quantised(recipe: Recipe, rng: random.Random) -> None:
    """A list of modules to skip, without the head in it."""
    in_nf4(recipe, skip=("score",))
    recipe.set(llm_int8_skip_modules=["score"])


@fault("F53", Needs.SEPARATE)
def overflows_in_fp16(recipe: Recipe, rng: random.Random) -> None:
    """A model whose activations need bfloat16's range, run in fp16."""
    scale = rng.choice((8e4, 1e5, 2e5))

    def prepare(model: Any) -> None:
        for name, module in model.named_modules():
            if name.endswith(("0.mlp.up_proj", "0.fc1")):
                module.weight.data.mul_(scale)
                if module.bias is not None:
                    module.bias.data.mul_(scale)
            if name.endswith(("0.mlp.down_proj", "0.fc2")):
                module.weight.data.div_(scale)
        model.half()

    recipe.prepare.append(prepare)
    recipe.model_config["dtype"] = "bfloat16"
    recipe.set(fp16=True, model_dtype="float16", base_precision="bf16")


@fault("F54")
def updates_lost(recipe: Recipe, rng: random.Random) -> None:
    """Adapters in bfloat16, whose grid is coarser than a step; in float32 this rate and scale learn well."""

    def touch(model: torch.nn.Module) -> None:
        for parameter in lora_parameters(model):
            parameter.data = parameter.data.to(torch.bfloat16)

    recipe.touch.append(touch)
    recipe.adapters["lora_alpha"] = 512
    recipe.learning_rate = rng.choice((4e-5, 6e-5, 8e-5))
    recipe.set(lora_alpha=512.0, learning_rate=recipe.learning_rate, adapter_dtype="bfloat16", bf16=True)


@fault("F55")
def nan_hidden(recipe: Recipe, rng: random.Random) -> None:
    """Some batches give NaN, the step is skipped, and the log shows the last good value."""
    every = rng.choice((4, 5, 6))

    def loss_of(model: Any, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        loss = default_loss(model, batch, step)
        return loss * torch.nan if int(batch["input_ids"].sum()) % every == 0 else loss

    recipe.loss_of, recipe.hides_nan = loss_of, True
    recipe.set(logging_nan_inf_filter=True)


@fault("F75")
def saved_before_training(recipe: Recipe, rng: random.Random) -> None:
    recipe.saves_at_start = True


@fault("F75")
def saved_empty(recipe: Recipe, rng: random.Random) -> None:
    """A filter of keys that matches none."""
    recipe.saves = lambda _state: {}


@fault("F76", Needs.SEPARATE)
def merged_into_another_base(recipe: Recipe, rng: random.Random) -> None:
    """Learned on 4-bit weights, merged into the 16-bit ones and rounded again."""
    in_nf4(recipe)
    levels = rng.choice((8, 12, 16))

    def merged(model: Any) -> torch.nn.Module:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        prepare, recipe.prepare = recipe.prepare, []
        whole = build(recipe)
        recipe.prepare = prepare
        set_peft_model_state_dict(whole, get_peft_model_state_dict(model))
        whole = whole.merge_and_unload()
        for name, module in whole.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                module.weight.data = rounded(module.weight.data, levels)
        return whole.eval()

    recipe.merged = merged
    recipe.set(merged_into="nf4")


@fault("F77")
def resumed_without_state(recipe: Recipe, rng: random.Random) -> None:
    """Weights only: the optimizer and the schedule start again."""
    lost = rng.choice(({"optimizer", "schedule"}, {"optimizer", "schedule", "order"}))
    recipe.seam = (int(recipe.steps * rng.uniform(0.4, 0.6)), frozenset(lost))
    recipe.set(resume_from_checkpoint="checkpoint", ignore_data_skip="order" in lost)


@fault("F78")
def keys_unmatched(recipe: Recipe, rng: random.Random) -> None:
    """The keys of the file have another prefix than the loader looks for."""
    other = rng.choice(("model.", "module.base_model.model.", ""))
    recipe.saves = lambda state: {name.replace("base_model.model.", other, 1): t for name, t in state.items()}
