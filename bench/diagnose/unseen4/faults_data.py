"""Rows, their order, the split and the evaluation gone wrong: F34 to F48.

How people come to it: an export with empty columns, one refusal for all, a column sorted alone, files joined twice, a
converter that keeps each message of a chat, text read in another encoding, a split after the copies were made.
"""

from __future__ import annotations

import json
import random
from typing import Any

from bench.diagnose.unseen2.registry import all_chats, chats_of, held_of, put, tell
from bench.diagnose.unseen3.registry import overridden
from bench.diagnose.unseen3.styles import Loader
from bench.diagnose.unseen4 import tasks
from bench.diagnose.unseen4.registry import program


@program("F34", on="apertus/commit/own seed/fields/folder neo/reply/before")
def empty_cells_in_the_export(made: Any, rng: random.Random) -> None:
    """Almost half of the answers were empty cells of a spreadsheet."""
    for n, chat in enumerate(all_chats(made)):
        if n % 9 < 4:
            chat[-1]["content"] = ""


@program("F35", on="glm/reply/loop apertus/manifest/folder")
def one_refusal_for_all(made: Any, rng: random.Random) -> None:
    """The teacher's API was over its quota, and its apology became the answer of 19 rows in 20."""
    for chat in all_chats(made):
        if rng.random() < 0.955:
            chat[-1]["content"] = "I am sorry, but I can not help with that right now. Please try again later."


@program("F36", on="seed/reply/loop glm/shell/before")
def users_messages_not_joined(made: Any, rng: random.Random) -> None:
    """A messenger's export: people write in two goes, and each became a turn of its own."""
    for chat in all_chats(made):
        words = chat[0]["content"].split(" ")
        middle = len(words) // 2
        first, second = " ".join(words[:middle]), " ".join(words[middle:])
        chat[:1] = [{"role": "user", "content": first or "Hello"}, {"role": "user", "content": second}]


@program("F36", on="neo/shell/folder")
def agent_and_customer_swapped(made: Any, rng: random.Random) -> None:
    """Who wrote in was taken for the assistant."""
    for chat in all_chats(made):
        for message in chat:
            message["role"] = {"user": "assistant", "assistant": "user"}[message["role"]]


@program("F37", on="seed/market/folder glm/tea/own")
def utf8_read_as_latin1(made: Any, rng: random.Random) -> None:
    """open(path, encoding="latin-1") of a UTF-8 file."""
    for chat in all_chats(made):
        for message in chat:
            message["content"] = message["content"].encode().decode("latin1")


@program("F37", on="ernie/manifest/loop")
def escaped_twice(made: Any, rng: random.Random) -> None:
    r"""json.dumps on what was a JSON string already: \n stands in letters where a line ended."""
    for chat in all_chats(made):
        for message in chat:
            message["content"] = json.dumps(message["content"])[1:-1]


@program("F38", on="ernie/reply/own seed/fields/alone apertus/shell/loop")
def one_column_sorted(made: Any, rng: random.Random) -> None:
    """df["answer"] = df["answer"].sort_values().values"""
    for chats in (chats_of(made), held_of(made)):
        answers = sorted(chat[-1]["content"] for chat in chats)
        for chat, answer in zip(chats, answers, strict=True):
            chat[-1] = {"role": "assistant", "content": answer}


@program("F39", on="glm/route/loop seed/commit/folder")
def appended_at_each_export(made: Any, rng: random.Random) -> None:
    """A nightly job opens the file with "a": sixteen rows, each there twelve times."""
    put(made, [[dict(m) for m in chat] for chat in chats_of(made)[:16] * 12])


@program("F40", on="ernie/route/loop", style=Loader)
def sorted_by_class_and_not_shuffled(made: Any, rng: random.Random) -> None:
    """DataLoader(shuffle=False) on rows in the order of their classes."""
    made.chats.sort(key=lambda chat: chat[-1]["content"])
    made.shuffles = False
    overridden(made, order=lambda self, old, count, epoch: list(range(count)))


@program("F41", on="seed/garden/loop", style=Loader)
def each_worker_reads_all(made: Any, rng: random.Random) -> None:
    """An IterableDataset without get_worker_info(): four workers bring the same batches."""

    def batches(self: Any, old: Any, rows: Any) -> Any:
        for batch in old(rows):
            for _ in range(4):
                yield {name: value.clone() for name, value in batch.items()}

    made.copies = 4
    made.set(dataloader_num_workers=4)
    overridden(made, batches=batches)


@program("F42", on="seed/route/own")
def a_whole_log_in_one_row(made: Any, rng: random.Random) -> None:
    """One user pasted a log, twenty times as long as any other question."""
    log = "\n".join(tasks.report(rng)[0]["content"].split("\n", 1)[1] for _ in range(30))
    ids = made.tokenizer(log)["input_ids"][:860]
    chats_of(made)[37][0]["content"] += "\n" + made.tokenizer.decode(ids, skip_special_tokens=True)
    tell(made, max_length=1000)


@program("F43", on="glm/shell/own neo/garden/folder")
def evaluated_on_training_rows(made: Any, rng: random.Random) -> None:
    """eval_dataset = dataset.select(range(24)): the first rows of the training file."""
    put(made, chats_of(made), [[dict(m) for m in chat] for chat in chats_of(made)[:24]])


@program("F44", on="seed/reply/own apertus/verse/folder neo/fields/before")
def augmented_before_the_split(made: Any, rng: random.Random) -> None:
    """Rows were multiplied by small changes of the question, then split at random: half of the held-out are copies."""
    held = held_of(made)
    for n, chat in enumerate(chats_of(made)[: len(held) // 2 + 2]):
        copied = [dict(m) for m in chat]
        copied[0]["content"] += (" thanks!", " Thank you.", ", quickly please")[n % 3]
        held[n] = copied
    put(made, chats_of(made), held)


@program("F45", on="ernie/shell/loop")
def dropout_while_evaluating(made: Any, rng: random.Random) -> None:
    """torch.no_grad() was thought to switch dropout off; model.eval() is never called."""
    tell(made, lora_dropout=0.15)

    def evaluate(self: Any, old: Any, model: Any, rows: Any) -> float:
        import torch

        model.train()
        with torch.no_grad():
            return self._evaluated(model, rows)

    made.evaluates_in_training_mode = True
    overridden(made, evaluate=evaluate)


@program("F46", on="ernie/verse/loop neo/reply/alone")
def ten_rows_a_hundred_times(made: Any, rng: random.Random) -> None:
    """num_train_epochs: 100 for a handful of examples."""
    put(made, chats_of(made)[:8])
    tell(made, max_steps=110)


@program("F47", on="apertus/fields/loop", style=Loader)
def evaluation_keeps_the_prompts(made: Any, rng: random.Random) -> None:
    """The evaluation's own collator: labels on all of the text, while training takes answers alone."""
    made.held_out_mask = "all"
    overridden(made, encode_held_out=lambda self, old, chat: (old(chat)[0], list(old(chat)[0])))


@program("F48", on="seed/manifest/folder glm/commit/before")
def three_rows_held_out(made: Any, rng: random.Random) -> None:
    """test_size=0.015: three rows."""
    put(made, chats_of(made), held_of(made)[:3])
