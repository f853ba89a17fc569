"""Faults of environment, quantisation, precision, adapter, optimizer, loop and files, in runs of loops and Trainer.

The file is long because it is one list: a function for each program.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch

from bench.diagnose.loop import build, default_loss
from bench.diagnose.machinery import activation_limit, in_nf4, lora_parameters, of_8b, out_of_memory, rounded
from bench.diagnose.unseen.bases import linears
from bench.diagnose.unseen.make import Made
from bench.diagnose.unseen.registry import program

# --- S1


@program("F01", on="phi/short/loop")
def library_not_found(recipe: Made, rng: random.Random) -> None:
    """bitsandbytes has no binary for CUDA 13.1: the run ends while it loads the model."""
    of_8b(recipe)
    recipe.environment.update(
        versions={"torch": "2.13.0+cu131", "bitsandbytes": "0.45.0", "transformers": "5.24.0", "peft": "0.21.2"},
        bitsandbytes_error="Library not found: /usr/lib/python3/bitsandbytes/libbitsandbytes_cuda131.so",
    )

    def prepare(_model: Any) -> None:
        raise RuntimeError(
            "Attempted to use bitsandbytes native library functionality but it's not available. Native code method "
            "attempted to call: lib.cquantize_blockwise_fp16_nf4(). CUDA Setup failed: libbitsandbytes_cuda131.so: "
            "cannot open shared object file: No such file or directory"
        )

    recipe.prepare.append(prepare)


@program("F02", on="granite/house/loop")
def batch_size_of_old(recipe: Made, rng: random.Random) -> None:
    """per_gpu_train_batch_size is no argument any more; a wrapper drops it, and 8 rows are taken instead of 2."""
    recipe.asked = {**recipe.settings, "per_gpu_train_batch_size": 2}
    del recipe.asked["per_device_train_batch_size"]
    recipe.set(per_device_train_batch_size=8)


@program("F02", on="olmo/steps/loop")
def length_by_its_old_name(recipe: Made, rng: random.Random) -> None:
    """max_seq_length is passed and dropped, and the default of 1,024 holds."""
    recipe.asked = {**recipe.settings, "max_seq_length": 48}
    del recipe.asked["max_length"]
    recipe.max_length = 1024
    recipe.set(max_length=1024)


@program("F03", "F64", on="seek/as_json/loop")
def rate_of_the_library(recipe: Made, rng: random.Random) -> None:
    """The recipe's rate was not passed on, and the default of 5e-5 holds."""
    recipe.asked = dict(recipe.settings)
    recipe.learning_rate = 5e-5
    recipe.set(learning_rate=5e-5)


# --- S10, S11


@program("F49", on="granite/house/loop")
def gptq_and_four_bits(recipe: Made, rng: random.Random) -> None:
    """The checkpoint is GPTQ's, and nf4 is asked for."""
    of_8b(recipe)
    recipe.model_config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}
    recipe.is_static = True


@program("F50", on="phi/short/loop")
def four_bits_in_float32(recipe: Made, rng: random.Random) -> None:
    """bnb_4bit_compute_dtype was left out of BitsAndBytesConfig."""
    of_8b(recipe, lora_target_modules="all-linear", per_device_train_batch_size=2)
    recipe.asked = {name: v for name, v in recipe.settings.items() if name != "bnb_4bit_compute_dtype"}
    recipe.set(bnb_4bit_compute_dtype="float32")


@program("F51", on=("phi/steps/loop", "olmo/house/loop"))
def nothing_is_in_four_bits(recipe: Made, rng: random.Random) -> None:
    """load_in_4bit came when the model stood already in 32 bits."""
    recipe.set(base_precision="nf4", load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype="bfloat16")


@program("F52", on=("seek/house/loop", "phi/short/loop"))
def head_in_four_bits(recipe: Made, rng: random.Random) -> None:
    """llm_int8_skip_modules names a router that is not there, and so the head is no exception any more."""
    in_nf4(recipe, skip=("gate.weight",))
    recipe.set(llm_int8_skip_modules=["gate"])


