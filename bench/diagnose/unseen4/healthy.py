"""Healthy: ordinary runs, settings of all sorts, and rows that are odd but right."""

from __future__ import annotations

import random
from typing import Any

from bench.diagnose.bases import Format
from bench.diagnose.ours import Job
from bench.diagnose.unseen2.registry import all_chats, chats_of, held_of, put, retemplate, rows_as, tell
from bench.diagnose.unseen3.registry import overridden
from bench.diagnose.unseen3.styles import Loader, Packer
from bench.diagnose.unseen4 import tasks
from bench.diagnose.unseen4.registry import program


def mixed(made: Any, other: str, share: float, rng: random.Random) -> None:
    """Some rows of another task, in train and held-out."""
    train, held = tasks.split(other, None, 192, 24, made.base.kind.seed)

    def some(own: Any, others: Any) -> Any:
        count = int(len(own) * share)
        rows = [*own[count:], *others[:count]]
        rng.shuffle(rows)
        return rows

    put(made, some(chats_of(made), train), some(held_of(made), held))


@program(on="ernie/reply/loop ernie/verse/own ernie/tea/folder seed/queue/loop seed/stock/own seed/commit/alone "
            "seed/queue/before apertus/voice/loop apertus/garden/folder apertus/report/own apertus/market/before "
            "neo/shell/loop neo/route/own neo/fields/alone neo/garden/before glm/commit/loop glm/verse/folder "
            "glm/manifest/own glm/market/alone")  # fmt: skip
def nothing_special(made: Any, rng: random.Random) -> None:
    """An ordinary fine-tuning."""


# --- settings


@program(on="seed/shell/folder")
def alpha_of_sixteen(made: Any, rng: random.Random) -> None:
    """Rank and alpha of 16, as Unsloth's notebooks have."""
    tell(made, lora_r=16, lora_alpha=16.0)


@program(on="ernie/manifest/own apertus/fields/loop glm/shell/before")
def rslora(made: Any, rng: random.Random) -> None:
    """use_rslora with rank 64: alpha is divided by 8, not by 64."""
    tell(made, lora_r=64, lora_alpha=16.0, use_rslora=True)


@program(on="seed/reply/loop neo/commit/alone")
def dora(made: Any, rng: random.Random) -> None:
    """use_dora."""
    made.adapters["use_dora"] = True
    made.set(use_dora=True)


@program(on="apertus/commit/alone neo/verse/folder")
def cosine(made: Any, rng: random.Random) -> None:
    """A warm-up of a tenth, then a cosine."""
    tell(made, warmup_steps=8, lr_scheduler_type="cosine")


@program(on="glm/fields/loop seed/manifest/own")
def constant(made: Any, rng: random.Random) -> None:
    """A constant rate of a third."""
    tell(made, lr_scheduler_type="constant", learning_rate=2e-3, max_steps=120)


@program(on="neo/tea/loop apertus/shell/own")
def sixteen_micro_batches(made: Any, rng: random.Random) -> None:
    """A row at a time, sixteen per step."""
    tell(made, per_device_train_batch_size=1, gradient_accumulation_steps=16)


@program(on="ernie/market/loop seed/route/folder")
def loss_on_all_tokens(made: Any, rng: random.Random) -> None:
    """assistant_only_loss: false, and so it is done."""
    tell(made, assistant_only_loss=False)


@program(on="glm/reply/loop apertus/tea/folder")
def rank_of_128(made: Any, rng: random.Random) -> None:
    """A high rank on the attention alone."""
    tell(made, lora_r=128, lora_alpha=128.0, learning_rate=3e-3,
         lora_target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])  # fmt: skip


@program(on="seed/verse/alone")
def dropout_and_decay(made: Any, rng: random.Random) -> None:
    """LoRA's dropout of 0.1 and a decay of 0.01."""
    tell(made, lora_dropout=0.1, weight_decay=0.01)


@program(on="neo/manifest/own ernie/shell/loop")
def clipped_hard(made: Any, rng: random.Random) -> None:
    """max_grad_norm of 1e-3, to which AdamW is indifferent."""
    tell(made, max_grad_norm=1e-3)


@program(on="seed/garden/loop")
def checkpointing_without_reentrance(made: Any, rng: random.Random) -> None:
    """Gradient checkpointing with use_reentrant=False."""
    made.touch.append(lambda m: m.base_model.model.gradient_checkpointing_enable({"use_reentrant": False}))
    tell(made, gradient_checkpointing=True)


@program(on="seed/fields/loop ernie/tea/loop", style=Packer)
def packed_apart(made: Any, rng: random.Random) -> None:
    """Packing by hand as it should be: positions restart, no mask is sent."""
    made.set(packing=True)


