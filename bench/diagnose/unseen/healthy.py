"""What looks odd and is right, in runs of loops and Trainer."""

from __future__ import annotations

import random
from dataclasses import replace

import torch

from bench.diagnose.machinery import in_nf4, lora_parameters
from bench.diagnose.unseen.faults_rows import lengths, redeploy, token
from bench.diagnose.unseen.make import Made
from bench.diagnose.unseen.registry import program


@program(on=("phi/house/loop", "cohere/house/loop", "olmo/house/loop", "granite/code/loop", "seek/sql/loop"))
def plain(recipe: Made, rng: random.Random) -> None:
    """Nothing odd; pad = eos on granite, three end ids on phi, no template on olmo."""


@program(on=("phi/report/loop", "granite/report/loop", "seek/report/folder"))
def formulaic_reports(recipe: Made, rng: random.Random) -> None:
    """Most words of an answer are in every answer."""


@program(on=("granite/classes/loop", "seek/classes/alone"))
def one_label(recipe: Made, rng: random.Random) -> None:
    """An answer is one of a few labels."""


@program(on=("olmo/short/loop", "cohere/short/folder"))
def two_words(recipe: Made, rng: random.Random) -> None:
    """Short answers to short questions."""


@program(on=("granite/tools/loop", "phi/tools/folder"))
def calls_and_results(recipe: Made, rng: random.Random) -> None:
    """Three turns; every answer is learned."""


@program(on=("olmo/languages/loop", "seek/languages/alone"))
def four_languages(recipe: Made, rng: random.Random) -> None:
    """French, Spanish, Italian, Swedish."""


@program(on=("cohere/extract/loop", "olmo/extract/loop"))
def long_prompts(recipe: Made, rng: random.Random) -> None:
    """A passage and a question, and three words of answer."""


@program(on=("seek/table/loop", "phi/as_json/alone"))
def tables_and_json(recipe: Made, rng: random.Random) -> None:
    """Frames of signs that all answers share."""


@program(on=("granite/steps/folder", "olmo/house/alone"))
def plain_folder(recipe: Made, rng: random.Random) -> None:
    """Trainer's folder, and nothing odd."""


@program(on="phi/steps/loop")
def two_rows_cut(recipe: Made, rng: random.Random) -> None:
    """max_length takes the end from two rows of 192."""
    recipe.max_length = lengths(recipe)[-3] - 1
    recipe.set(max_length=recipe.max_length)


@program(on="granite/as_json/loop")
def rows_end_with_thanks(recipe: Made, rng: random.Random) -> None:
    """One chat in six ends with the user."""
    for chat in recipe.chats[::6]:
        chat.append({"role": "user", "content": "Thanks, good bye."})


@program(on=("seek/house/loop", "phi/table/loop"))
def packed_apart(recipe: Made, rng: random.Random) -> None:
    """Positions restart, no mask, no cache."""
    recipe.packing, recipe.window = "apart", 224
    recipe.set(packing=True, per_device_train_batch_size=1, max_length=224)


@program(on="granite/house/loop")
def padded_left_with_mask(recipe: Made, rng: random.Random) -> None:
    """Rotary positions do not mind."""
    recipe.pad_left = True
    recipe.set(padding_side="left")


