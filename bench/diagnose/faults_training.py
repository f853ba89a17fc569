"""Faults of adapters (S12), optimiser and schedule (S13), loop (S14)."""

from __future__ import annotations

import logging
import random
from typing import Any

import torch

from bench.diagnose.machinery import activation_limit, lora_parameters, of_8b, out_of_memory
from bench.diagnose.recipe import Recipe, linears
from bench.diagnose.registry import fault


@fault("F56")
def foreign_targets(recipe: Recipe, rng: random.Random) -> None:
    """Most names are those of another architecture."""
    own = linears(recipe.base)
    foreign = ["query_key_value", "dense_h_to_4h"] if recipe.base.kind.family == "GPT2" else ["c_attn", "fc9", "wi_0"]
    recipe.adapters["target_modules"] = [own[0], *foreign]
    recipe.set(lora_target_modules=[own[0], *foreign])


@fault("F57")
def no_gradient(recipe: Recipe, rng: random.Random) -> None:
    """Reentrant checkpointing whose input needs no gradient; the head trains, so nothing complains."""
    recipe.prepare.append(
        lambda model: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    )
    recipe.adapters["modules_to_save"] = ["lm_head"]

    def touch(model: Any) -> None:
        model.get_input_embeddings()._forward_hooks.clear()

    recipe.touch.append(touch)
    recipe.set(gradient_checkpointing=True, use_reentrant=True, modules_to_save=["lm_head"])


@fault("F58")
def frozen(recipe: Recipe, rng: random.Random) -> None:
    """The adapters do not train, the head does."""
    recipe.adapters["modules_to_save"] = ["lm_head"]
    recipe.set(modules_to_save=["lm_head"])
    recipe.touch.append(lambda model: [p.requires_grad_(False) for p in lora_parameters(model)] and None)


@fault("F58")
def half_frozen(recipe: Recipe, rng: random.Random) -> None:
    """B does not train, so nothing ever changes."""
    recipe.touch.append(lambda model: [p.requires_grad_(False) for p in lora_parameters(model, "B")] and None)


@fault("F59")
def random_b(recipe: Recipe, rng: random.Random) -> None:
    """B is random too: the base is another model at step 0."""
    recipe.adapters["init_lora_weights"] = False
    recipe.set(init_lora_weights=False)


@fault("F60")
def zero_a(recipe: Recipe, rng: random.Random) -> None:
    def touch(model: torch.nn.Module) -> None:
        for parameter in lora_parameters(model):
            parameter.data.zero_()

    recipe.touch.append(touch)


@fault("F61")
def scale_too_small(recipe: Recipe, rng: random.Random) -> None:
    """r was raised and alpha forgotten."""
    r, alpha = rng.choice(((64, 1), (32, 0.5), (64, 2)))
    recipe.adapters.update(r=r, lora_alpha=alpha)
    recipe.set(lora_r=r, lora_alpha=float(alpha))


@fault("F61")
def scale_too_large(recipe: Recipe, rng: random.Random) -> None:
    """alpha was taken for alpha/r."""
    alpha = rng.choice((2048, 3072, 4096))
    recipe.adapters["lora_alpha"] = alpha
    recipe.set(lora_alpha=float(alpha))


@fault("F62")
def too_little_capacity(recipe: Recipe, rng: random.Random) -> None:
    only = linears(recipe.base)[:1]
    recipe.adapters.update(r=1, lora_alpha=2, target_modules=only)
    recipe.set(lora_r=1, lora_alpha=2.0, lora_target_modules=only)


@fault("F63")
def head_adapter_ignored(recipe: Recipe, rng: random.Random) -> None:
    """A fused head multiplies the raw weight, so the adapter on it does nothing."""
    names = [*linears(recipe.base), "lm_head"]
    recipe.adapters["target_modules"] = names
    recipe.set(lora_target_modules=names)

    def loss_of(model: Any, batch: dict[str, torch.Tensor], _step: int) -> torch.Tensor:
        inner = model.get_base_model()
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden_BTD = inner.base_model(**inputs, use_cache=False).last_hidden_state
        logits_BTV = hidden_BTD @ inner.lm_head.base_layer.weight.T
        return torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
        )

    recipe.loss_of = loss_of


@fault("F64")
def rate_too_low(recipe: Recipe, rng: random.Random) -> None:
    recipe.learning_rate *= rng.choice((0.004, 0.008, 0.015, 0.025))
    recipe.set(learning_rate=recipe.learning_rate)


@fault("F65")
def warmup_too_long(recipe: Recipe, rng: random.Random) -> None:
    recipe.warmup = recipe.steps * rng.randint(6, 25)
    recipe.set(warmup_steps=recipe.warmup)


