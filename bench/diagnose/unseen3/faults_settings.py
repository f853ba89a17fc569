"""Adapters, rates and schedules gone wrong: F02, F03 and F56 to F69.

How: values of a full fine-tuning, names of another architecture, steps counted per micro-batch, a scale that a new
rank left behind.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from bench.diagnose.ours import Job
from bench.diagnose.unseen2.registry import tell
from bench.diagnose.unseen3.registry import overridden, program
from bench.diagnose.unseen3.styles import IGNORE


@program("F02", on="said/minutes/loop smol/minutes/folder")
def length_under_its_old_name(made: Any, rng: random.Random) -> None:
    """max_seq_length, which this version does not read: rows are as long as they are."""
    del made.settings["max_length"]
    made.set(max_seq_length=128)
    made.layout = "plain"
    made.told = {"max_length": None, "max_seq_length": 128}


@program("F03|F64", on="hun/waybill/folder fold/ferry/alone")
def rate_left_to_the_library(made: Any, rng: random.Random) -> None:
    """No learning rate is given: Trainer's own is one for whole models."""
    made.layout = "plain"
    made.arguments = {"learning_rate": None}
    made.learning_rate = 5e-5
    made.told = {"learning_rate": None}
    made.settings.pop("learning_rate", None)


@program("F56", on="said/waybill/before fold/mood/own")
def names_of_another_family(made: Any, rng: random.Random) -> None:
    """Some targets exist here, the others are a different model's."""
    there = {"GPTBigCode": ["c_attn"], "Phi": ["q_proj", "v_proj"], "Nemotron": ["q_proj", "v_proj"]}
    family = made.base.kind.family
    tell(made, lora_target_modules=[*there.get(family, ["q_proj", "o_proj"]), "query_key_value", "W_pack", "wo"])


def _reentrant(model: Any) -> None:
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    model.get_input_embeddings()._forward_hooks.clear()
    model.train()


@program("F57", on="fold/waybill/loop said/ferry/loop")
def checkpointing_cuts_the_adapters_off(made: Any, rng: random.Random) -> None:
    """Reentrant checkpointing without enable_input_require_grads; the head alone learns."""
    made.adapters["modules_to_save"] = ["lm_head"]
    made.set(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True},
             modules_to_save=["lm_head"])  # fmt: skip
    made.touch.append(_reentrant)


def _frozen(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
        elif "norm" in name or "ln_" in name:
            parameter.requires_grad_(True)


@program("F58", on="smol/ledger/loop hun/steps/loop")
def frozen_after_wrapping(made: Any, rng: random.Random) -> None:
    """A loop over all parameters that was meant for the base; the norms were let go on."""
    made.touch.append(_frozen)


@program("F59", on="phi/ledger/loop fold/mood/folder")
def both_halves_random(made: Any, rng: random.Random) -> None:
    """init_lora_weights: false, for a quick start."""
    tell(made, init_lora_weights=False)


def _zero(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.zeros_(parameter)


@program("F60", on="smol/waybill/loop fold/snip/loop")
def both_halves_zero(made: Any, rng: random.Random) -> None:
    """An init function of one's own for reproducible runs."""
    made.touch.append(_zero)


@program("F61|F67", on="hun/waybill/own smol/ledger/folder")
def alpha_in_the_thousands(made: Any, rng: random.Random) -> None:
    """alpha was taken for a factor of the rank."""
    tell(made, lora_r=8, lora_alpha=4096.0)


@program("F61|F64", on="hun/mood/before")
def rank_raised_and_alpha_left(made: Any, rng: random.Random) -> None:
    """r = 64 with the alpha of a rank of half."""
    tell(made, lora_r=64, lora_alpha=0.5)


@program("F62", on="smol/huerta/own hun/ferry/before")
def rank_one_on_one_projection(made: Any, rng: random.Random) -> None:
    """r = 1 on the queries."""
    target = ["c_proj"] if made.base.kind.family == "GPTBigCode" else ["q_proj"]
    tell(made, lora_r=1, lora_alpha=1.0, lora_target_modules=target)


@program("F63", on="fold/ledger/loop said/snip/loop")
def head_multiplied_by_hand(made: Any, rng: random.Random) -> None:
    """lm_head is among the targets, and a fused loss multiplies with its base weight."""
    targets = [*made.adapters["target_modules"], "lm_head"]
    tell(made, lora_target_modules=targets)

    def loss(self: Any, old: Any, model: Any, batch: Any) -> Any:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        inner = model.get_base_model()
        body = getattr(inner, "model", None) or inner.transformer
        hidden_BTD = body(**inputs, use_cache=False).last_hidden_state[:, :-1]
        weight_VD = inner.lm_head.base_layer.weight
        wanted = batch["labels"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy((hidden_BTD @ weight_VD.T).flatten(0, 1), wanted, ignore_index=IGNORE)

    overridden(made, loss=loss)


@program("F64|F61", on="smol/ferry/own hun/ledger/alone phi/mood/before")
def rate_of_a_full_tuning(made: Any, rng: random.Random) -> None:
    """The rate of a paper on whole models."""
    tell(made, learning_rate=4e-6)


@program("F65", on="smol/steps/folder phi/ledger/alone")
def warmup_beyond_the_end(made: Any, rng: random.Random) -> None:
    """A warm-up that was counted in micro-batches of a longer run."""
    tell(made, warmup_steps=1200, lr_scheduler_type="linear")


@program("F66", on="fold/huerta/loop")
def schedule_of_a_shorter_run(made: Any, rng: random.Random) -> None:
    """scheduler.step() is called for every micro-batch: the rate is zero after a quarter."""
    tell(made, gradient_accumulation_steps=4, per_device_train_batch_size=2)
    made.schedule_steps = made.steps // 4


@program("F66", on="hun/ledger/alone")
def schedule_made_by_hand(made: Any, rng: random.Random) -> None:
    """Trainer is given an optimizer and a schedule whose steps were divided twice."""

    def optimizers(model: Any, steps: int) -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=made.learning_rate)
        last = max(steps // 8, 1)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / last))

    made.optimizers = optimizers


@program("F67|F61", on="said/mood/own hun/steps/alone phi/waybill/before")
def rate_with_a_digit_lost(made: Any, rng: random.Random) -> None:
    """0.6 instead of 6e-3."""
    tell(made, learning_rate=0.6)


@program("F68", on="phi/steps/folder")
def clipped_below_epsilon(made: Any, rng: random.Random) -> None:
    """max_grad_norm of 1e-9, below Adam's epsilon."""
    tell(made, max_grad_norm=1e-9)


@program("F68", on="smol/mood/loop")
def clipped_under_sgd(made: Any, rng: random.Random) -> None:
    """SGD, which does feel a norm of 1e-4."""
    made.optimizer = "sgd"
    tell(made, max_grad_norm=1e-4, learning_rate=0.1)
    made.set(optim="sgd")


@program("F69", on="phi/ferry/folder")
def decay_a_thousand_times_too_large(made: Any, rng: random.Random) -> None:
    """weight_decay of 100, where a tenth was meant."""
    tell(made, weight_decay=100.0)


@program("F69", on="smol/waybill/before")
def decay_at_the_limit(made: Any, rng: random.Random) -> None:
    """The largest decay that the tool takes, over a long run with a constant rate."""
    tell(made, weight_decay=10.0, learning_rate=1.5e-2, lr_scheduler_type="constant")


_ = Job