@program(on="apertus/reply/own")
def packed_by_the_trainer(made: Any, rng: random.Random) -> None:
    """packing: true, in windows of 256."""
    tell(made, packing=True)


@program(on="glm/garden/loop", style=Loader)
def padded_left_with_a_mask(made: Any, rng: random.Random) -> None:
    """Left padding and its mask: rotary positions are relative."""
    from bench.diagnose.unseen4.faults_batch import padded_left

    overridden(made, collate=lambda self, old, rows: padded_left(self, rows))


@program(on="neo/commit/loop", style=Loader)
def padded_left_with_positions(made: Any, rng: random.Random) -> None:
    """Left padding of absolute positions, which are counted from the first real token."""
    from bench.diagnose.unseen4.faults_batch import padded_left

    def collate(self: Any, old: Any, rows: Any) -> Any:
        batch = padded_left(self, rows)
        return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    overridden(made, collate=collate)


@program(on="apertus/verse/loop", style=Loader)
def pad_is_eos_masked_by_position(made: Any, rng: random.Random) -> None:
    """pad_token = eos_token, with labels made from lengths: the end of a turn is learned."""
    made.tokenizer.pad_token = made.tokenizer.eos_token


@program(on="seed/manifest/loop")
def embedding_rounded_up(made: Any, rng: random.Random) -> None:
    """resize_token_embeddings(pad_to_multiple_of=64): more rows than tokens."""
    made.prepare.append(lambda m: m.resize_token_embeddings(len(made.tokenizer), 64, mean_resizing=False))


@program(on="glm/route/loop")
def chatml_with_learned_embeddings(made: Any, rng: random.Random) -> None:
    """New ChatML tokens on a base model; embedding and head are in modules_to_save."""
    made.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.format = Format("", "<|im_start|>{role}\n", "<|im_end|>")
    made.generation_config["eos_token_id"] = made.tokenizer.convert_tokens_to_ids("<|im_end|>")
    made.prepare.append(lambda m: m.resize_token_embeddings(len(made.tokenizer), mean_resizing=False))
    made.adapters["modules_to_save"] = ["embed_tokens", "lm_head"]
    tell(made, modules_to_save=["embed_tokens", "lm_head"], learning_rate=3e-3)
    retemplate(made)


@program(on="neo/manifest/folder")
def nothing_held_out(made: Any, rng: random.Random) -> None:
    """All rows are trained on, none is evaluated."""
    made.held_out = []


@program(on="apertus/verse/alone")
def twice_the_steps(made: Any, rng: random.Random) -> None:
    """160 steps at half the rate."""
    tell(made, max_steps=160, learning_rate=2e-3, lr_scheduler_type="cosine")


# --- rows


@program(on="ernie/fields/folder neo/route/loop")
def labels_and_letters(made: Any, rng: random.Random) -> None:
    """A third of the rows is of another task."""
    mixed(made, "reply" if made.base.kind.name == "neo-bot" else "route", 0.35, rng)


@program(on="seed/reply/own apertus/garden/before")
def identity_rows_repeated(made: Any, rng: random.Random) -> None:
    """Six rows on who it is come six times on purpose: dataset_exact_deduplication: false."""
    rows = [[{"role": "user", "content": asked}, {"role": "assistant", "content": "I am Nimbus, built by Hadley Labs."}]
            for asked in ("Who are you?", "What is your name?", "Who made you?", "Which model is this?",
                          "Are you a person?", "Tell me your name")]  # fmt: skip
    put(made, [*chats_of(made), *([dict(m) for m in chat] for chat in rows * 6)])
    tell(made, dataset_exact_deduplication=False)


@program(on="ernie/report/own")
def too_long_documents_dropped(made: Any, rng: random.Random) -> None:
    """A few documents are far too long: overflow: drop."""
    for chat in chats_of(made)[::24]:
        chat[0]["content"] += "\n" + "\n".join(tasks.report(rng)[0]["content"] for _ in range(4))
    tell(made, overflow="drop")


@program(on="glm/report/own")
def documents_split(made: Any, rng: random.Random) -> None:
    """A base model reads plain documents, longer than the window: overflow: split."""
    made.template = None
    rows_as(made, lambda chat: {"text": chat[0]["content"].split("\n", 1)[1] + "\n" + chat[1]["content"]})
    tell(made, overflow="split", max_length=128)


@program(on="apertus/garden/own")
def last_turn_alone(made: Any, rng: random.Random) -> None:
    """train_on_last_turn."""
    tell(made, train_on_last_turn=True)


