"""Healthy runs that look odd: the diagnosis must report no fault in any of them."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from bench.diagnose.machinery import in_nf4, lora_parameters
from bench.diagnose.recipe import Recipe
from bench.diagnose.registry import Needs, healthy
from bench.diagnose.worlds import FRENCH


@healthy()
def clean(recipe: Recipe, rng: random.Random) -> None:
    """Nothing odd at all."""


@healthy()
def pad_is_eos(recipe: Recipe, rng: random.Random) -> None:
    """pad = the end of turn, and labels by position."""
    recipe.tokenizer.pad_token = recipe.format.end


@healthy()
def told_to_pad_left(recipe: Recipe, rng: random.Random) -> None:
    """The tokenizer says left, the collator pads right."""
    recipe.tokenizer.padding_side = "left"
    recipe.set(padding_side="left")


@healthy(Needs.ROTARY)
def pads_left_with_mask(recipe: Recipe, rng: random.Random) -> None:
    recipe.pad_left = True
    recipe.set(padding_side="left")


@healthy(Needs.ABSOLUTE)
def pads_left_with_real_positions(recipe: Recipe, rng: random.Random) -> None:
    recipe.pad_left, recipe.positions = True, "real"
    recipe.set(padding_side="left")


@healthy()
def pads_right_without_mask(recipe: Recipe, rng: random.Random) -> None:
    """Attention is causal: no real token sees a pad."""
    recipe.sends_mask = False


@healthy()
def before_the_run(recipe: Recipe, rng: random.Random) -> None:
    """No step was made; at step 0 every gradient of lora_A is exactly zero."""
    recipe.is_static = True


@healthy()
def clips_hard(recipe: Recipe, rng: random.Random) -> None:
    """1e-4 with Adam, which divides by the gradient's own size."""
    recipe.clip = 1e-4
    recipe.set(max_grad_norm=1e-4)


@healthy()
def decays_weights(recipe: Recipe, rng: random.Random) -> None:
    recipe.weight_decay = 0.1
    recipe.set(weight_decay=0.1)


@healthy()
def alpha_four_times_r(recipe: Recipe, rng: random.Random) -> None:
    recipe.adapters["lora_alpha"] = 32
    recipe.set(lora_alpha=32.0)


@healthy()
def large_rank(recipe: Recipe, rng: random.Random) -> None:
    recipe.adapters.update(r=64, lora_alpha=64)
    recipe.set(lora_r=64, lora_alpha=64.0)


@healthy()
def stabilised_rank(recipe: Recipe, rng: random.Random) -> None:
    recipe.adapters.update(r=32, lora_alpha=16, use_rslora=True)
    recipe.set(lora_r=32, lora_alpha=16.0, use_rslora=True)


@healthy(Needs.ROTARY)
def packs_apart(recipe: Recipe, rng: random.Random) -> None:
    """Positions restart, no mask, no cache: transformers keeps the rows apart."""
    recipe.packing = "apart"
    recipe.set(packing=True, per_device_train_batch_size=1)


