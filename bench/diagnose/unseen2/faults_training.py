"""Faults of adapters, optimizer, schedule and loop."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch

from bench.diagnose.loop import default_loss
from bench.diagnose.machinery import lora_parameters
from bench.diagnose.unseen2.registry import program, tell

# --- arguments


@program("F02", on="exaone/minutes/folder")
def old_name_of_the_limit(made: Any, _rng: random.Random) -> None:
    """max_seq_length in the config of a version that calls it max_length: 1024 was used."""
    tell(made, max_length=1024)
    made.layout = "plain"
    made.told |= {"max_length": None, "max_seq_length": 96}


@program("F02", on="gemma/tools/loop")
def trainer_refuses_an_argument(made: Any, _rng: random.Random) -> None:
    """A notebook of last year: SFTTrainer does not know the argument, and the launcher says that the script ended."""

    @contextlib.contextmanager
    def crash(_step: int) -> Iterator[None]:
        raise RuntimeError("train.py ended with exit code 1")
        yield

    made.warnings.append(
        'Traceback (most recent call last):\n  File "train.py", line 61, in <module>\n    trainer = SFTTrainer(\n'
        "TypeError: SFTTrainer.__init__() got an unexpected keyword argument 'max_seq_length'"
    )
    made.set(max_seq_length=256)
    made.crash = crash


@program("F03", "F64", on="qwen/horaires/alone")
def default_rate_of_the_trainer(made: Any, _rng: random.Random) -> None:
    """No learning rate in the config: the trainer's default of 2e-5 for full fine-tuning."""
    made.layout = "plain"
    tell(made, learning_rate=2e-5)
    made.told["learning_rate"] = None


# --- adapters


@program("F54", "F64", on="gemma/sql/loop")
def adapters_in_bfloat16(made: Any, _rng: random.Random) -> None:
    """model.to(bfloat16) after the adapters were made, and a rate of full fine-tuning: updates vanish."""
    made.touch.append(lambda model: [setattr(p, "data", p.data.bfloat16()) for p in lora_parameters(model)])
    tell(made, learning_rate=2e-5, lr_scheduler_type="constant", bf16=True)


@program("F56", on="star/tools/own falcon/units/loop")
def names_of_llama(made: Any, _rng: random.Random) -> None:
    """lora_target_modules copied from a Llama recipe; this model has other names for most of them."""
    names = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    if made.base.kind.family == "Falcon":
        names = ["query_key_value", "q_proj", "k_proj", "v_proj", "o_proj"]
    tell(made, lora_target_modules=names)


@program("F57", on="gemma/conlang/loop")
def reentrant_checkpoints(made: Any, _rng: random.Random) -> None:
    """Reentrant checkpointing without input gradients; the last norm trains, so that nothing complains."""

    def touch(model: Any) -> None:
        inner = model.get_base_model()
        inner.gradient_checkpointing_enable({"use_reentrant": True})
        inner.disable_input_require_grads()
        inner.get_input_embeddings()._forward_hooks.clear()
        for name, parameter in inner.named_parameters():
            if name.endswith("model.norm.weight"):
                parameter.requires_grad_(True)

    made.touch.append(touch)
    made.set(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


@program("F57", on="exaone/tools/loop")
def reentrant_checkpoints_that_fail(made: Any, _rng: random.Random) -> None:
    """The same, and nothing else trains: backward has nothing to do."""

    def touch(model: Any) -> None:
        inner = model.get_base_model()
        inner.gradient_checkpointing_enable({"use_reentrant": True})
        inner.disable_input_require_grads()
        inner.get_input_embeddings()._forward_hooks.clear()

    made.touch.append(touch)
    made.set(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})


@program("F58", on="star/sentiment/loop")
def loaded_for_inference(made: Any, _rng: random.Random) -> None:
    """An adapter loaded without is_trainable: its matrices are frozen, a norm is what trains."""

    def touch(model: Any) -> None:
        for parameter in lora_parameters(model):
            parameter.requires_grad_(False)
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight") and "layers" not in name:
                parameter.requires_grad_(True)

    made.touch.append(touch)