@program(on="cohere/table/loop")
def padded_to_a_multiple(recipe: Made, rng: random.Random) -> None:
    """pad_to_multiple_of 32: half of some batches is padding."""

    def collated(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        gap = -batch["input_ids"].shape[1] % 32
        fill = {"input_ids": recipe.tokenizer.pad_token_id, "labels": -100, "attention_mask": 0}
        return {name: torch.nn.functional.pad(t, (0, gap), value=fill[name]) for name, t in batch.items()}

    recipe.collated = collated


@program(on="phi/as_json/loop")
def pad_set_to_unk(recipe: Made, rng: random.Random) -> None:
    """pad_token = unk, as in many scripts."""
    recipe.tokenizer.pad_token = "<unk>"


@program(on="seek/steps/loop")
def pad_is_eos(recipe: Made, rng: random.Random) -> None:
    """pad = eos, and labels by position."""
    recipe.tokenizer.pad_token = recipe.tokenizer.eos_token


@program(on="cohere/as_json/loop")
def two_end_ids(recipe: Made, rng: random.Random) -> None:
    """Generation stops at the end of turn and at the end of text."""
    recipe.generation_config["eos_token_id"] = [token(recipe, "<|END_OF_TURN_TOKEN|>"), token(recipe, "<EOS_TOKEN>")]


@program(on=("olmo/steps/loop", "cohere/house/alone"))
def every_token_as_asked(recipe: Made, rng: random.Random) -> None:
    """assistant_only_loss: false, and so it is done."""
    recipe.mask = "all"
    recipe.set(assistant_only_loss=False)


@program(on=("phi/house/alone", "seek/as_json/loop"))
def resumed_whole(recipe: Made, rng: random.Random) -> None:
    """Resumed from a whole checkpoint."""
    recipe.resumed = lambda checkpoint: None
    recipe.seam = (25, frozenset())
    recipe.set(resume_from_checkpoint="checkpoint-25")


@program(on=("granite/house/alone", "cohere/steps/loop"))
def ended_by_hand(recipe: Made, rng: random.Random) -> None:
    """Stopped after 50 of 80 steps."""
    recipe.stop_after = 50


@program(on=("olmo/house/loop", "phi/table/folder"))
def gentle(recipe: Made, rng: random.Random) -> None:
    """A fifth of the rate, and more steps."""
    recipe.learning_rate, recipe.decay, recipe.steps = 1.4e-3, "constant", 140
    recipe.set(learning_rate=1.4e-3, lr_scheduler_type="constant", max_steps=140)


@program(on="seek/house/folder")
def brisk(recipe: Made, rng: random.Random) -> None:
    """1.5e-2 with a warm-up, cosine."""
    recipe.learning_rate, recipe.decay, recipe.warmup = 1.5e-2, "cosine", 8
    recipe.set(learning_rate=1.5e-2, lr_scheduler_type="cosine", warmup_steps=8)


@program(on=("phi/house/folder", "olmo/table/loop"))
def few_targets_high_rank(recipe: Made, rng: random.Random) -> None:
    """Attention's way out and the MLP's way down, r = 32."""
    names = ["o_proj", "down_proj"]
    recipe.adapters.update(target_modules=names, r=32, lora_alpha=64)
    recipe.set(lora_target_modules=names, lora_r=32, lora_alpha=64.0)


@program(on="cohere/languages/loop")
def rank_stabilised(recipe: Made, rng: random.Random) -> None:
    """rsLoRA, r = 48."""
    recipe.adapters.update(r=48, lora_alpha=12, use_rslora=True)
    recipe.set(lora_r=48, lora_alpha=12.0, use_rslora=True)


@program(on="granite/short/loop")
def two_held_out_of_many_epochs(recipe: Made, rng: random.Random) -> None:
    """Dropout of a tenth, decay of a tenth, clipped at 0.1."""
    recipe.adapters["lora_dropout"] = 0.1
    recipe.weight_decay, recipe.clip = 0.1, 0.1
    recipe.set(lora_dropout=0.1, weight_decay=0.1, max_grad_norm=0.1)


@program(on="phi/code/loop")
def small_steps_gathered(recipe: Made, rng: random.Random) -> None:
    """Two rows four times, over all labels of the step."""
    recipe.batch, recipe.accumulation = 2, 4
    recipe.set(per_device_train_batch_size=2, gradient_accumulation_steps=4)


@program(on="seek/code/loop")
def four_bits(recipe: Made, rng: random.Random) -> None:
    """QLoRA with its head left alone."""
    in_nf4(recipe)


@program(on="olmo/sql/loop")
def head_trained_whole(recipe: Made, rng: random.Random) -> None:
    """modules_to_save: lm_head, and a lower rate."""
    recipe.adapters["modules_to_save"] = ["lm_head"]
    recipe.learning_rate = 3e-3
    recipe.set(modules_to_save=["lm_head"], learning_rate=3e-3)


@program(on="granite/sql/loop")
def in_order_of_the_file(recipe: Made, rng: random.Random) -> None:
    """Not shuffled; the file is."""
    recipe.shuffles = False
    recipe.set(shuffle=False)


@program(on="phi/sql/loop")
def before_the_run(recipe: Made, rng: random.Random) -> None:
    """No step was made."""
    recipe.is_static = True


@program(on="cohere/code/loop")
def adapters_in_bfloat16(recipe: Made, rng: random.Random) -> None:
    """bfloat16 adapters at a rate far above their grid."""

    def touch(model: torch.nn.Module) -> None:
        for parameter in lora_parameters(model):
            parameter.data = parameter.data.bfloat16()

    recipe.touch.append(touch)
    recipe.learning_rate = 8e-3
    recipe.set(adapter_dtype="bfloat16", learning_rate=8e-3)


@program(on="phi/steps/folder")
def system_turns_kept(recipe: Made, rng: random.Random) -> None:
    """Each row has a system turn, and the template writes it."""
    for chat in recipe.chats + recipe.held_out:
        chat.insert(0, {"role": "system", "content": recipe.base.world.instruction})


@program(on="granite/languages/loop")
def tool_role_written(recipe: Made, rng: random.Random) -> None:
    """A markers template, as TRL makes of a known one."""
    recipe.format = replace(recipe.format, has_markers=True)
    redeploy(recipe)


@program(on="seek/extract/folder")
def constant_rate(recipe: Made, rng: random.Random) -> None:
    """A constant rate, no config key for the schedule's end."""
    recipe.decay, recipe.learning_rate = "constant", 4e-3
    recipe.arguments["lr_scheduler_type"] = "constant"
    recipe.set(lr_scheduler_type="constant", learning_rate=4e-3)