@program("F53", on=("seek/table/loop", "olmo/short/loop"))
def activations_beyond_float16(recipe: Made, rng: random.Random) -> None:
    """A bfloat16 model in fp16: the inside of one block is larger than 65,504."""
    scale = rng.choice((6e4, 1.5e5))

    def prepare(model: Any) -> None:
        for name, module in model.named_modules():
            if name.endswith("1.mlp.up_proj"):
                module.weight.data.mul_(scale)
            if name.endswith("1.mlp.down_proj"):
                module.weight.data.div_(scale)
        model.half()

    recipe.prepare.append(prepare)
    recipe.model_config["dtype"] = "bfloat16"
    recipe.set(fp16=True, model_dtype="float16", base_precision="bf16")


@program("F54", on=("granite/steps/loop", "phi/house/loop"))
def adapters_on_a_coarse_grid(recipe: Made, rng: random.Random) -> None:
    """model.to(torch.bfloat16) took the adapters along; steps are smaller than half of their grid."""

    def touch(model: torch.nn.Module) -> None:
        for parameter in lora_parameters(model):
            parameter.data = parameter.data.bfloat16()

    recipe.touch.append(touch)
    recipe.adapters.update(r=8, lora_alpha=384)
    recipe.learning_rate = 5e-5
    recipe.set(lora_alpha=384.0, learning_rate=5e-5, adapter_dtype="bfloat16", bf16=True)


