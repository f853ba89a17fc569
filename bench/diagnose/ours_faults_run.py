"""The rest of `ours_faults`: of the held-out rows, adapter and optimiser, and of what happens to a run afterwards."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from bench.diagnose.ours import Job, asked
from bench.diagnose.registry import Needs

# --- held-out rows


@asked("F43", before=True)
def evaluated_on_training(job: Job, rng: random.Random) -> None:
    job.held_out = rng.sample(job.train, 32)


@asked("F44", before=True)
def leaked(job: Job, rng: random.Random) -> None:
    """A third of the held-out rows are among the others, with a word more."""
    for place in range(0, len(job.held_out), 3):
        first, *others = job.held_out[place]["messages"]
        job.train.append({"messages": [{**first, "content": first["content"] + " Please."}, *others]})


@asked("F48", before=True)
def few_held_out(job: Job, rng: random.Random) -> None:
    job.held_out = job.held_out[:3]


@asked("F46")
def memorised(job: Job, rng: random.Random) -> None:
    """So many epochs of so few rows that nothing is left to learn."""
    job.train = job.train[:16]
    del job.config["max_steps"]
    job.config.update(num_train_epochs=60, learning_rate=1e-2)


# --- adapter


@asked("F56", Needs.SEPARATE, before=True)
def targets_of_another_family(job: Job, rng: random.Random) -> None:
    job.config["lora_target_modules"] = ["q_proj", "v_proj", "c_attn", "query_key_value"]


@asked("F61")
def scale_too_small(job: Job, rng: random.Random) -> None:
    rank = rng.choice((16, 32))
    job.config.update(lora_r=rank, lora_alpha=rank * rng.choice((0.002, 0.005)))


@asked("F61")
def scale_too_large(job: Job, rng: random.Random) -> None:
    job.config.update(lora_r=4, lora_alpha=4.0 * rng.choice((512, 1024)))


@asked("F62", Needs.SEPARATE)
def too_little_capacity(job: Job, rng: random.Random) -> None:
    job.config.update(lora_r=1, lora_alpha=2.0, lora_target_modules=["q_proj"])


# --- optimiser


@asked("F64")
def rate_far_too_low(job: Job, rng: random.Random) -> None:
    job.config["learning_rate"] *= rng.choice((0.003, 0.001, 0.0001))


@asked("F64")
def rate_too_low(job: Job, rng: random.Random) -> None:
    job.config["learning_rate"] *= rng.choice((0.02, 0.01))


@asked("F67")
def rate_too_high(job: Job, rng: random.Random) -> None:
    job.config["learning_rate"] = rng.choice((0.3, 0.6, 1.0))


@asked("F65", before=True)
def warms_up_all_the_time(job: Job, rng: random.Random) -> None:
    """In steps, of a run that is given in epochs."""
    del job.config["max_steps"]
    job.config.update(num_train_epochs=2, warmup_steps=rng.choice((600, 900, 2000)))


@asked("F65", before=True)
def warmup_ratio_nearly_one(job: Job, rng: random.Random) -> None:
    job.config["warmup_ratio"] = rng.choice((0.9, 0.95))


@asked("F68")
def clipped_to_nothing(job: Job, rng: random.Random) -> None:
    job.config["max_grad_norm"] = rng.choice((1e-9, 1e-8))


@asked("F69", before=True)
def decays_everything(job: Job, rng: random.Random) -> None:
    job.config.update(weight_decay=10.0, max_steps=rng.choice((400, 500)), eval_steps=100)


@asked("F65")
def warms_up_and_base_is_gone(job: Job, rng: random.Random) -> None:
    """The model's folder was moved since: what is written in the run directory has to do."""
    job.config["warmup_ratio"] = rng.choice((0.9, 0.95))
    job.after.append(lambda run, model: model.rename(model.with_name("elsewhere")) and None)


# --- what happens to a run afterwards


@asked("F75")
def adapter_zeroed(job: Job, rng: random.Random) -> None:
    """The files are there, and all of B is zero."""
    job.after.append(lambda run, model: _edit_adapter(run, lambda n, t: t * 0 if "lora_B" in n else t))


@asked("F78")
def adapter_keys_renamed(job: Job, rng: random.Random) -> None:
    """A converter of keys has been at it."""

    def change(run: Path, model: Path) -> None:
        file = run / "adapter" / "adapter_model.safetensors"
        from safetensors.torch import load_file, save_file

        save_file({name.replace("base_model.model.", "module."): t for name, t in load_file(file).items()}, file)

    job.after.append(change)


@asked("F78")
def base_replaced(job: Job, rng: random.Random) -> None:
    """Another model of the same architecture lies in the folder now."""

    def change(run: Path, model: Path) -> None:
        from safetensors.torch import load_file, save_file

        file = model / "model.safetensors"
        generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
        tensors = {}
        for name, t in load_file(file).items():
            noise = torch.randn(t.shape, generator=generator)
            tensors[name] = t if t.ndim < 2 else t + 0.1 * t.std() * noise
        save_file(tensors, file, metadata={"format": "pt"})

    job.after.append(change)


def _edit_adapter(run: Path, edit: Any) -> None:
    from safetensors.torch import load_file, save_file

    file = run / "adapter" / "adapter_model.safetensors"
    save_file({name: edit(name, tensor).contiguous() for name, tensor in load_file(file).items()}, file)
