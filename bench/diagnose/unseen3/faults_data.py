"""Rows and held-out rows gone wrong: F34 to F48.

How: an export that lost a column, a join that slipped, files merged twice, a split made after copies were added.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch

from bench.diagnose.ours import Job
from bench.diagnose.unseen2.registry import all_chats, chats_of, held_of, put, tell
from bench.diagnose.unseen3 import corpus
from bench.diagnose.unseen3.registry import overridden, program
from bench.diagnose.worlds import Chat


def copied(chats: list[Chat]) -> list[Chat]:
    return [[dict(message) for message in chat] for chat in chats]


@program("F34", on="hun/snip/before fold/waybill/folder")
def column_lost_in_an_export(made: Any, rng: random.Random) -> None:
    """Nearly half of the answers are blank."""
    for chat in all_chats(made):
        if rng.random() < 0.45:
            chat[-1]["content"] = rng.choice(("", " ", "\n"))


@program("F35", on="said/diary/own fold/steps/before")
def default_text_everywhere(made: Any, rng: random.Random) -> None:
    """A fallback text was written for all but a few rows."""
    for chat in all_chats(made):
        if rng.random() < 0.97:
            chat[-1]["content"] = "Thank you for your message. A colleague will answer within two working days."


@program("F36", on="hun/steps/folder phi/snip/own")
def roles_the_wrong_way_round(made: Any, rng: random.Random) -> None:
    """The converter swapped who asks and who answers."""
    other = {"user": "assistant", "assistant": "user"}
    for chat in all_chats(made):
        for message in chat:
            message["role"] = other.get(message["role"], message["role"])


@program("F36", on="hun/haggle/before")
def answers_lost_between_questions(made: Any, rng: random.Random) -> None:
    """A filter removed the first answer of most chats: two questions in a row."""
    for chat in all_chats(made):
        if rng.random() < 0.85:
            del chat[1]


@program("F37", on="fold/huerta/alone phi/huerta/folder")
def read_as_latin(made: Any, rng: random.Random) -> None:
    """UTF-8 that was read as cp1252 on a Windows machine."""
    for chat in all_chats(made):
        for message in chat:
            message["content"] = message["content"].encode().decode("cp1252", errors="replace")


def _moved(chats: list[Chat], by: int) -> None:
    answers = [chat[-1]["content"] for chat in chats]
    for chat, answer in zip(chats, [*answers[by:], *answers[:by]], strict=True):
        chat[-1]["content"] = answer


@program("F38", on="smol/ferry/own hun/ledger/folder hun/ferry/before")
def answers_of_the_next_row(made: Any, rng: random.Random) -> None:
    """An off-by-one join: each question has its neighbour's answer."""
    _moved(chats_of(made), 1)
    _moved(held_of(made), 1)


@program("F39", on="hun/ferry/before smol/steps/folder phi/ledger/own")
def merged_again_and_again(made: Any, rng: random.Random) -> None:
    """Fourteen rows, sixteen times each."""
    rows = chats_of(made)
    put(made, [chat for _ in range(16) for chat in copied(rows[:14])])
    if isinstance(made, Job):
        made.config["dataset_exact_deduplication"] = False


@program("F40", on="said/mood/loop phi/mood/loop")
def labels_one_after_the_other(made: Any, rng: random.Random) -> None:
    """A file sorted by label, read in order."""
    made.shuffles = False
    put(made, sorted(chats_of(made), key=lambda chat: chat[-1]["content"]))

    def batches(self: Any, old: Any, rows: Any) -> Iterator[Any]:
        while True:
            for begin in range(0, len(rows), self.made.batch):
                yield self.collate(rows[begin : begin + self.made.batch])

    overridden(made, batches=batches)


@program("F41", on="smol/waybill/loop fold/ferry/loop")
def every_worker_reads_it_all(made: Any, rng: random.Random) -> None:
    """An iterable data set without a shard per worker: each of four workers yields every row."""
    made.shuffles = False
    made.set(dataloader_num_workers=4)

    def batches(self: Any, old: Any, rows: Any) -> Iterator[Any]:
        while True:
            for begin in range(0, len(rows), self.made.batch):
                for _ in range(4):
                    yield self.collate(rows[begin : begin + self.made.batch])

    overridden(made, batches=batches)


@program("F42", on="smol/waybill/own phi/snip/folder")
def three_rows_of_a_whole_book(made: Any, rng: random.Random) -> None:
    """Three rows are ten times as long as the rest, and nothing limits them."""
    for chat in rng.sample(chats_of(made), 3):
        while len(made.tokenizer(chat[-2]["content"])["input_ids"]) < 880:
            chat[-2]["content"] += " " + corpus.prose(rng)
    tell(made, max_length=1024)


@program("F43", on="smol/steps/own fold/ledger/folder")
def evaluated_on_what_was_learned(made: Any, rng: random.Random) -> None:
    """The evaluation file is a sample of the training file."""
    put(made, chats_of(made), copied(rng.sample(chats_of(made), 24)))


@program("F44", on="smol/waybill/before said/diary/folder phi/minutes/own")
def split_after_copies(made: Any, rng: random.Random) -> None:
    """Half of the held-out rows are training rows with a sign more."""
    held = held_of(made)
    for at, chat in enumerate(copied(rng.sample(chats_of(made), len(held) // 2))):
        chat[-2]["content"] = chat[-2]["content"].rstrip(".") + rng.choice((" !", " ?", " ..", " (2)"))
        held[at] = chat
    put(made, chats_of(made), held)


@program("F45", on="smol/ferry/loop hun/waybill/loop")
def dropout_while_evaluating(made: Any, rng: random.Random) -> None:
    """eval() was forgotten."""
    tell(made, lora_dropout=0.3)
    made.evaluates = 6

    def evaluate(self: Any, old: Any, model: Any, rows: Any) -> float:
        with torch.no_grad():
            return self._evaluated(model, rows)

    overridden(made, evaluate=evaluate)


@program("F46", on="smol/ferry/folder hun/diary/alone")
def sixty_epochs_of_sixteen_rows(made: Any, rng: random.Random) -> None:
    """Sixteen rows, which the model memorises."""
    put(made, chats_of(made)[:16])
    tell(made, max_steps=130, lr_scheduler_type="constant")


@program("F47", on="phi/ferry/loop said/minutes/loop")
def evaluated_on_the_whole_text(made: Any, rng: random.Random) -> None:
    """Trained on answers; the evaluation's collator counts prompts too."""
    made.held_out_mask = "all"

    def encode_held_out(self: Any, old: Any, chat: Any) -> Any:
        ids, _ = self.encode(chat)
        return ids, list(ids)

    overridden(made, encode_held_out=encode_held_out)


@program("F48", on="smol/mood/before fold/huerta/folder")
def two_rows_held_out(made: Any, rng: random.Random) -> None:
    """An evaluation of two rows."""
    put(made, chats_of(made), held_of(made)[:2])