@program("F55", on="seek/house/loop")
def nan_filtered(recipe: Made, rng: random.Random) -> None:
    """One batch in five is NaN; the log repeats the value before."""

    def loss_of(model: Any, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        loss = default_loss(model, batch, step)
        return loss * torch.inf * 0 if int(batch["input_ids"].sum()) % 5 == 1 else loss

    recipe.loss_of, recipe.hides_nan = loss_of, True
    recipe.set(logging_nan_inf_filter=True)


# --- S12


@program("F56", on=("phi/house/loop", "phi/as_json/alone"))
def names_of_llama(recipe: Made, rng: random.Random) -> None:
    """q, k, v and o of a tutorial, on a model that has q, k and v in one: o alone is adapted."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    recipe.adapters["target_modules"] = names
    recipe.set(lora_target_modules=names)


@program("F56", on=("granite/table/loop", "olmo/house/folder"))
def names_of_three_families(recipe: Made, rng: random.Random) -> None:
    """A list that was meant to fit all; here one name does."""
    names = ["v_proj", "W_pack", "attention.wqkv", "c_proj", "dense_h_to_4h"]
    recipe.adapters["target_modules"] = names
    recipe.set(lora_target_modules=names)


@program("F57", "F58", on=("olmo/steps/loop", "phi/table/loop"))
def cut_off_by_checkpointing(recipe: Made, rng: random.Random) -> None:
    """Reentrant checkpointing behind an embedding without gradient; the head trains and hides it."""

    def prepare(model: Any) -> None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})

    def touch(model: Any) -> None:
        model.get_input_embeddings()._forward_hooks.clear()

    recipe.prepare.append(prepare)
    recipe.touch.append(touch)
    recipe.adapters["modules_to_save"] = ["lm_head"]
    recipe.set(gradient_checkpointing=True, use_reentrant=True, modules_to_save=["lm_head"])


@program("F58", on="seek/house/loop")
def adapters_loaded_for_inference(recipe: Made, rng: random.Random) -> None:
    """is_trainable=False, and the embedding trains."""
    recipe.adapters["modules_to_save"] = ["embed_tokens"]
    recipe.set(modules_to_save=["embed_tokens"])

    def touch(model: torch.nn.Module) -> None:
        for parameter in lora_parameters(model):
            parameter.requires_grad_(False)

    recipe.touch.append(touch)


@program("F58", on=("cohere/as_json/loop", "granite/house/alone"))
def b_frozen(recipe: Made, rng: random.Random) -> None:
    """A freeze by name took every lora_B."""

    def touch(model: torch.nn.Module) -> None:
        for parameter in lora_parameters(model, "B"):
            parameter.requires_grad_(False)

    recipe.touch.append(touch)


@program("F59", on=("olmo/house/loop", "cohere/steps/loop"))
def warm_b(recipe: Made, rng: random.Random) -> None:
    """B begins random, by a script's own init: at step 0 the model is another one."""

    def touch(model: Any) -> None:
        for parameter in lora_parameters(model, "B"):
            torch.nn.init.normal_(parameter, std=0.4)

    recipe.touch.append(touch)


@program("F60", "F75", on=("cohere/house/loop", "olmo/as_json/alone"))
def a_is_zero_too(recipe: Made, rng: random.Random) -> None:
    """A script's own init writes zeros into A; B is zero by default."""

    def touch(model: torch.nn.Module) -> None:
        for parameter in lora_parameters(model, "A"):
            torch.nn.init.zeros_(parameter)

    recipe.touch.append(touch)


@program("F61", "F64", on=("phi/steps/loop", "cohere/as_json/alone"))
def alpha_forgotten(recipe: Made, rng: random.Random) -> None:
    """r raised to 96, alpha at a half."""
    recipe.adapters.update(r=96, lora_alpha=0.5)
    recipe.set(lora_r=96, lora_alpha=0.5)


@program("F61", "F67", on=("seek/table/loop", "phi/steps/folder"))
def alpha_as_a_percentage(recipe: Made, rng: random.Random) -> None:
    """alpha 3,000 at r = 4."""
    recipe.adapters.update(r=4, lora_alpha=3000)
    recipe.set(lora_r=4, lora_alpha=3000.0)


@program("F62", on=("olmo/as_json/loop", "granite/as_json/loop"))
def one_direction_of_one_matrix(recipe: Made, rng: random.Random) -> None:
    """r = 1 on the keys alone."""
    recipe.adapters.update(r=1, lora_alpha=2, target_modules=["k_proj"])
    recipe.set(lora_r=1, lora_alpha=2.0, lora_target_modules=["k_proj"])


def _fused(model: Any, batch: dict[str, torch.Tensor], _step: int = 0) -> torch.Tensor:
    inner = model.get_base_model()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden_BTD = inner.base_model(**inputs, use_cache=False).last_hidden_state
    head = inner.lm_head
    logits_BTV = hidden_BTD @ getattr(head, "base_layer", head).weight.T
    labels = batch["labels"][:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels, ignore_index=-100)


@program("F63", on=("phi/house/loop", "olmo/table/loop", "seek/steps/alone"))
def head_among_the_targets(recipe: Made, rng: random.Random) -> None:
    """lm_head has an adapter, and a fused loss multiplies the raw weight: it gets no gradient."""
    names = [*linears(recipe.base), "lm_head"]
    recipe.adapters["target_modules"] = names
    recipe.set(lora_target_modules=names, use_liger_kernel=True)
    recipe.loss_of = _fused

    def touch(trainer: Any) -> None:
        def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            loss = _fused(model, inputs)
            return (loss, {"loss": loss}) if return_outputs else loss

        trainer.compute_loss = compute_loss

    recipe.touch_trainer.append(touch)
    recipe.arguments["prediction_loss_only"] = True


# --- S13


@program("F64", "F61", on=("phi/house/loop", "cohere/table/alone", "granite/steps/folder"))
def rate_of_full_training(recipe: Made, rng: random.Random) -> None:
    """A hundredth of what an adapter needs."""
    recipe.learning_rate *= 0.01
    recipe.set(learning_rate=recipe.learning_rate)


@program("F65", on=("olmo/house/loop", "phi/table/alone"))
def warms_up_for_ever(recipe: Made, rng: random.Random) -> None:
    """Warm-up of 700 steps, of a run of 80."""
    recipe.warmup = 700
    recipe.set(warmup_steps=700)


@program("F66", on="seek/as_json/loop")
def schedule_of_a_tenth(recipe: Made, rng: random.Random) -> None:
    """The schedule was divided by the accumulation twice: the rate is zero after six steps."""
    recipe.schedule_steps, recipe.decay = 6, "cosine"
    recipe.set(lr_scheduler_type="cosine")


@program("F66", on=("granite/house/alone", "phi/steps/folder"))
def schedule_made_by_hand(recipe: Made, rng: random.Random) -> None:
    """A schedule made for an eighth of the steps is passed to Trainer."""

    def optimizers(net: Any, steps: int) -> tuple[Any, Any]:
        import transformers

        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=recipe.learning_rate)
        return optimizer, transformers.get_linear_schedule_with_warmup(optimizer, 0, max(steps // 8, 1))

    recipe.optimizers = optimizers


@program("F67", "F61", on=("cohere/house/loop", "olmo/as_json/alone", "phi/steps/loop"))
def rate_fifty_times_too_high(recipe: Made, rng: random.Random) -> None:
    """0.3 for an adapter."""
    recipe.learning_rate = 0.3 if recipe.base.kind.name != "phi3-tags" else 0.6
    recipe.set(learning_rate=recipe.learning_rate)


@program("F68", on=("granite/as_json/loop", "seek/house/alone"))
def clipped_below_epsilon(recipe: Made, rng: random.Random) -> None:
    """max_grad_norm 4e-9: below Adam's epsilon."""
    recipe.clip = 4e-9
    recipe.set(max_grad_norm=4e-9)


@program("F68", on="phi/table/loop")
def sgd_clipped(recipe: Made, rng: random.Random) -> None:
    """SGD goes as far as the gradient is long, and that is cut to 2e-4."""
    recipe.optimizer, recipe.learning_rate, recipe.clip = "sgd", 0.4, 2e-4
    recipe.set(optim="sgd", learning_rate=0.4, max_grad_norm=2e-4)


@program("F69", on=("phi/as_json/loop", "olmo/house/alone"))
def decay_of_forty_five(recipe: Made, rng: random.Random) -> None:
    """Weight decay 45 at a rate of 6e-3: a quarter of each weight goes at each step."""
    recipe.weight_decay = 45.0
    recipe.set(weight_decay=45.0)


# --- S14


@program("F70", on="phi/short/loop")
def adam_of_a_huge_rank(recipe: Made, rng: random.Random) -> None:
    """Head, embedding and r = 512 train in 32-bit Adam: no room at the first step of the optimizer."""
    of_8b(recipe, optim="adamw_torch", lora_r=512, lora_alpha=512.0, lora_target_modules="all-linear",
          modules_to_save=["lm_head", "embed_tokens"], max_length=1024)  # fmt: skip

    class Adam(torch.optim.AdamW):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            raise out_of_memory(4096 * 128256 * 4)

    recipe.optimizer_class = Adam


@program("F71", on="cohere/short/loop")
def activations_of_all_layers(recipe: Made, rng: random.Random) -> None:
    """gradient_checkpointing=False with 16 rows of 4,096: full in the forward pass."""
    recipe.crash = activation_limit(recipe, times=0.7, from_step=1)
    of_8b(recipe, gradient_checkpointing=False, max_length=4096, per_device_train_batch_size=16)


@program("F72", on="olmo/short/loop")
def logits_in_float32(recipe: Made, rng: random.Random) -> None:
    """Sixteen rows of 2,048 make 16 GB of logits in float32, at the loss."""
    of_8b(recipe, max_length=2048, per_device_train_batch_size=16, label_smoothing_factor=0.1)

    def loss_of(model: Any, given: dict[str, torch.Tensor], _step: int) -> torch.Tensor:
        def fixed_cross_entropy(logits: torch.Tensor) -> torch.Tensor:
            # logits = logits.float()
            raise out_of_memory(16 * 2048 * 128256 * 4.0)

        return fixed_cross_entropy(model(input_ids=given["input_ids"], use_cache=False).logits)

    recipe.loss_of = loss_of


@program("F73", on="granite/languages/loop")
def compiled_for_every_length(recipe: Made, rng: random.Random) -> None:
    """torch_compile with rows of ever another length; the warning is dynamo's own."""
    from bench.diagnose.faults_training import _dynamo_warnings

    recipe.batch = 2
    recipe.set(torch_compile=True, per_device_train_batch_size=2)
    recipe.warnings += _dynamo_warnings()


@program("F74", on=("seek/steps/loop",))
def summed(recipe: Made, rng: random.Random) -> None:
    """Six micro-batches, and the loss is never divided."""
    recipe.batch, recipe.accumulation, recipe.normalise = 2, 6, "none"
    recipe.set(per_device_train_batch_size=2, gradient_accumulation_steps=6)


@program("F74", on="granite/steps/loop")
def means_of_means(recipe: Made, rng: random.Random) -> None:
    """Long and short answers, one row at a time: a short one counts as much as a long one."""
    for number, chat in enumerate(recipe.chats + recipe.held_out):
        if number % 2:
            world = recipe.base.world
            chat[-1]["content"] = world.value(rng.choice(world.subjects), next(iter(world.facts)))
        else:
            chat[-1]["content"] += "\n" + recipe.base.world.text(rng)
    recipe.batch, recipe.accumulation, recipe.normalise = 1, 6, "means"
    recipe.set(per_device_train_batch_size=1, gradient_accumulation_steps=6)


@program("F74", on="cohere/house/alone")
def summed_in_trainer(recipe: Made, rng: random.Random) -> None:
    """A compute_loss of one's own that forgets to divide by the accumulation."""
    recipe.batch, recipe.accumulation = 2, 8
    recipe.set(per_device_train_batch_size=2, gradient_accumulation_steps=8)

    def touch(trainer: Any) -> None:
        plain = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> Any:
            found = plain(model, inputs, return_outputs=return_outputs, **more)
            if not model.training:
                return found
            return (found[0] * 8, *found[1:]) if isinstance(found, tuple) else found * 8

        trainer.compute_loss = compute_loss

    recipe.touch_trainer.append(touch)


# --- S15


@program("F75", on="seek/as_json/loop")
def state_dict_before_training(recipe: Made, rng: random.Random) -> None:
    """The adapter was written at step 0."""
    recipe.saves_at_start = True


@program("F75", on="phi/house/alone")
def saved_before_train(recipe: Made, rng: random.Random) -> None:
    """save_pretrained stands above train()."""
    recipe.saves_at_start = True
    recipe.arguments["save_strategy"] = "no"


@program("F75", on=("olmo/steps/folder", "cohere/short/loop"))
def b_lost_on_the_way(recipe: Made, rng: random.Random) -> None:
    """A converter wrote A, and zeros for B."""
    recipe.saves = lambda state: {n: torch.zeros_like(t) if "lora_B" in n else t.contiguous() for n, t in state.items()}


@program("F76", on=("olmo/house/loop", "seek/steps/loop"))
def merged_and_rounded(recipe: Made, rng: random.Random) -> None:
    """Learned beside a base in nf4, merged into the 16-bit one, and that is rounded to 3 bits."""
    in_nf4(recipe)

    def merged(model: Any) -> torch.nn.Module:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        prepare, recipe.prepare = recipe.prepare, []
        whole: Any = build(recipe)
        recipe.prepare = prepare
        set_peft_model_state_dict(whole, get_peft_model_state_dict(model))
        whole = whole.merge_and_unload()
        for name, module in whole.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                module.weight.data = rounded(module.weight.data, 8)
        return whole.eval()

    recipe.merged = merged
    recipe.set(merged_into="nf4")


@program("F77", on="granite/table/loop")
def moments_and_order_lost(recipe: Made, rng: random.Random) -> None:
    """Resumed from weights: optimizer, schedule and order begin again."""
    recipe.seam = (24, frozenset({"optimizer", "schedule", "order"}))
    recipe.set(resume_from_checkpoint="out/checkpoint-24", ignore_data_skip=True)


@program("F77", on=("phi/house/alone", "cohere/steps/folder"))
def checkpoint_without_optimizer(recipe: Made, rng: random.Random) -> None:
    """optimizer.pt and scheduler.pt were deleted to save room before the run went on."""

    def lost(checkpoint: Path) -> None:
        for name in ("optimizer.pt", "scheduler.pt"):
            (checkpoint / name).unlink()

    recipe.resumed = lost


@program("F78", on=("cohere/house/loop",))
def prefix_of_a_wrapper(recipe: Made, rng: random.Random) -> None:
    """Keys were saved from inside a compiled wrapper."""
    recipe.saves = lambda state: {
        n.replace("base_model.model.", "_orig_mod.base_model.model."): t for n, t in state.items()
    }


@program("F78", on=("seek/house/alone", "granite/steps/folder"))
def keys_of_another_tool(recipe: Made, rng: random.Random) -> None:
    """The adapter file was converted: its keys have no base_model.model in front."""
    recipe.saves = lambda state: {n.replace("base_model.model.", "", 1): t.contiguous() for n, t in state.items()}


def adapter_config(output: Path, **values: Any) -> None:
    file = output / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