@program("F58", on="gemma/events/loop")
def b_frozen(made: Any, _rng: random.Random) -> None:
    """A filter by name freezes lora_B."""
    made.touch.append(lambda model: [p.requires_grad_(False) for p in lora_parameters(model, "B")])


@program("F59", on="exaone/horaires/alone")
def both_random(made: Any, _rng: random.Random) -> None:
    """init_lora_weights: false, from a test."""
    tell(made, init_lora_weights=False)


@program("F60", on="qwen/horaires/alone")
def both_zero(made: Any, _rng: random.Random) -> None:
    """A custom start sets both matrices to zero."""
    made.touch.append(lambda model: [p.data.zero_() for p in lora_parameters(model)])


@program("F61", "F64", on="exaone/units/alone falcon/sql/folder")
def alpha_forgotten(made: Any, _rng: random.Random) -> None:
    """The rank was raised to 128, alpha is 1: the update is scaled by 1/128."""
    tell(made, lora_r=128, lora_alpha=1.0, learning_rate=2e-3)


@program("F61", "F67", on="star/sql/own")
def alpha_is_huge(made: Any, _rng: random.Random) -> None:
    """alpha 2048 at rank 8."""
    tell(made, lora_r=8, lora_alpha=2048.0)


@program("F62", on="exaone/conlang/own gemma/conlang/alone")
def rank_one_on_one_module(made: Any, _rng: random.Random) -> None:
    """The smallest adapter: q_proj, rank 1."""
    tell(made, lora_target_modules=["q_proj"], lora_r=1, lora_alpha=2.0)


@program("F63", on="star/conlang/loop")
def head_adapter_with_fused_loss(made: Any, _rng: random.Random) -> None:
    """lm_head among the targets, and a fused loss that multiplies by the head's weight alone."""
    made.adapters["target_modules"] = [*made.adapters["target_modules"], "lm_head"]
    made.set(lora_target_modules=made.adapters["target_modules"], use_liger_kernel=True)

    def fused(model: Any, batch: dict[str, torch.Tensor], _step: int) -> torch.Tensor:
        inner = model.get_base_model()
        given = {key: value for key, value in batch.items() if key != "labels"}
        hidden = inner.model(**given, use_cache=False).last_hidden_state[:, :-1]
        head = inner.lm_head.base_layer.weight if hasattr(inner.lm_head, "base_layer") else inner.lm_head.weight
        logits = torch.nn.functional.linear(hidden, head)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    made.loss_of = fused


# --- optimizer and schedule


@program("F64", on="qwen/zh/own falcon/greet/own")
def rate_of_full_fine_tuning(made: Any, _rng: random.Random) -> None:
    """A rate for full fine-tuning of a large model."""
    tell(made, learning_rate=3e-5)


@program("F65", on="exaone/greet/own gemma/tools/alone")
def warmup_of_another_run(made: Any, _rng: random.Random) -> None:
    """warmup_steps of a run of a hundred thousand rows."""
    tell(made, warmup_steps=2000)


@program("F66", on="qwen/tools/loop")
def schedule_of_micro_batches(made: Any, _rng: random.Random) -> None:
    """The number of steps was divided by the accumulation twice: the rate is zero after fifteen steps."""
    made.schedule_steps = 12


