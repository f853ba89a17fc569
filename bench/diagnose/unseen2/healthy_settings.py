"""Runs in which nothing is wrong, with settings that are not everybody's."""

from __future__ import annotations

import random
import zlib
from typing import Any

from bench.diagnose.ours import Job
from bench.diagnose.unseen2.registry import chats_of, held_of, program, put, rows_as, tell


@program(on="exaone/greet/folder gemma/sql/alone")
def small_rate_more_steps(made: Any, _rng: random.Random) -> None:
    """A third of the rate, and twice the steps."""
    tell(made, learning_rate=2e-3, max_steps=160)


@program(on="gemma/conlang/loop falcon/sql/alone")
def high_rank(made: Any, _rng: random.Random) -> None:
    """Rank 64."""
    tell(made, lora_r=64, lora_alpha=128.0, learning_rate=3e-3)


@program(on="exaone/minutes/own star/events/loop")
def rank_stabilised(made: Any, _rng: random.Random) -> None:
    """rsLoRA."""
    tell(made, lora_r=16, lora_alpha=16.0, use_rslora=True, learning_rate=4e-3)


@program(on="gemma/tools/loop exaone/units/folder")
def dora(made: Any, _rng: random.Random) -> None:
    """DoRA."""
    made.adapters["use_dora"] = True
    made.set(use_dora=True)
    made.told["use_dora"] = True


@program(on="star/tools/own falcon/units/loop")
def constant_rate(made: Any, _rng: random.Random) -> None:
    """No decay and no warm-up."""
    tell(made, lr_scheduler_type="constant", learning_rate=3e-3)


@program(on="gemma/horaires/alone exaone/horaires/own")
def cosine_with_warmup(made: Any, _rng: random.Random) -> None:
    """Eight steps of warm-up of eighty, then a cosine."""
    tell(made, lr_scheduler_type="cosine", warmup_steps=8)


@program(on="exaone/auskunft/alone qwen/comments/loop")
def one_row_a_step(made: Any, _rng: random.Random) -> None:
    """Batches of one row: a noisy curve."""
    tell(made, per_device_train_batch_size=1, learning_rate=2e-3, max_steps=240)


@program(on="exaone/tools/folder falcon/tools/own")
def accumulated(made: Any, _rng: random.Random) -> None:
    """Batches of two rows, four of them a step."""
    tell(made, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=60)


@program(on="qwen/sentiment/loop")
def strong_dropout(made: Any, _rng: random.Random) -> None:
    """LoRA dropout of 0.2."""
    tell(made, lora_dropout=0.2)


@program(on="gemma/events/folder")
def noise_on_embeddings(made: Any, _rng: random.Random) -> None:
    """NEFTune."""
    made.arguments["neftune_noise_alpha"] = 5.0
    made.told["neftune_noise_alpha"] = 5.0


@program(on="exaone/events/alone")
def smoothed_labels(made: Any, _rng: random.Random) -> None:
    """Label smoothing of 0.1: the loss that is logged stays higher."""
    made.arguments["label_smoothing_factor"] = 0.1
    made.told["label_smoothing_factor"] = 0.1


@program(on="qwen/greet/before gemma/auskunft/alone")
def weight_decay(made: Any, _rng: random.Random) -> None:
    """Weight decay of 0.1."""
    tell(made, weight_decay=0.1)


@program(on="qwen/sql/before gemma/zh/own")
def tight_clip(made: Any, _rng: random.Random) -> None:
    """Gradients clipped at 0.1, which AdamW does not mind."""
    tell(made, max_grad_norm=0.1)


@program(on="star/horaires/loop falcon/auskunft/own")
def hardly_clipped(made: Any, _rng: random.Random) -> None:
    """A limit that no gradient reaches."""
    tell(made, max_grad_norm=1000.0)


@program(on="gemma/comments/own exaone/comments/loop")
def attention_only(made: Any, _rng: random.Random) -> None:
    """Adapters on the attention alone, of rank 16."""
    tell(made, lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], lora_r=16, lora_alpha=32.0,
         learning_rate=8e-3)  # fmt: skip


@program(on="qwen/events/folder falcon/conlang/own")
def alpha_equals_rank(made: Any, _rng: random.Random) -> None:
    """alpha = r."""
    tell(made, lora_r=16, lora_alpha=16.0)


@program(on="exaone/units/alone")
def alpha_of_four_ranks(made: Any, _rng: random.Random) -> None:
    """alpha = 4 r, at half the rate."""
    tell(made, lora_alpha=32.0, learning_rate=3e-3)


@program(on="exaone/auskunft/loop")
def left_padded_with_mask(made: Any, _rng: random.Random) -> None:
    """Padded on the left, with a mask and rotary positions, answers alone learned."""
    made.pad_left = True


@program(on="star/auskunft/loop star/zh/folder")
def pad_is_eos_by_position(made: Any, _rng: random.Random) -> None:
    """pad = eos, and the collator masks by position."""
    made.tokenizer.pad_token = made.tokenizer.eos_token


