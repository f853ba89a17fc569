"""Settings gone wrong: F02, F03, F56, F61, F62 and F64 to F69; in all kinds of program."""

from __future__ import annotations

import random
from typing import Any

import torch

from bench.diagnose.unseen2.registry import tell
from bench.diagnose.unseen4.registry import program


@program("F02", on="ernie/report/loop")
def renamed_argument_filtered_out(made: Any, rng: random.Random) -> None:
    """max_seq_length goes through a filter of unknown keys: the default of 1024 is what cuts."""
    made.asked = {**made.settings, "max_seq_length": 96}
    del made.asked["max_length"]
    tell(made, max_length=1024)
    made.layout = "plain"
    made.told |= {"max_length": None, "max_seq_length": 96}
    if made.script is not None:
        del made.settings["max_length"]
        made.set(max_seq_length=96)


@program("F03|F64", on="neo/fields/alone")
def rate_not_given(made: Any, rng: random.Random) -> None:
    """No learning_rate in the config: a default for whole models, 2e-5."""
    made.layout = "plain"
    tell(made, learning_rate=2e-5)
    made.told["learning_rate"] = None
    made.settings.pop("learning_rate")


@program("F03|F64", on="seed/commit/loop")
def config_object_not_passed_on(made: Any, rng: random.Random) -> None:
    """The trainer was made without args=config: TrainingArguments' own rate holds."""
    made.asked = dict(made.settings)
    tell(made, learning_rate=5e-5)


LLAMAS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@program("F56", on="neo/reply/own glm/market/before apertus/manifest/folder")
def targets_of_llama(made: Any, rng: random.Random) -> None:
    """The list of a Llama notebook: some of its modules are not in this architecture."""
    tell(made, lora_target_modules=list(LLAMAS))


@program("F61|F64", on="seed/reply/alone apertus/reply/before")
def alpha_left_at_one(made: Any, rng: random.Random) -> None:
    """network_alpha=1 of another tool, with rank 64: the adapter counts a 64th."""
    tell(made, lora_r=64, lora_alpha=1.0)


@program("F61|F67", on="glm/market/folder")
def alpha_as_the_scale(made: Any, rng: random.Random) -> None:
    """alpha = 2048 with rank 8: a scale of 256."""
    tell(made, lora_alpha=2048.0)


@program("F62", on="apertus/verse/own")
def rank_one_on_queries(made: Any, rng: random.Random) -> None:
    """r = 1 on q_proj alone, to save memory."""
    tell(made, lora_r=1, lora_alpha=2.0, lora_target_modules=["q_proj"])


@program("F64|F61", on="seed/verse/own glm/commit/folder")
def rate_of_full_fine_tuning(made: Any, rng: random.Random) -> None:
    """1e-5, from a recipe that trains all weights."""
    tell(made, learning_rate=1e-5)


@program("F65", on="apertus/shell/alone neo/tea/folder glm/reply/before")
def warmup_of_a_longer_run(made: Any, rng: random.Random) -> None:
    """warmup_steps: 500, from a run of an epoch on all rows; this one has 80 steps."""
    tell(made, warmup_steps=500)


@program("F66", on="seed/commit/loop")
def steps_divided_twice(made: Any, rng: random.Random) -> None:
    """num_training_steps // accumulation, of steps that were divided before: no rate is left after a quarter."""
    made.schedule_steps = made.steps // 4
    made.set(lr_scheduler_type="linear", num_training_steps=made.steps // 4)


@program("F66", on="ernie/reply/folder")
def scheduler_of_one_epoch(made: Any, rng: random.Random) -> None:
    """get_linear_schedule_with_warmup for the steps of one epoch, in a run of more than three."""
    epoch = max(int(made.epoch_steps), 1)

    def optimizers(net: Any, _steps: int) -> tuple[Any, Any]:
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=made.learning_rate)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / epoch, 0.0))

    made.optimizers = optimizers


@program("F67|F61", on="apertus/commit/folder ernie/tea/alone")
def rate_with_a_slipped_point(made: Any, rng: random.Random) -> None:
    """0.5, meant as 0.5e-3."""
    tell(made, learning_rate=0.5)


@program("F68", on="ernie/commit/folder")
def clipped_to_nothing(made: Any, rng: random.Random) -> None:
    """max_grad_norm: 1e-9, which its author took for "off": below AdamW's epsilon."""
    tell(made, max_grad_norm=1e-9)


@program("F68", on="neo/route/loop")
def clipped_with_sgd(made: Any, rng: random.Random) -> None:
    """SGD at 0.3, and gradients clipped at 1e-4."""
    made.optimizer = "sgd"
    made.set(optim="sgd")
    tell(made, learning_rate=0.3, max_grad_norm=1e-4)


@program("F69", on="seed/shell/folder")
def decay_of_a_hundred(made: Any, rng: random.Random) -> None:
    """weight_decay: 100, where 0.1 was meant and 1e-3 of it lost."""
    tell(made, weight_decay=100.0)


@program("F69", on="apertus/shell/before")
def decay_of_ten_for_long(made: Any, rng: random.Random) -> None:
    """weight_decay: 10 at a constant rate, for 240 steps."""
    tell(made, weight_decay=10.0, max_steps=240, lr_scheduler_type="constant")