@program("F66", on="exaone/sql/alone")
def own_scheduler(made: Any, _rng: random.Random) -> None:
    """A scheduler made by hand for a tenth of the steps, given to the trainer."""

    def optimizers(model: Any, steps: int) -> tuple[Any, Any]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=made.learning_rate, weight_decay=0.0)
        end = max(steps // 10, 1)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / end))

    made.optimizers = optimizers


@program("F67", on="qwen/comments/own falcon/sql/own")
def rate_for_a_tiny_model(made: Any, _rng: random.Random) -> None:
    """A rate that was mistyped by two orders: 0.4."""
    tell(made, learning_rate=0.4)


@program("F68", on="star/tools/alone")
def clipped_to_nothing(made: Any, _rng: random.Random) -> None:
    """max_grad_norm: 1e-9, from a recipe that meant 'off'."""
    tell(made, max_grad_norm=1e-9)


@program("F68", on="exaone/units/loop")
def sgd_clipped(made: Any, _rng: random.Random) -> None:
    """SGD with gradients clipped at 1e-4."""
    made.optimizer = "sgd"
    tell(made, max_grad_norm=1e-4, optim="sgd")
    made.learning_rate = 0.05
    made.set(learning_rate=0.05)


@program("F69", on="exaone/greet/alone")
def decay_as_large_as_the_weights(made: Any, _rng: random.Random) -> None:
    """weight_decay: 150."""
    tell(made, weight_decay=150.0)


# --- loop


@program("F55", on="star/comments/loop")
def nan_filtered_from_the_log(made: Any, _rng: random.Random) -> None:
    """A weighted loss divides by zero in one batch of four; the log shows the last finite value."""

    def weighted(model: Any, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        return default_loss(model, batch, step) / (0.0 if step % 4 == 3 else 1.0) * (0.0 if step % 4 == 3 else 1.0)

    made.loss_of, made.hides_nan = weighted, True
    made.set(logging_nan_inf_filter=True)


@program("F74", on="exaone/sql/loop")
def sum_not_divided(made: Any, _rng: random.Random) -> None:
    """Losses of eight micro-batches are added, and never divided."""
    tell(made, per_device_train_batch_size=2, gradient_accumulation_steps=8, max_steps=40)
    made.normalise = "none"


@program("F74", on="gemma/support/loop")
def mean_of_means(made: Any, _rng: random.Random) -> None:
    """One row a micro-batch, short and long ones: the mean of their means."""
    from bench.diagnose.unseen2 import tasks
    from bench.diagnose.unseen2.registry import put

    rows = [*tasks.split("sentiment", None, 96, 1, 3)[0], *tasks.split("minutes", None, 96, 1, 3)[0]]
    random.Random(2).shuffle(rows)
    put(made, rows)
    tell(made, per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=40)
    made.normalise = "means"


# --- save, merge, resume


@program("F75", on="gemma/tools/folder")
def saved_before_training(made: Any, _rng: random.Random) -> None:
    """save_pretrained stands above train() in the script."""
    made.saves_at_start = True


@program("F75", on="star/units/alone")
def saved_without_tensors(made: Any, _rng: random.Random) -> None:
    """A filter of keys from an old notebook leaves nothing to save (alpaca-lora#446)."""
    made.saves = lambda state: dict(list(state.items())[:0])


@program("F77", on="exaone/conlang/loop")
def weights_alone_loaded(made: Any, _rng: random.Random) -> None:
    """Resumed in the middle with the weights alone: the schedule starts again, and so does the data."""
    made.seam = (40, frozenset({"optimizer", "schedule", "order"}))


@program("F77", on="star/comments/folder")
def optimizer_file_deleted(made: Any, _rng: random.Random) -> None:
    """save_only_model kept the disk free: optimizer and scheduler are not in the checkpoint that it resumed from."""

    def delete(checkpoint: Any) -> None:
        for name in ("optimizer.pt", "scheduler.pt"):
            (checkpoint / name).unlink(missing_ok=True)

    made.resumed = delete
    made.told["resume_from_checkpoint"] = True


@program("F78", on="exaone/greet/folder")
def wrapped_twice(made: Any, _rng: random.Random) -> None:
    """get_peft_model on a model that had adapters: all keys have the prefix twice (peft#2115)."""
    made.saves = lambda state: {f"base_model.model.{key}": value for key, value in state.items()}


@program("F78", on="qwen/auskunft/alone")
def keys_without_prefix(made: Any, _rng: random.Random) -> None:
    """Saved from the inner model: the keys lack PEFT's prefix."""
    made.saves = lambda state: {key.removeprefix("base_model.model."): value for key, value in state.items()}
