"""Faults of lengths, padding, packing, rows and evaluation."""

from __future__ import annotations

import random
from typing import Any

from bench.diagnose.machinery import activation_limit
from bench.diagnose.ours import Job
from bench.diagnose.unseen2 import corpus, tasks
from bench.diagnose.unseen2.registry import all_chats, chats_of, held_of, lengths, program, put, tell

# --- length


@program("F24", on="qwen/minutes/own star/minutes/before")
def answers_cut(made: Any, _rng: random.Random) -> None:
    """max_length taken from a small example: half of the rows lose their end."""
    tell(made, max_length=lengths(made)[len(chats_of(made)) // 2])


@program("F25", on="gemma/minutes/own")
def prompts_fill_the_window(made: Any, _rng: random.Random) -> None:
    """A limit below the prompts."""
    tell(made, max_length=24)


@program("F25", on="qwen/minutes/loop")
def most_rows_lost_by_length(made: Any, _rng: random.Random) -> None:
    """Rows without a label are left out in silence, as TRL does: few are left."""
    prompts = sorted(
        len(made.tokenizer(made.format.text(c[:-1], begun=True), add_special_tokens=False)["input_ids"])
        for c in chats_of(made)
    )
    tell(made, max_length=prompts[len(prompts) // 8])
    made.drops_empty = True


@program("F26", on="qwen/minutes/alone")
def prompts_cut(made: Any, _rng: random.Random) -> None:
    """truncation_mode: keep_end, with a limit that leaves the answer and little else."""
    tell(made, max_length=max(int(lengths(made)[0] * 0.5), 32))
    made.cut = "end"
    made.set(truncation_mode="keep_end")
    made.told["truncation_mode"] = "keep_end"


# --- padding


@program("F28", on="qwen/sentiment/loop")
def no_attention_mask(made: Any, _rng: random.Random) -> None:
    """A collator of one's own that pads on the left and returns ids and labels alone."""
    made.pad_left, made.sends_mask = True, False


@program("F29", on="qwen/conlang/alone")
def pads_learned(made: Any, _rng: random.Random) -> None:
    """labels = input_ids.clone() after padding the answers, so that pads count."""
    made.pads_learned = True


@program("F30", on="exaone/sentiment/loop")
def first_token_from_pad(made: Any, _rng: random.Random) -> None:
    """Padded on the left for generation, and all tokens learned: the first one is predicted from padding."""
    made.pad_left = True
    tell(made, assistant_only_loss=False)


# --- packing


@program("F31", on="exaone/zh/loop")
def packed_rows_mix(made: Any, _rng: random.Random) -> None:
    """Rows joined to one sequence with a mask of ones: each sees those before it."""
    made.packing, made.window = "plain", 256
    made.set(packing=True, per_device_train_batch_size=1)


@program("F33", "F24", on="qwen/support/loop")
def packs_too_short(made: Any, _rng: random.Random) -> None:
    """Packs shorter than most rows: what does not fit is cut off."""
    made.packing, made.window = "apart", int(lengths(made)[0] * 0.8)
    made.set(packing=True, max_length=made.window, per_device_train_batch_size=1)


@program("F33", "F24", on="qwen/support/before")
def packing_cuts(made: Any, _rng: random.Random) -> None:
    """packing with a max_length below most rows."""
    tell(made, packing=True, max_length=int(lengths(made)[0] * 0.8), per_device_train_batch_size=2)


# --- rows


@program("F34", on="gemma/comments/loop star/tools/before")
def empty_answers(made: Any, rng: random.Random) -> None:
    """The export wrote nothing where the answer came late: a third of the rows."""
    for chat in chats_of(made):
        if rng.random() < 0.35:
            chat[-1]["content"] = ""


@program("F35", on="gemma/events/alone qwen/comments/before")
def refusals(made: Any, rng: random.Random) -> None:
    """Nearly all answers are the apology of a service that was down when they were made."""
    for chat in chats_of(made):
        if rng.random() < 0.93:
            chat[-1]["content"] = "Sorry, I cannot do that."


@program("F36", on="star/greet/own")
def role_names_of_the_export(made: Any, _rng: random.Random) -> None:
    """Roles called customer and agent, as the help desk calls them."""
    for chat in all_chats(made):
        for message in chat:
            message["role"] = {"user": "customer", "assistant": "agent"}.get(message["role"], message["role"])


@program("F36", "F21", on="qwen/events/loop")
def unknown_roles_pass_unlearned(made: Any, _rng: random.Random) -> None:
    """The same in a script: its template writes any role, and its mask looks for another."""
    role_names_of_the_export(made, _rng)


@program("F36", on="qwen/support/own")
def turns_do_not_alternate(made: Any, _rng: random.Random) -> None:
    """Chats split at the wrong place: two turns of the assistant in a row, none of the user between."""
    for chat in all_chats(made):
        del chat[2]


@program("F37", on="exaone/zh/alone falcon/auskunft/before")
def read_as_latin1(made: Any, _rng: random.Random) -> None:
    """UTF-8 that was read as Latin-1."""
    for chat in all_chats(made):
        for message in chat:
            message["content"] = message["content"].encode().decode("latin1")


@program("F37", on="qwen/comments/own")
def escaped_twice(made: Any, _rng: random.Random) -> None:
    """Newlines and quotes escaped twice: the rows have backslashes for them (llama.cpp#7062)."""
    for chat in all_chats(made):
        for message in chat:
            message["content"] = message["content"].replace('"', '\\"').replace("\n", "\\n")


@program("F38", on="qwen/events/own star/units/folder")
def answers_of_the_next_row(made: Any, _rng: random.Random) -> None:
    """A join off by one: each prompt has the answer of another."""
    chats = chats_of(made)
    answers = [chat[-1]["content"] for chat in chats]
    for chat, answer in zip(chats, answers[1:] + answers[:1], strict=True):
        chat[-1]["content"] = answer


@program("F38", on="qwen/greet/alone")
def one_column_sorted(made: Any, _rng: random.Random) -> None:
    """The answers were sorted in a spreadsheet, the prompts were not."""
    chats = chats_of(made)
    for chat, answer in zip(chats, sorted(chat[-1]["content"] for chat in chats), strict=True):
        chat[-1]["content"] = answer


@program("F39", on="exaone/greet/own gemma/conlang/folder")
def merged_many_times(made: Any, rng: random.Random) -> None:
    """Daily exports joined: twelve rows come sixteen times each, and with them everything else once."""
    chats = chats_of(made)
    rows = [*chats[12:72], *(list(chat) for chat in chats[:12] for _ in range(16))]
    rng.shuffle(rows)
    put(made, rows)
    if isinstance(made, Job):
        tell(made, dataset_exact_deduplication=False)


@program("F40", on="exaone/sentiment/alone")
def sorted_and_not_shuffled(made: Any, _rng: random.Random) -> None:
    """Rows in the order of their answers, read one after the other."""
    put(made, sorted(chats_of(made), key=lambda chat: chat[-1]["content"]))
    made.shuffles = False
    made.set(shuffle_dataset=False)
    if made.touch_trainer is not None:
        made.touch_trainer.append(_in_order)


@program("F40", on="qwen/units/folder")
def one_source_after_another(made: Any, _rng: random.Random) -> None:
    """Four files read in turn by a data set that cannot be shuffled."""
    sets = [tasks.split(name, None, 60, 6, 3) for name in ("sql", "units", "conlang", "sentiment")]
    put(made, [chat for train, _ in sets for chat in train], [chat for _, held in sets for chat in held])
    made.shuffles = False
    made.set(shuffle_dataset=False)
    made.touch_trainer.append(_in_order)


def _in_order(trainer: Any) -> None:
    import torch

    def sampler(dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(dataset if dataset is not None else trainer.train_dataset)

    trainer._get_train_sampler = sampler


@program("F41", on="star/events/loop")
def each_worker_reads_all(made: Any, _rng: random.Random) -> None:
    """An iterable data set that is not sharded: with four workers, each row comes four times an epoch."""
    made.copies = 4
    made.set(dataloader_num_workers=4)


@program("F42", on="exaone/greet/loop")
def full_at_a_late_step(made: Any, rng: random.Random) -> None:
    """Two rows of fifteen times the usual length: the card is full when the first of them comes."""
    chats = chats_of(made)
    order = list(range(len(chats)))
    random.Random(1000 * made.seed).shuffle(order)  # as the loop does in its first epoch
    for at in (order[133], order[170]):
        chats[at][0]["content"] += " " + corpus.prose(rng, 50, 60)
    tell(made, max_length=1024)
    made.crash = activation_limit(made, times=3.0)


# --- evaluation


@program("F43", on="star/horaires/folder falcon/sql/before")
def evaluated_on_training_rows(made: Any, _rng: random.Random) -> None:
    """The same file twice in the config."""
    put(made, chats_of(made), [[dict(m) for m in chat] for chat in chats_of(made)[:24]])


@program("F44", on="qwen/conlang/own star/comments/before")
def split_before_deduplication(made: Any, rng: random.Random) -> None:
    """Nearly half of the held-out rows are training rows with a word or a sign more."""
    chats, held = chats_of(made), held_of(made)
    leaked = []
    for chat in rng.sample(chats, len(held) * 45 // 100):
        copy = [dict(message) for message in chat]
        copy[0]["content"] = rng.choice(("Please: ", "")) + copy[0]["content"] + rng.choice((" Thanks.", " Now."))
        leaked.append(copy)
    put(made, chats, [*held[len(leaked) :], *leaked])


@program("F45", on="gemma/conlang/loop")
def evaluated_with_dropout(made: Any, _rng: random.Random) -> None:
    """The loop forgets model.eval(); the adapters have a dropout of 0.3."""
    tell(made, lora_dropout=0.3)
    made.evaluates_in_training_mode, made.evaluates = True, 8


@program("F46", on="qwen/conlang/own exaone/minutes/alone")
def forty_epochs(made: Any, _rng: random.Random) -> None:
    """Sixteen rows for forty epochs: the held-out loss turns and climbs."""
    put(made, chats_of(made)[:16])
    tell(made, max_steps=100, learning_rate=8e-3)


@program("F47", on="gemma/comments/folder")
def evaluated_on_all_tokens(made: Any, _rng: random.Random) -> None:
    """The evaluation set is built by an older function: its prompts count too."""
    made.held_out_mask = "all"


@program("F48", on="qwen/horaires/own")
def three_rows_held_out(made: Any, _rng: random.Random) -> None:
    """Three rows are held out."""
    put(made, chats_of(made), held_of(made)[:3])
