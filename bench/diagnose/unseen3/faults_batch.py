"""Labels, lengths, padding and packs gone wrong: F17 to F33, mostly in loops by hand.

How: a collator that masks by id, labels shifted in the data set and again in the loss, a marker searched for with one
blank too many, a mask multiplied the wrong way round, a pack without limits.
"""

from __future__ import annotations

import random
from typing import Any

import torch

from bench.diagnose.unseen2.registry import lengths, reformat, tell
from bench.diagnose.unseen3.registry import overridden, program
from bench.diagnose.unseen3.styles import IGNORE, Loader, Nano, Packer, Tutor


@program("F17", on="phi/waybill/loop fold/diary/loop")
def pads_masked_by_their_id(made: Any, rng: random.Random) -> None:
    """pad_token = eos_token, and the collator masks what equals it."""
    made.tokenizer.pad_token = made.tokenizer.eos_token
    if made.base.kind.name == "phi-plain":
        made.deployed = lambda text: made.format.text([{"role": "user", "content": text}], begun=True)

    def collate(self: Any, old: Any, rows: Any) -> Any:
        batch = old(rows)
        batch["labels"][batch["labels"] == self.tokenizer.pad_token_id] = IGNORE
        return batch

    overridden(made, collate=collate)


@program("F18|F21", on="smol/ledger/loop hun/mood/loop")
def mask_from_a_template_without_markers(made: Any, rng: random.Random) -> None:
    """return_assistant_tokens_mask with a template that marks nothing."""

    def encode(self: Any, old: Any, chat: Any) -> Any:
        told = self.tokenizer.apply_chat_template(
            chat, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        ids, mask = told["input_ids"], told["assistant_masks"]
        return ids, [i if is_answer else IGNORE for i, is_answer in zip(ids, mask, strict=True)]

    overridden(made, encode=encode)


@program("F19", on="smol/snip/loop phi/mood/loop")
def answer_without_its_end(made: Any, rng: random.Random) -> None:
    """The labels cover the answer's words; the end of the turn counts as the template's."""
    made.format = type(made.format)(**{**made.format.__dict__, "end_is_learned": False})
    if made.script is Tutor:
        made.script = Nano


@program("F20", on="phi/steps/loop said/minutes/loop")
def mask_built_and_not_used(made: Any, rng: random.Random) -> None:
    """The mask of the answers was built, and labels are a copy of the ids."""

    def encode(self: Any, old: Any, chat: Any) -> Any:
        ids, _ = old(chat)
        return ids, list(ids)

    overridden(made, encode=encode)


@program("F21|F18", on="hun/snip/loop smol/diary/loop")
def marker_with_a_blank_too_many(made: Any, rng: random.Random) -> None:
    """The answer is searched for by the tokens of its header and a blank, which never occur in a row."""

    def encode(self: Any, old: Any, chat: Any) -> Any:
        ids = self.ids_of(self.made.format.text(chat))
        marker = self.ids_of(self.made.format.head("assistant").rstrip("\n") + " ")
        labels = [IGNORE] * len(ids)
        for at in range(len(ids)):
            if ids[at : at + len(marker)] == marker:
                labels[at + len(marker) :] = ids[at + len(marker) :]
        return ids, labels

    overridden(made, encode=encode)


@program("F22", on="smol/huerta/loop")
def shifted_in_the_data_and_in_the_loss(made: Any, rng: random.Random) -> None:
    """Targets are the next tokens already, and the loss moves them again."""

    def collate(self: Any, old: Any, rows: Any) -> Any:
        batch = old(rows)
        moved = batch["labels"].roll(-1, dims=1)
        moved[:, -1] = IGNORE
        return {**batch, "labels": moved}

    overridden(made, collate=collate)


@program("F22", on="said/mood/loop")
def compared_with_the_same_position(made: Any, rng: random.Random) -> None:
    """A bare loss that shifts nothing at all, on labels that were moved the other way."""

    def collate(self: Any, old: Any, rows: Any) -> Any:
        batch = old(rows)
        return {**batch, "labels": torch.cat([torch.full_like(batch["labels"][:, :1], IGNORE),
                                              batch["labels"][:, :-1]], dim=1)}  # fmt: skip

    overridden(made, collate=collate)


@program("F23", on="said/waybill/loop fold/mood/loop")
def mask_the_wrong_way_round(made: Any, rng: random.Random) -> None:
    """True was meant to be what is left out."""

    def encode(self: Any, old: Any, chat: Any) -> Any:
        ids, labels = old(chat)
        return ids, [i if label == IGNORE else IGNORE for i, label in zip(ids, labels, strict=True)]

    overridden(made, encode=encode)


def _limit(made: Any, limit: int) -> None:
    tell(made, max_length=limit)


def _shortest_prompt(made: Any) -> int:
    from bench.diagnose.unseen2.registry import chats_of

    return min(
        len(made.tokenizer(made.format.text(chat[:-1], begun=True), add_special_tokens=False)["input_ids"])
        for chat in chats_of(made)
    )


@program("F24", on="fold/huerta/own hun/diary/before said/ferry/folder")
def most_answers_cut(made: Any, rng: random.Random) -> None:
    """max_length lies below three quarters of the rows."""
    found = lengths(made)
    _limit(made, found[len(found) // 4] - 8)


@program("F25", on="fold/minutes/own phi/minutes/folder")
def documents_fill_the_window(made: Any, rng: random.Random) -> None:
    """The documents alone are longer than max_length."""
    _limit(made, _shortest_prompt(made) - 6)


@program("F26", on="said/minutes/loop smol/riddle/loop")
def beginning_cut_away(made: Any, rng: random.Random) -> None:
    """truncation_side is left: the question goes, the answer stays."""
    found = lengths(made)
    keep = max(int(found[0] * 0.42), 24)
    _limit(made, keep)
    made.set(truncation_side="left")

    def cut(self: Any, old: Any, ids: Any, labels: Any) -> Any:
        return ids[-keep:], labels[-keep:]

    overridden(made, cut=cut)


def _padded_left(self: Any, rows: Any) -> Any:
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([[self.pad] * (longest - len(i)) + i for i, _ in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i, _ in rows]),
        "labels": torch.tensor([[IGNORE] * (longest - len(i)) + y for i, y in rows]),
    }


@program("F27", on="said/steps/loop said/diary/loop")
def positions_counted_from_the_pad(made: Any, rng: random.Random) -> None:
    """Absolute positions, left padding, arange."""

    def collate(self: Any, old: Any, rows: Any) -> Any:
        batch = _padded_left(self, rows)
        count, longest = batch["input_ids"].shape
        return {**batch, "position_ids": torch.arange(longest).repeat(count, 1)}

    overridden(made, collate=collate)


@program("F28", on="phi/diary/loop fold/haggle/loop")
def padded_left_without_a_mask(made: Any, rng: random.Random) -> None:
    """Left padding; the mask was forgotten, or is of ones."""
    has_ones = made.seed % 2

    def collate(self: Any, old: Any, rows: Any) -> Any:
        batch = _padded_left(self, rows)
        mask = batch.pop("attention_mask")
        return {**batch, "attention_mask": torch.ones_like(mask)} if has_ones else batch

    overridden(made, collate=collate)


@program("F29", on="smol/waybill/loop said/haggle/loop")
def labels_of_the_padded_batch(made: Any, rng: random.Random) -> None:
    """Batches are padded to max_length, and padding keeps its id as label."""

    def collate(self: Any, old: Any, rows: Any) -> Any:
        width = 160
        room = [(ids[:width] + [self.pad] * (width - len(ids)), y[:width] + [self.pad] * (width - len(y)))
                for ids, y in rows]  # fmt: skip
        batch = old(room)
        mask = torch.tensor([[1] * min(len(i), width) + [0] * max(width - len(i), 0) for i, _ in rows])
        return {**batch, "attention_mask": mask}

    overridden(made, collate=collate)


@program("F30", on="smol/steps/loop phi/haggle/loop")
def first_token_from_the_pad(made: Any, rng: random.Random) -> None:
    """On the whole text, padded left: each short row's first token is learned after padding."""
    tell(made, assistant_only_loss=False)

    def collate(self: Any, old: Any, rows: Any) -> Any:
        return _padded_left(self, rows)

    def encode(self: Any, old: Any, chat: Any) -> Any:
        ids, _ = old(chat)
        return ids, list(ids)

    overridden(made, collate=collate, encode=encode)


def _packs(made: Any) -> None:
    made.script, made.window, made.accumulation = Packer, 256, 3
    tell(made, packing=True, gradient_accumulation_steps=3)


@program("F31", on="fold/ferry/loop phi/mood/loop")
def packs_without_walls(made: Any, rng: random.Random) -> None:
    """Rows one after the other, positions that run on, or a mask of ones."""
    _packs(made)
    has_ones = made.seed % 2

    def packed(self: Any, old: Any, rows: Any) -> Any:
        batch = old(rows)
        length = batch["input_ids"].shape[1]
        if has_ones:
            return {**batch, "attention_mask": torch.ones(1, length, dtype=torch.long)}
        return {**batch, "position_ids": torch.arange(length)[None]}

    overridden(made, packed=packed)


@program("F32", on="said/ledger/loop said/waybill/loop")
def walls_without_a_new_count(made: Any, rng: random.Random) -> None:
    """A mask of blocks, and positions that run on, on a model with absolute positions."""
    _packs(made)

    def packed(self: Any, old: Any, rows: Any) -> Any:
        batch = old(rows)
        document = torch.tensor([n for n, (ids, _) in enumerate(rows) for _ in ids])
        length = len(document)
        sees = (document[:, None] == document[None]) & torch.ones(length, length).tril().bool()
        mask = torch.where(sees, 0.0, torch.finfo(torch.float32).min)[None, None]
        return {**batch, "attention_mask": mask, "position_ids": torch.arange(length)[None]}

    overridden(made, packed=packed)


@program("F33|F24", on="smol/diary/loop")
def packs_cut_at_the_window(made: Any, rng: random.Random) -> None:
    """A row that does not fit into what is left of a window loses its end."""
    _packs(made)
    made.window = 150 if made.base.kind.name == "smol3-think" else 140

    def batches(self: Any, old: Any, rows: Any) -> Any:
        for epoch in range(10**6):
            held: list[Any] = []
            room = self.made.window
            for i in self.order(len(rows), epoch):
                ids, labels = rows[i]
                held.append((ids[:room], labels[:room]))
                room -= len(ids)
                if room < 12:
                    yield self.packed(held)
                    held, room = [], self.made.window

    overridden(made, batches=batches)


@program("F33|F24", on="hun/haggle/own")
def packs_shorter_than_rows(made: Any, rng: random.Random) -> None:
    """packing with a max_length below half of the rows: their ends are lost in the packs."""
    found = lengths(made)
    tell(made, packing=True, max_length=found[len(found) // 3] - 4)


_ = (Loader, reformat)