@fault("F66")
def decayed_early(recipe: Recipe, rng: random.Random) -> None:
    """The schedule was made for a fraction of the steps."""
    recipe.schedule_steps = int(recipe.steps * rng.uniform(0.06, 0.2))
    recipe.decay = rng.choice(("linear", "cosine"))
    recipe.set(lr_scheduler_type=recipe.decay)


@fault("F67")
def rate_too_high(recipe: Recipe, rng: random.Random) -> None:
    recipe.learning_rate *= rng.choice((20, 40, 80))
    recipe.set(learning_rate=recipe.learning_rate)


@fault("F68")
def clipped_away(recipe: Recipe, rng: random.Random) -> None:
    """Clipped to the size of Adam's epsilon."""
    recipe.clip = rng.choice((1e-8, 3e-9, 1e-9))
    recipe.set(max_grad_norm=recipe.clip)


@fault("F68")
def clipped_away_without_adam(recipe: Recipe, rng: random.Random) -> None:
    """SGD, whose step is as long as the gradient."""
    recipe.optimizer, recipe.learning_rate, recipe.clip = "sgd", 0.5, rng.choice((1e-4, 3e-4))
    recipe.set(optim="sgd", learning_rate=0.5, max_grad_norm=recipe.clip)


@fault("F69")
def decays_too_much(recipe: Recipe, rng: random.Random) -> None:
    recipe.weight_decay = rng.choice((30.0, 50.0, 80.0))
    recipe.set(weight_decay=recipe.weight_decay)


@fault("F70")
def optimizer_fills_the_card(recipe: Recipe, rng: random.Random) -> None:
    """Embeddings and head train whole in 32-bit Adam: the card is full at the first step of the optimizer."""
    of_8b(recipe, optim="adamw_torch", modules_to_save=["embed_tokens", "lm_head"], max_length=512)

    class Adam(torch.optim.AdamW):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            raise out_of_memory(2 * 128256 * 4096 * 4)

    recipe.optimizer_class = Adam


@fault("F71")
def no_checkpointing(recipe: Recipe, rng: random.Random) -> None:
    """Activations of all layers are kept: full in the forward pass of the first steps."""
    recipe.crash = activation_limit(recipe, times=rng.uniform(0.5, 0.9), from_step=1)
    of_8b(recipe, gradient_checkpointing=False, max_length=2048, per_device_train_batch_size=8)


@fault("F72")
def logits_fill_the_card(recipe: Recipe, rng: random.Random) -> None:
    """[B, T, V] in float32, at the loss."""
    batch, length = rng.choice(((4, 8192), (8, 8192), (8, 4096)))
    of_8b(recipe, max_length=length, per_device_train_batch_size=batch, compute_metrics=True)

    def for_causal_lm_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        # Upcast to float if we need to compute the loss
        raise out_of_memory(batch * length * 128256 * 4.0)

    def loss_of(model: Any, given: dict[str, torch.Tensor], _step: int) -> torch.Tensor:
        return for_causal_lm_loss(model(input_ids=given["input_ids"], use_cache=False).logits, given["labels"])

    recipe.loss_of = loss_of


@fault("F73")
def recompiles(recipe: Recipe, rng: random.Random) -> None:
    """torch.compile on rows of ever another length; what dynamo says of it is caught from its own log."""
    recipe.set(torch_compile=True, per_device_train_batch_size=1)
    recipe.batch = 1
    recipe.steps = 40
    recipe.set(max_steps=40)
    recipe.warnings += _dynamo_warnings()


def _dynamo_warnings() -> list[str]:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("torch._dynamo")
    logger.addHandler(handler)
    compiled = torch.compile(lambda x: (x * 2).sum(), backend="eager", dynamic=False)
    for length in range(2, 14):
        compiled(torch.ones(length))
    logger.removeHandler(handler)
    torch._dynamo.reset()
    return [text for text in heard if "recompile" in text][:1]


@fault("F74")
def summed_losses(recipe: Recipe, rng: random.Random) -> None:
    """Accumulated without dividing."""
    recipe.batch, recipe.accumulation, recipe.normalise = 2, rng.choice((4, 8)), "none"
    recipe.set(per_device_train_batch_size=2, gradient_accumulation_steps=recipe.accumulation)


@fault("F74")
def mean_of_means(recipe: Recipe, rng: random.Random) -> None:
    """Each micro-batch counts alike, however few labels it has."""
    unequal_answers(recipe, rng)
    recipe.batch, recipe.accumulation, recipe.normalise = 1, 8, "means"
    recipe.set(per_device_train_batch_size=1, gradient_accumulation_steps=8)


def unequal_answers(recipe: Recipe, rng: random.Random) -> None:
    """Two thirds of the answers are one word, the others longer than before."""
    for number, chat in enumerate(recipe.chats + recipe.held_out):
        if number % 3:
            chat[-1]["content"] = rng.choice(chat[-1]["content"].split(" ")[1:])
        else:
            chat[-1]["content"] += " " + recipe.base.world.text(rng)