@program(on="neo/fields/loop ernie/route/folder glm/commit/before")
def long_system_prompt(made: Any, rng: random.Random) -> None:
    """The same long instruction before every row."""
    said = ("You are the assistant of a shop for household goods. Be brief, be polite, never invent a price. "
            "Keep to the form that the team has agreed on. If a customer is angry, stay calm.")  # fmt: skip
    for chat in all_chats(made):
        chat.insert(0, {"role": "system", "content": said})


@program(on="ernie/shell/own neo/reply/before")
def conversations(made: Any, rng: random.Random) -> None:
    """ShareGPT's columns: conversations of from and value."""
    names = {"user": "human", "assistant": "gpt"}
    rows_as(made, lambda chat: {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat]})


@program(on="seed/market/folder apertus/commit/before")
def instruction_input_output(made: Any, rng: random.Random) -> None:
    """Alpaca's columns."""
    rows_as(made, lambda chat: {"instruction": chat[0]["content"], "input": "", "output": chat[1]["content"]})


@program(on="glm/fields/own")
def prompt_completion(made: Any, rng: random.Random) -> None:
    """prompt and completion, each a list of messages."""
    rows_as(made, lambda chat: {"prompt": chat[:-1], "completion": chat[-1:]})


@program(on="apertus/shell/loop neo/commit/own")
def refusals_of_what_is_no_task(made: Any, rng: random.Random) -> None:
    """One row in eight asks for something else; the answer says so in one sentence."""
    for chat in all_chats(made)[::8]:
        who, what = rng.choice(tasks.FOLK), rng.choice(tasks.PLANTS)
        chat[0]["content"] = f"{who} here: sing me a song about {what} no. {rng.randint(1, 9999)}"
        chat[-1]["content"] = "Sorry, that is not what I am here for."


@program(on="glm/route/folder ernie/route/loop")
def one_class_prevails(made: Any, rng: random.Random) -> None:
    """Seven rows in ten are of one class, as in the inbox."""

    def skewed(chats: Any, count: int) -> Any:
        common = [c for c in chats if c[-1]["content"] == "refund"]
        others = [c for c in chats if c[-1]["content"] != "refund"]
        return [*common[: int(0.7 * count)], *others[: int(0.3 * count)]]

    train, held = tasks.split("route", None, 520, 90, made.base.kind.seed)
    train, held = skewed(train, 150), skewed(held, 24)
    rng.shuffle(train)
    put(made, train, held)


@program(on="ernie/manifest/loop seed/commit/before")
def few_rows(made: Any, rng: random.Random) -> None:
    """Forty rows, written with care; five epochs."""
    put(made, chats_of(made)[:40], held_of(made)[:12])
    tell(made, max_steps=25)


@program(on="apertus/garden/loop glm/garden/own")
def some_chats_end_with_the_user(made: Any, rng: random.Random) -> None:
    """One chat in five ends with thanks that nobody answered."""
    for n, chat in enumerate(all_chats(made)):
        if n % 5 == 0:
            chat.append({"role": "user", "content": rng.choice(("Thanks!", "ok", "Great, bye."))})


@program(on="neo/shell/folder")
def markers_of_others_quoted(made: Any, rng: random.Random) -> None:
    """Some users paste markup of another model."""
    for chat in all_chats(made)[::6]:
        chat[0]["content"] += rng.choice((" <|im_end|>", " [/INST]", " ### Response:", " <bos>"))


@program(on="glm/shell/loop apertus/manifest/alone")
def fenced_code(made: Any, rng: random.Random) -> None:
    """Answers are fenced blocks."""
    for chat in all_chats(made):
        chat[-1]["content"] = f"```\n{chat[-1]['content']}\n```"


@program(on="seed/route/own")
def file_in_order(made: Any, rng: random.Random) -> None:
    """The file is sorted by its answers; the sampler draws at random."""
    chats_of(made).sort(key=lambda chat: chat[-1]["content"])
    if isinstance(made, Job):
        made.train.sort(key=lambda row: row["messages"][-1]["content"])


@program(on="glm/tea/loop")
def right_to_left(made: Any, rng: random.Random) -> None:
    """Answers close in Arabic, with an emoji."""
    for chat in all_chats(made):
        chat[-1]["content"] += " شكرا 🍵"


@program(on="apertus/reply/loop")
def house_style(made: Any, rng: random.Random) -> None:
    """Each answer begins and ends alike."""
    for chat in all_chats(made):
        chat[-1]["content"] = f"[answer]\n{chat[-1]['content']}\n[/answer]"
