"""The optimizer by its name in the config, and the learning rate of each step."""

from __future__ import annotations

import math
from typing import Any

import torch

from solotune.config.settings import OptimizerSettings, ScheduleSettings


def make_optimizer(settings: OptimizerSettings, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW by its name in `optim`. bitsandbytes' keeps moments in 8 bits; paged, it can move them to the host."""
    options: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
        "weight_decay": settings.weight_decay,
    }
    if settings.name == "adamw_torch":
        return torch.optim.AdamW(parameters, **options)
    from solotune.hardware.bnb import optim

    kinds = {
        "paged_adamw_8bit": optim.PagedAdamW8bit,
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw_32bit": optim.PagedAdamW32bit,
    }
    return kinds[settings.name](parameters, **options)


def learning_rate_at(settings: ScheduleSettings, step: int, total_steps: int) -> float:
    """The learning rate of `step` (from 0), as in transformers' schedule of the same name: a warm-up starts at 0.

    A plain function, not a scheduler object: resuming needs no state, and a diagnosis can compute any step.
    """
    warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * total_steps)
    if step < warmup and settings.type != "constant":
        return settings.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
        "constant_with_warmup": 1.0,
    }
    return settings.learning_rate * max(0.0, shape[settings.type])


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> float:
    """Set the learning rate of all parameter groups, and return it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    return learning_rate