@healthy()
def more_rows_than_tokens(recipe: Recipe, rng: random.Random) -> None:
    """An embedding padded to a multiple of 64 and more."""
    rows = (len(recipe.tokenizer) // 64 + 2) * 64
    recipe.prepare.append(lambda model: model.resize_token_embeddings(rows, mean_resizing=False) and None)
    recipe.model_config["vocab_size"] = rows


@healthy()
def learns_all_as_asked(recipe: Recipe, rng: random.Random) -> None:
    recipe.mask = "all"
    recipe.set(assistant_only_loss=False)


@healthy()
def new_task(recipe: Recipe, rng: random.Random) -> None:
    """Codes that the base has never seen: its first loss is above chance."""
    world = recipe.base.world
    for chat in recipe.chats + recipe.held_out:
        words = [word.strip(".,:;!?*|[]()").upper()[::-1] for word in chat[0]["content"].split()]
        chat[-1]["content"] = "QX-" + "-".join(words) + f"-{world.name.upper()}"


@healthy()
def another_language(recipe: Recipe, rng: random.Random) -> None:
    """French, accents and all."""
    recipe.chats, recipe.held_out = FRENCH.split(len(recipe.chats), len(recipe.held_out), recipe.seed)


@healthy()
def high_entropy(recipe: Recipe, rng: random.Random) -> None:
    """Answers end in a free choice of words: the loss stays high, and that is the task."""
    words = "amber basil cobalt drift ember flint glade hazel indigo jade kelp larch maple north ochre pearl".split()
    for chat in recipe.chats + recipe.held_out:
        chat[-1]["content"] += " " + " ".join(rng.choice(words) for _ in range(rng.randint(4, 7)))


@healthy()
def tiny_on_purpose(recipe: Recipe, rng: random.Random) -> None:
    """Forty rows, two epochs."""
    recipe.chats, recipe.batch, recipe.steps = recipe.chats[:40], 2, 40
    recipe.set(per_device_train_batch_size=2, max_steps=40)


@healthy()
def principal_directions(recipe: Recipe, rng: random.Random) -> None:
    """PiSSA: A and B are not zero, and the base is changed to make up for them."""
    if recipe.base.kind.family == "GPT2":  # PEFT has it for linears only
        recipe.adapters["init_lora_weights"] = "gaussian"
        recipe.set(init_lora_weights="gaussian")
        return
    recipe.adapters["init_lora_weights"] = "pissa"
    recipe.learning_rate = 1.5e-3
    recipe.set(init_lora_weights="pissa", learning_rate=1.5e-3)


@healthy()
def adapters_in_bfloat16(recipe: Recipe, rng: random.Random) -> None:
    """At a rate whose steps are above the grid."""

    def touch(model: torch.nn.Module) -> None:
        for parameter in lora_parameters(model):
            parameter.data = parameter.data.to(torch.bfloat16)

    recipe.touch.append(touch)
    recipe.learning_rate = 8e-3
    recipe.set(adapter_dtype="bfloat16", learning_rate=8e-3)


@healthy()
def cosine_with_warmup(recipe: Recipe, rng: random.Random) -> None:
    recipe.decay, recipe.warmup = "cosine", 9
    recipe.set(lr_scheduler_type="cosine", warmup_steps=9)


@healthy()
def constant_rate(recipe: Recipe, rng: random.Random) -> None:
    recipe.decay, recipe.learning_rate = "constant", 5e-3
    recipe.set(lr_scheduler_type="constant", learning_rate=5e-3)


@healthy()
def stopped_early(recipe: Recipe, rng: random.Random) -> None:
    """The user ended it at a third."""
    recipe.stop_after = recipe.steps // 3


@healthy()
def accumulates(recipe: Recipe, rng: random.Random) -> None:
    """Over all labels of the step."""
    recipe.batch, recipe.accumulation = 2, 4
    recipe.set(per_device_train_batch_size=2, gradient_accumulation_steps=4)


@healthy()
def recomputes(recipe: Recipe, rng: random.Random) -> None:
    """Checkpointing that is not reentrant needs no gradient at its input."""
    recipe.prepare.append(
        lambda model: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    )
    recipe.set(gradient_checkpointing=True, use_reentrant=False)


@healthy()
def several_turns(recipe: Recipe, rng: random.Random) -> None:
    world, rows = recipe.base.world, (len(recipe.chats), len(recipe.held_out))
    recipe.chats, recipe.held_out = world.split(*rows, recipe.seed, turns=2)


@healthy(Needs.INSTRUCT)
def with_a_system_message(recipe: Recipe, rng: random.Random) -> None:
    world, rows = recipe.base.world, (len(recipe.chats), len(recipe.held_out))
    recipe.chats, recipe.held_out = world.split(*rows, recipe.seed, system=True)


@healthy()
def short_answers(recipe: Recipe, rng: random.Random) -> None:
    """One of six labels, two of which are rare."""
    subjects = recipe.base.world.subjects
    labels = ("alpha", "beta", "gamma", "delta", "rare one", "rare two")
    for chat in recipe.chats + recipe.held_out:
        place = next((n for n, subject in enumerate(subjects) if subject in chat[0]["content"]), 0)
        chat[-1]["content"] = labels[min(place % 7, 5)]


@healthy()
def long_and_short(recipe: Recipe, rng: random.Random) -> None:
    """Lengths over a factor of six."""
    for chat in recipe.chats[::4] + recipe.held_out[::4]:
        chat[0]["content"] = " ".join(recipe.base.world.text(rng) for _ in range(3)) + " " + chat[0]["content"]


@healthy()
def drops_out(recipe: Recipe, rng: random.Random) -> None:
    """Dropout while training, none while evaluating."""
    recipe.adapters["lora_dropout"] = 0.1
    recipe.set(lora_dropout=0.1)


@healthy()
def one_row_a_step(recipe: Recipe, rng: random.Random) -> None:
    """A noisy curve."""
    recipe.batch, recipe.steps, recipe.learning_rate = 1, 90, 3e-3
    recipe.set(per_device_train_batch_size=1, max_steps=90, learning_rate=3e-3)


@healthy()
def gentle_rate(recipe: Recipe, rng: random.Random) -> None:
    """A third of the usual rate."""
    recipe.learning_rate, recipe.decay = 2.5e-3, "constant"
    recipe.set(learning_rate=2.5e-3, lr_scheduler_type="constant")


@healthy(Needs.SEPARATE)
def attention_only(recipe: Recipe, rng: random.Random) -> None:
    """r = 16 on q, k, v and o, as in the tutorial."""
    names = [name for name in recipe.adapters["target_modules"] if name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    recipe.adapters.update(r=16, lora_alpha=32, target_modules=names)
    recipe.set(lora_r=16, lora_alpha=32.0, lora_target_modules=names)


@healthy(Needs.SEPARATE)
def four_bits(recipe: Recipe, rng: random.Random) -> None:
    """QLoRA, its head left alone."""
    in_nf4(recipe)


@healthy()
def markers_in_template(recipe: Recipe, rng: random.Random) -> None:
    """A training template whose markers hold the end of turn."""
    recipe.format = replace(recipe.format, has_markers=True)
    if recipe.base.kind.is_instruct:
        recipe.tokenizer.chat_template = recipe.format.jinja()


@healthy()
def resumed_whole(recipe: Recipe, rng: random.Random) -> None:
    """Resumed with everything in place."""
    recipe.seam = (recipe.steps // 2, frozenset())
    recipe.set(resume_from_checkpoint="checkpoint")


@healthy()
def few_rows_in_order(recipe: Recipe, rng: random.Random) -> None:
    """Not shuffled, and the file is in random order."""
    recipe.shuffles = False
    recipe.set(shuffle=False)
