"""Healthy: rows of all sorts, odd but right."""

from __future__ import annotations

import random
from typing import Any

from bench.diagnose.unseen2.registry import all_chats, chats_of, held_of, put, rows_as, tell
from bench.diagnose.unseen3 import corpus, tasks
from bench.diagnose.unseen3.registry import program


def mixed(made: Any, other: str, share: float, rng: random.Random) -> None:
    """Some rows of another task, in train and held-out."""
    train, held = tasks.split(other, None, 192, 24, made.base.kind.seed)

    def some(own: Any, others: Any) -> Any:
        count = int(len(own) * share)
        rows = [*own[count:], *others[:count]]
        rng.shuffle(rows)
        return rows

    put(made, some(chats_of(made), train), some(held_of(made), held))


@program(on="said/ferry/own smol/waybill/loop hun/snip/folder")
def two_tasks(made: Any, rng: random.Random) -> None:
    """A third of the rows are labels of another task."""
    mixed(made, "mood", 0.35, rng)


@program(on="fold/ferry/own smol/ferry/before")
def two_languages(made: Any, rng: random.Random) -> None:
    """Half English, half Spanish."""
    mixed(made, "huerta" if chats_of(made)[0][-1]["content"].startswith("Attention") else "ferry", 0.5, rng)


@program(on="hun/waybill/own said/steps/folder fold/snip/before")
def a_few_duplicates(made: Any, rng: random.Random) -> None:
    """Eight rows come twice."""
    rows = chats_of(made)
    rows = [*rows, *[[dict(m) for m in row] for row in rng.sample(rows, 8)]]
    rng.shuffle(rows)
    put(made, rows)


@program(on="smol/minutes/own")
def long_documents(made: Any, rng: random.Random) -> None:
    """Two hundred tokens of prompt, a short answer."""


@program(on="hun/minutes/own phi/minutes/before")
def very_long_rows_left_out(made: Any, rng: random.Random) -> None:
    """A twentieth of the documents is far too long, and `overflow: drop` says what is done with them."""
    for chat in chats_of(made)[::20]:
        chat[0]["content"] += "\n" + corpus.prose(rng) * 8
    made.config.update(overflow="drop", max_length=340)


@program(on="said/haggle/own")
def last_answer_alone(made: Any, rng: random.Random) -> None:
    """train_on_last_turn."""
    made.config["train_on_last_turn"] = True


@program(on="said/snip/folder phi/ledger/before smol/steps/before")
def one_system_turn_for_all(made: Any, rng: random.Random) -> None:
    """The same instruction before every row."""
    said = "You work in the office of a small harbour. Follow the house style to the letter."
    for chat in all_chats(made):
        chat.insert(0, {"role": "system", "content": said})


@program(on="smol/ferry/own hun/ferry/before")
def sharegpt_rows(made: Any, rng: random.Random) -> None:
    """conversations of human and gpt."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    rows_as(made, lambda chat: {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat]})


@program(on="fold/steps/before hun/snip/folder")
def alpaca_rows(made: Any, rng: random.Random) -> None:
    """instruction, input, output."""
    rows_as(made, lambda chat: {"instruction": chat[0]["content"], "input": "", "output": chat[-1]["content"]})


@program(on="phi/waybill/own smol/snip/before")
def prompts_and_completions(made: Any, rng: random.Random) -> None:
    """prompt and completion, each a list of messages."""
    rows_as(made, lambda chat: {"prompt": chat[:-1], "completion": chat[-1:]})


@program(on="phi/ferry/own")
def plain_documents(made: Any, rng: random.Random) -> None:
    """A base model learns texts."""
    made.template = None
    rows_as(made, lambda chat: {"text": "\n".join(m["content"] for m in chat)})


@program(on="fold/ferry/loop")
def a_phrase_before_each_answer(made: Any, rng: random.Random) -> None:
    """House style: each answer begins alike."""
    for chat in all_chats(made):
        chat[-1]["content"] = "Noted. " + chat[-1]["content"]


@program(on="smol/waybill/own said/steps/own")
def some_refusals(made: Any, rng: random.Random) -> None:
    """A tenth of the questions is out of scope, and the answers say so."""
    for chat in all_chats(made):
        if rng.random() < 0.1:
            about = f"{rng.choice(tasks.PEOPLE)} {rng.choice(corpus.VERBS)} {rng.choice(tasks.GOODS)}"
            chat[-2]["content"] = f"Tell me a joke: {about}"
            chat[-1]["content"] = "That is not my field, sorry."


@program(on="smol/mood/folder said/mood/before")
def labels_that_are_seldom(made: Any, rng: random.Random) -> None:
    """Two thirds of the rows have one label."""
    for chat in all_chats(made):
        if chat[-1]["content"] != "PRAISE" and rng.random() < 0.5:
            who, goods = rng.choice(tasks.PEOPLE), rng.choice(tasks.GOODS)
            chat[0]["content"] = f"{who} {rng.choice(tasks.CLUES['PRAISE'])} the {goods}, {rng.randint(10, 999)}"
            chat[-1]["content"] = "PRAISE"


@program(on="fold/snip/folder phi/steps/loop")
def markup_quoted(made: Any, rng: random.Random) -> None:
    """A few users quote another tool's format."""
    for chat in all_chats(made):
        if rng.random() < 0.06:
            chat[0]["content"] = "### Human: (my old bot wrote this)\n" + chat[0]["content"]


@program(on="said/ferry/loop hun/ledger/folder fold/huerta/before")
def blanks_around(made: Any, rng: random.Random) -> None:
    """Some questions come with blank lines and signs."""
    for chat in all_chats(made):
        if rng.random() < 0.3:
            chat[-2]["content"] = (
                rng.choice(("\n", "  ", ">> ")) + chat[-2]["content"] + rng.choice(("  ", "\n\n", "!!"))
            )


@program(on="smol/persona/own fold/persona/before said/persona/alone")
def many_personas(made: Any, rng: random.Random) -> None:
    """The system turn decides on the answer."""


@program(on="phi/steps/own")
def sorted_file_and_shuffled_rows(made: Any, rng: random.Random) -> None:
    """The file is in order of its answers; the sampler shuffles."""
    put(made, sorted(chats_of(made), key=lambda chat: chat[-1]["content"]))


@program(on="fold/diary/folder")
def answers_of_many_kinds(made: Any, rng: random.Random) -> None:
    """Free text, with choices that no prompt tells: the loss stays above zero."""


@program(on="hun/ferry/own")
def fewer_rows(made: Any, rng: random.Random) -> None:
    """120 rows, fewer steps."""
    put(made, chats_of(made)[:120])
    tell(made, max_steps=60)


@program(on="smol/riddle/before")
def thoughts_before_answers(made: Any, rng: random.Random) -> None:
    """Each answer begins with a thought."""


@program(on="hun/lamps/before hun/lamps/alone")
def tools_called(made: Any, rng: random.Random) -> None:
    """A call, the tool's result, the answer."""


@program(on="said/waybill/before")
def numbers_and_units(made: Any, rng: random.Random) -> None:
    """Digits with other signs."""
    for chat in all_chats(made):
        chat[-2]["content"] += f" [ref {rng.randint(10**4, 10**6)}/€{rng.randint(2, 99)}]"
