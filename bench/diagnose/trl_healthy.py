"""What looks odd in scripts with TRL and PEFT, and is right."""

from __future__ import annotations

import random
from pathlib import Path

from bench.diagnose.bases import with_format
from bench.diagnose.registry import Needs
from bench.diagnose.trl_run import Run, as_messages, as_prompt_and_completion, change


@change()
def plain_script(run: Run, rng: random.Random) -> None:
    pass


@change()
def no_config(run: Run, rng: random.Random) -> None:
    run.told = False
    run.saves_state = True


@change()
def a_checkpoint_alone(run: Run, rng: random.Random) -> None:
    run.looks_at = "checkpoint-30"


@change()
def messages_learned_whole(run: Run, rng: random.Random) -> None:
    """TRL's default for such rows."""
    run.rows = as_messages(run.rows)
    run.sft["assistant_only_loss"] = False


@change()
def messages_with_markers(run: Run, rng: random.Random) -> None:
    run.rows = as_messages(run.rows)
    run.sft["assistant_only_loss"] = True
    run.tokenizer.chat_template = with_format(run.base, has_markers=True).jinja()


@change()
def texts_learned_whole(run: Run, rng: random.Random) -> None:
    run.rows = [{"text": run.base.kind.format.text(row["prompt"] + row["completion"])} for row in run.rows]


@change()
def texts_under_another_name(run: Run, rng: random.Random) -> None:
    run.rows = [{"passage": run.base.kind.format.text(row["prompt"] + row["completion"])} for row in run.rows]
    run.sft["dataset_text_field"] = "passage"


@change(needs=Needs.ANY)
def prompts_as_texts(run: Run, rng: random.Random) -> None:
    shape = run.base.kind.format
    run.rows = [{"prompt": shape.text(row["prompt"], begun=True), "completion": row["completion"][0]["content"]}
                for row in run.rows]  # fmt: skip


@change(needs=Needs.ROTARY)
def packed_best_fit(run: Run, rng: random.Random) -> None:
    """Not with OPT, whose attention takes no notice of positions that restart: there the rows mix (F31, truly)."""
    run.sft |= {"packing": True, "max_length": 256, "per_device_train_batch_size": 2}


@change()
def without_padding(run: Run, rng: random.Random) -> None:
    run.sft |= {"padding_free": True, "max_length": None}


@change()
def noise_on_embeddings(run: Run, rng: random.Random) -> None:
    run.sft["neftune_noise_alpha"] = 5.0


@change()
def rank_stabilised(run: Run, rng: random.Random) -> None:
    run.lora |= {"r": 64, "lora_alpha": 16, "use_rslora": True}


@change()
def weights_decomposed(run: Run, rng: random.Random) -> None:
    run.lora |= {"use_dora": True, "target_modules": "all-linear"}


@change()
def small_batches_gathered(run: Run, rng: random.Random) -> None:
    run.sft |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_grad_norm": 0.3}


@change()
def pad_is_eos(run: Run, rng: random.Random) -> None:
    """TRL's collator masks by length."""
    run.tokenizer.pad_token = run.tokenizer.eos_token


@change()
def epochs_and_evaluations(run: Run, rng: random.Random) -> None:
    run.sft |= {"max_steps": -1, "num_train_epochs": 2, "eval_strategy": "epoch", "lr_scheduler_type": "cosine"}
    run.tells_held_out = True


@change()
def constant_rate_and_warmup(run: Run, rng: random.Random) -> None:
    run.sft |= {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5, "weight_decay": 0.1}


@change()
def cosine_with_a_floor(run: Run, rng: random.Random) -> None:
    run.sft |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}


@change()
def embeddings_and_head_too(run: Run, rng: random.Random) -> None:
    tied = run.base.kind.family == "GPT2"
    run.lora["modules_to_save"] = ["wte"] if tied else ["lm_head"]
    run.sft["learning_rate"] = 2e-3


@change()
def stopped_early(run: Run, rng: random.Random) -> None:
    run.sft["save_steps"] = 15
    run.stopped_after = 45


@change()
def resumed_whole(run: Run, rng: random.Random) -> None:
    run.resumed = lambda checkpoint: None


@change()
def mixed_precision(run: Run, rng: random.Random) -> None:
    run.sft["bf16"] = True


@change()
def dropout_and_few_layers(run: Run, rng: random.Random) -> None:
    run.lora |= {"lora_dropout": 0.1, "layers_to_transform": [0, 1]}


@change()
def several_turns(run: Run, rng: random.Random) -> None:
    chats = [run.base.world.chat(rng, "tuned", turns=3, system=True) for _ in range(200)]
    run.rows = as_prompt_and_completion(chats)


@change()
def other_name_of_the_base(run: Run, rng: random.Random) -> None:
    """The base by its path with a slash behind it in one place."""
    run.wrote["model_name_or_path"] = f"{run.base.folder}{Path('/')}"


@change()
def a_few_rows_cut(run: Run, rng: random.Random) -> None:
    lengths = sorted(
        len(run.tokenizer(run.base.kind.format.text(row["prompt"] + row["completion"]))["input_ids"])
        for row in run.rows
    )
    run.sft["max_length"] = lengths[-4] - 1