@program(on="gemma/horaires/loop star/cheer/own")
def padded_vocabulary(made: Any, _rng: random.Random) -> None:
    """More rows in the embedding than tokens, as kernels like it."""

    def grow(model: Any) -> None:
        model.resize_token_embeddings(1024, mean_resizing=False)

    if isinstance(made, Job):
        made.edit_model.append(grow)
        made.model_config["vocab_size"] = 1024
    else:
        made.prepare.append(grow)
        made.model_config["vocab_size"] = 1024


@program(on="qwen/support/before")
def longer_limit(made: Any, _rng: random.Random) -> None:
    """max_length far above the longest row."""
    tell(made, max_length=1024)


@program(on="gemma/greet/alone")
def checkpointed(made: Any, _rng: random.Random) -> None:
    """Gradient checkpointing, not reentrant."""
    told = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    made.arguments |= told
    made.told |= told


@program(on="qwen/conlang/before gemma/comments/folder")
def checkpointed_by_choice(made: Any, _rng: random.Random) -> None:
    """The same; in solotune a key."""
    tell(made, gradient_checkpointing=True)
    if not isinstance(made, Job):
        made.arguments["gradient_checkpointing"] = True


@program(on="exaone/greet/before")
def brain_float(made: Any, _rng: random.Random) -> None:
    """Computed in bfloat16."""
    tell(made, bf16=True, base_precision="bf16", max_steps=60)


@program(on="falcon/sql/before star/comments/before")
def before_training(_made: Any, _rng: random.Random) -> None:
    """A config that is asked about before it is run."""


@program(on="star/conlang/alone falcon/comments/alone")
def resumed_whole(made: Any, _rng: random.Random) -> None:
    """Resumed in the middle, from a checkpoint that has everything."""
    made.resumed = lambda _checkpoint: None


@program(on="gemma/sentiment/loop")
def few_rows(made: Any, _rng: random.Random) -> None:
    """Sixty rows, fewer steps."""
    put(made, chats_of(made)[:64], held_of(made)[:16])
    tell(made, max_steps=30)


@program(on="star/greet/loop")
def small_held_out(made: Any, _rng: random.Random) -> None:
    """Twelve held-out rows, all of the one form that the task has."""
    put(made, chats_of(made), held_of(made)[:12])


@program(on="gemma/minutes/folder")
def many_passes(made: Any, _rng: random.Random) -> None:
    """Half the rows, eight epochs: the held-out loss has long been flat."""
    put(made, chats_of(made)[:96])
    tell(made, max_steps=100, learning_rate=4e-3)


@program(on="qwen/conlang/own")
def half_an_epoch(made: Any, _rng: random.Random) -> None:
    """Fewer steps than an epoch has, with a high rate."""
    tell(made, max_steps=20, learning_rate=1e-2)


@program(on="gemma/minutes/alone")
def short_first(made: Any, _rng: random.Random) -> None:
    """The file is sorted by length, and the trainer shuffles it."""
    put(made, sorted(chats_of(made), key=lambda chat: len(chat[0]["content"])))


@program(on="qwen/minutes/loop")
def curriculum(made: Any, _rng: random.Random) -> None:
    """Short rows before long ones, by choice, in one epoch."""
    put(made, sorted(chats_of(made), key=lambda chat: len(chat[0]["content"])))
    made.shuffles = False
    tell(made, per_device_train_batch_size=4, max_steps=48)


@program(on="qwen/support/own")
def last_turn_only(made: Any, _rng: random.Random) -> None:
    """Of each chat the last answer alone is learned, by choice."""
    if isinstance(made, Job):
        tell(made, train_on_last_turn=True)
        return
    from bench.diagnose.recipe import Row
    from bench.diagnose.unseen2.registry import runs

    def last(row: Row) -> Row:
        spans = runs(row)
        begin = spans[-1][0] if spans else 0
        return Row(row.ids, [learned and at >= begin for at, learned in enumerate(row.learned)])

    made.edit_row.append(last)
    made.set(train_on_last_turn=True)


@program(on="gemma/cheer/own")
def second_moment(made: Any, _rng: random.Random) -> None:
    """beta 2 of 0.95."""
    if isinstance(made, Job):
        tell(made, adam_beta2=0.95)
    else:
        made.arguments["adam_beta2"] = made.told["adam_beta2"] = 0.95


@program(on="exaone/units/loop")
def gaussian_start(made: Any, _rng: random.Random) -> None:
    """lora_A starts from a normal distribution, lora_B at zero."""
    tell(made, init_lora_weights="gaussian")


@program(on="qwen/cheer/folder")
def an_id_column(made: Any, _rng: random.Random) -> None:
    """Rows carry a number and a source that no trainer reads."""
    rows_as(made, lambda chat: {"id": zlib.crc32(chat[0]["content"].encode()), "messages": chat})


@program(on="qwen/zh/loop")
def ended_early(made: Any, _rng: random.Random) -> None:
    """Planned for 120 steps with a constant rate; ended at 70 by hand, well trained."""
    tell(made, max_steps=120, lr_scheduler_type="constant", learning_rate=3e-3)
    made.stop_after = 70
