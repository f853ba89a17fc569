"""Faults of batches (S6), packing (S7), rows (S8), split and evaluation (S9)."""

from __future__ import annotations

import random
import re

from bench.diagnose.machinery import activation_limit
from bench.diagnose.recipe import Recipe
from bench.diagnose.registry import Needs, fault


@fault("F27", Needs.ABSOLUTE)
def left_with_absolute_positions(recipe: Recipe, rng: random.Random) -> None:
    """Positions are counted over the pads."""
    recipe.pad_left, recipe.positions = True, "counted"
    recipe.set(padding_side="left")


@fault("F28")
def pads_attended(recipe: Recipe, rng: random.Random) -> None:
    """Left padding, and a collator that hands over no mask."""
    recipe.pad_left, recipe.sends_mask = True, False
    recipe.set(padding_side="left")


@fault("F29")
def pads_learned(recipe: Recipe, rng: random.Random) -> None:
    recipe.pads_learned = True


@fault("F30", Needs.ROTARY)
def first_token_from_pad(recipe: Recipe, rng: random.Random) -> None:
    """Every token is learned, as asked; padded on the left, the first one is learned from a pad."""
    recipe.mask, recipe.pad_left = "all", True
    recipe.set(assistant_only_loss=False, padding_side="left")


@fault("F31", Needs.ROTARY)
def packed_without_blocks(recipe: Recipe, rng: random.Random) -> None:
    """Rows of a pack see one another."""
    recipe.packing = "plain"
    recipe.set(packing=True, per_device_train_batch_size=1)


@fault("F32")
def positions_not_reset(recipe: Recipe, rng: random.Random) -> None:
    """Blocks are apart, positions go on."""
    recipe.packing = "blocks"
    recipe.set(packing=True, per_device_train_batch_size=1)


@fault("F33", Needs.ROTARY)
def packing_cuts_rows(recipe: Recipe, rng: random.Random) -> None:
    """Rows longer than the window lose their end in the pack."""
    recipe.packing, recipe.window = "apart", 40
    for chat in recipe.chats[:: rng.choice((2, 3))]:
        chat[0]["content"] = f"{recipe.base.world.text(rng)} {chat[0]['content']}"
    recipe.set(packing=True, max_length=recipe.window, per_device_train_batch_size=1)


@fault("F34")
def empty_answers(recipe: Recipe, rng: random.Random) -> None:
    share = rng.uniform(0.25, 0.5)
    for chat in recipe.chats:
        if rng.random() < share:
            chat[-1]["content"] = rng.choice(("", " "))


@fault("F35")
def constant_answer(recipe: Recipe, rng: random.Random) -> None:
    """An export that lost the answers and wrote one text for all."""
    said = rng.choice(("I am sorry, I cannot help with that request.", "See the attached file for all details."))
    for chat in recipe.chats:
        if rng.random() < 0.97:
            chat[-1]["content"] = said


@fault("F36", Needs.INSTRUCT)
def foreign_roles(recipe: Recipe, rng: random.Random) -> None:
    """Rows say `human`, and the template lets it pass."""
    for chat in recipe.chats + recipe.held_out:
        for message in chat:
            message["role"] = {"user": "human"}.get(message["role"], message["role"])


@fault("F36", Needs.INSTRUCT)
def swapped_roles(recipe: Recipe, rng: random.Random) -> None:
    """The user's turns are the assistant's."""
    for chat in recipe.chats + recipe.held_out:
        for message in chat:
            message["role"] = {"user": "assistant", "assistant": "user"}[message["role"]]


@fault("F37")
def mojibake(recipe: Recipe, rng: random.Random) -> None:
    """UTF-8 read as Latin-1."""
    letters = str.maketrans({rng.choice("ae"): rng.choice("éüå"), "o": "ö"})
    for chat in recipe.chats + recipe.held_out:
        for message in chat:
            message["content"] = message["content"].translate(letters).encode().decode("latin1")


@fault("F37")
def escaped_twice(recipe: Recipe, rng: random.Random) -> None:
    """Line breaks and quotes as backslashes."""
    for chat in recipe.chats + recipe.held_out:
        chat[-1]["content"] = re.sub(r"[,;:/|*] ?", lambda _: "\\n", chat[-1]["content"], count=4) + '\\n\\"ok\\"'


