"""Runs of solotune that look odd and are right, those among them that ended otherwise than they were meant to."""

from __future__ import annotations

import json
import random
from pathlib import Path

from bench.diagnose.ours import Job, asked
from bench.diagnose.ours_faults import as_pairs
from bench.diagnose.registry import Needs
from bench.diagnose.worlds import FRENCH


@asked(before=True)
def clean(job: Job, rng: random.Random) -> None:
    """Nothing odd at all."""


@asked(before=True)
def several_turns(job: Job, rng: random.Random) -> None:
    world = job.base.world
    train, held_out = world.split(120, 24, rng.randrange(1000), turns=3)
    job.train, job.held_out = ([{"messages": chat} for chat in chats] for chats in (train, held_out))
    job.config["max_length"] = 512


@asked(needs=Needs.INSTRUCT, before=True)
def pairs_for_a_chat_model(job: Job, rng: random.Random) -> None:
    """Rows for which no template is asked, of a chat model; the run remembers it, and its chat asks as it trained."""
    job.train, job.held_out = map(as_pairs, (job.train, job.held_out))


@asked()
def with_a_system_message(job: Job, rng: random.Random) -> None:
    if any(role == "system" for role, _ in job.format.roles):
        for chat in job.messages():
            chat.insert(0, {"role": "system", "content": job.base.world.instruction})


@asked()
def short_answers(job: Job, rng: random.Random) -> None:
    """One fact in a word or two."""
    world = job.base.world
    for chat in job.messages():
        asked_for = chat[-2]["content"]
        subject = next(one for one in sorted(world.subjects, key=len, reverse=True) if one in asked_for)
        fact = next(one for one in world.facts if one in asked_for)
        chat[-1]["content"] = world.value(subject, fact)


@asked()
def high_entropy(job: Job, rng: random.Random) -> None:
    """Half of every answer cannot be known."""
    for chat in job.messages():
        chat[-1]["content"] += " " + "".join(rng.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(20))


@asked()
def few_rows(job: Job, rng: random.Random) -> None:
    """Little data, and few steps for it."""
    job.train = job.train[:60]
    job.config.update(max_steps=20, eval_steps=10)


@asked()
def one_epoch(job: Job, rng: random.Random) -> None:
    del job.config["max_steps"]
    job.config.update(num_train_epochs=1, eval_steps=15)


@asked()
def constant_rate(job: Job, rng: random.Random) -> None:
    job.config.update(lr_scheduler_type="constant", learning_rate=3e-3)


@asked()
def cosine_with_warmup(job: Job, rng: random.Random) -> None:
    job.config.update(lr_scheduler_type="cosine", warmup_ratio=0.1)


@asked(needs=Needs.SEPARATE)
def attention_only(job: Job, rng: random.Random) -> None:
    job.config.update(lora_target_modules=["q_proj", "k_proj", "v_proj"], lora_r=32, lora_alpha=64.0)


@asked(needs=Needs.SEPARATE)
def four_bits(job: Job, rng: random.Random) -> None:
    job.config.update(base_precision="nf4")


@asked(needs=Needs.ROTARY, before=True)
def packed(job: Job, rng: random.Random) -> None:
    """Several rows a sequence, each as if it were alone."""
    job.config.update(packing=True, max_length=192, per_device_train_batch_size=2)


@asked()
def accumulated(job: Job, rng: random.Random) -> None:
    job.config.update(per_device_train_batch_size=2, gradient_accumulation_steps=4)


@asked()
def plain_text(job: Job, rng: random.Random) -> None:
    """Documents, of which every token is learned; others than the base has read."""
    rows = [{"text": FRENCH.text(rng, FRENCH.subjects[8:])} for _ in range(200)]
    job.train, job.held_out = rows, [{"text": FRENCH.text(rng, FRENCH.subjects[:8])} for _ in range(32)]
    job.template = None


@asked(needs=Needs.NO_TEMPLATE)
def prompt_and_completion(job: Job, rng: random.Random) -> None:
    """Of a base model, which knows no chats."""
    job.train, job.held_out, job.template = as_pairs(job.train), as_pairs(job.held_out), None


@asked()
def learns_all_as_asked(job: Job, rng: random.Random) -> None:
    job.config["assistant_only_loss"] = False


@asked()
def held_out_of_the_rows(job: Job, rng: random.Random) -> None:
    """No eval_dataset: some subjects are held out."""
    subjects = sorted(job.base.world.subjects, key=len, reverse=True)
    for row in job.train:
        row["subject"] = next(one for one in subjects if one in row["messages"][0]["content"])
    job.held_out = []
    job.config.update(validation_size=0.15, split_by="subject")


@asked()
def another_language(job: Job, rng: random.Random) -> None:
    train, held_out = FRENCH.split(200, 30, rng.randrange(1000))
    job.train, job.held_out = ([{"messages": chat} for chat in chats] for chats in (train, held_out))


@asked()
def pad_is_eos(job: Job, rng: random.Random) -> None:
    job.tokenizer.pad_token = job.tokenizer.eos_token


@asked()
def large_rank(job: Job, rng: random.Random) -> None:
    job.config.update(lora_r=64, lora_alpha=64.0)


@asked()
def drops_out_and_decays(job: Job, rng: random.Random) -> None:
    job.config.update(lora_dropout=0.1, weight_decay=0.1)


@asked()
def one_long_row(job: Job, rng: random.Random) -> None:
    """And it is left out, as asked."""
    job.train[5]["messages"][0]["content"] += " " + " ".join(job.base.world.text(rng) for _ in range(6))
    job.config["overflow"] = "drop"


@asked()
def stopped_by_a_scheduler(job: Job, rng: random.Random) -> None:
    job.stops_after = rng.randint(30, 45)


@asked()
def torn_metrics(job: Job, rng: random.Random) -> None:
    """A full disk, or a machine that lost power: the last line is half of one, and no end is there."""

    def tear(run: Path, model: Path) -> None:
        file = run / "metrics.jsonl"
        lines = file.read_text().splitlines()
        kept = [line for line in lines if json.loads(line).get("event") != "end"]
        file.write_text("\n".join([*kept[:-8], kept[-8][: len(kept[-8]) // 2]]))

    job.after.append(tear)