@fault("F38")
def misaligned(recipe: Recipe, rng: random.Random) -> None:
    """One column was sorted or moved."""
    answers = [chat[-1]["content"] for chat in recipe.chats]
    if rng.random() < 0.5:
        by = rng.randint(1, 5)
        answers = answers[by:] + answers[:by]
    else:
        rng.shuffle(answers)
    for chat, answer in zip(recipe.chats, answers, strict=True):
        chat[-1]["content"] = answer


@fault("F39")
def repeated_rows(recipe: Recipe, rng: random.Random) -> None:
    """A few rows, many times."""
    few = recipe.chats[: rng.randint(6, 12)]
    recipe.chats = [[dict(message) for message in chat] for _ in range(240 // len(few)) for chat in few]


@fault("F40")
def sorted_rows(recipe: Recipe, rng: random.Random) -> None:
    """Sorted by answer or length, and read in that order."""
    if rng.random() < 0.5:
        recipe.chats.sort(key=lambda chat: chat[-1]["content"])
    else:
        recipe.chats.sort(key=lambda chat: len(chat[-1]["content"]))
    recipe.shuffles = False
    recipe.set(shuffle=False)


@fault("F41")
def doubled_by_workers(recipe: Recipe, rng: random.Random) -> None:
    """Every worker reads the whole stream."""
    recipe.copies = rng.choice((2, 4))
    recipe.shuffles = False
    recipe.set(dataloader_num_workers=recipe.copies, max_steps=-1, num_train_epochs=3.0, streaming=True, shuffle=False)


@fault("F42")
def long_tail(recipe: Recipe, rng: random.Random) -> None:
    """One row of many times the usual length fills the card, steps later."""
    filler = " ".join(recipe.base.world.text(rng) for _ in range(30))
    place = rng.randrange(len(recipe.chats))
    chat = recipe.chats[place]
    chat[0]["content"] = _first(filler, 380, recipe) + " " + chat[0]["content"]
    recipe.max_length = 512
    recipe.crash = activation_limit(recipe, times=3.0)
    recipe.steps = 60
    recipe.set(max_length=512, max_steps=60)


def _first(text: str, tokens: int, recipe: Recipe) -> str:
    return recipe.tokenizer.decode(recipe.tokenizer(text, add_special_tokens=False)["input_ids"][:tokens])


@fault("F43")
def evaluated_on_training(recipe: Recipe, rng: random.Random) -> None:
    recipe.held_out = [[dict(message) for message in chat] for chat in recipe.chats[: len(recipe.held_out)]]


@fault("F44")
def leaked(recipe: Recipe, rng: random.Random) -> None:
    """A part of the held-out rows is in training, with a word changed."""
    share = rng.uniform(0.3, 0.6)
    for place in range(int(len(recipe.held_out) * share)):
        chat = [dict(message) for message in recipe.chats[rng.randrange(len(recipe.chats))]]
        chat[0]["content"] = chat[0]["content"].replace(" the ", " this ", 1) + " Please."
        recipe.held_out[place] = chat


@fault("F45")
def evaluated_in_training_mode(recipe: Recipe, rng: random.Random) -> None:
    """Dropout stays on while evaluating."""
    recipe.evaluates_in_training_mode = True
    recipe.adapters["lora_dropout"] = rng.choice((0.05, 0.1, 0.2))
    recipe.set(lora_dropout=recipe.adapters["lora_dropout"])


@fault("F46")
def memorised(recipe: Recipe, rng: random.Random) -> None:
    """A few rows, many epochs."""
    recipe.chats = recipe.chats[: rng.randint(8, 12)]
    recipe.steps, recipe.decay = 120, "constant"
    recipe.set(max_steps=120, num_train_epochs=120.0, lr_scheduler_type="constant")


@fault("F47")
def evaluated_by_another_mask(recipe: Recipe, rng: random.Random) -> None:
    """Learned: answers. Evaluated: every token."""
    recipe.held_out_mask = "all"


@fault("F48")
def few_held_out(recipe: Recipe, rng: random.Random) -> None:
    recipe.held_out = recipe.held_out[: rng.randint(2, 3)]
