"""Four ways in which people write a training loop by hand; a program overrides what its author did otherwise.

    Nano      rows drawn at random, prompt and answer encoded apart, cross entropy by hand
    Loader    epochs of shuffled batches, labels from character offsets, the model's own loss, accumulation by tokens
    Tutor     a class around a chat template: labels are what follows the prompt's tokens, losses summed by hand
    Packer    rows one after the other in a window, positions that restart, no mask

Shape legend: B sequences, T tokens.
"""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model_state_dict

from bench.diagnose.loop import Batch, Outcome, build, make_optimizer, rate_at, render
from bench.diagnose.recipe import Row
from bench.diagnose.run_facts import _generate, run_facts_of
from bench.diagnose.worlds import Chat

IGNORE = -100


class Script:
    """What all four share: the order of things."""

    def __init__(self, made: Any) -> None:
        self.made = made
        self.tokenizer = made.tokenizer
        pad = made.tokenizer.pad_token_id
        self.pad = made.tokenizer.eos_token_id if pad is None else pad

    # --- from chats to batches
    def encode(self, chat: Chat) -> tuple[list[int], list[int]]:
        """Ids, and labels as long as they are."""
        raise NotImplementedError

    def encode_held_out(self, chat: Chat) -> tuple[list[int], list[int]]:
        return self.encode(chat)

    def cut(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        return ids[: self.made.max_length], labels[: self.made.max_length]

    def ids_of(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def collate(self, rows: list[tuple[list[int], list[int]]]) -> Batch:
        longest = max(len(ids) for ids, _ in rows)
        batch_BT = torch.full((len(rows), longest), self.pad)
        labels_BT = torch.full((len(rows), longest), IGNORE)
        mask_BT = torch.zeros(len(rows), longest, dtype=torch.long)
        for n, (ids, labels) in enumerate(rows):
            batch_BT[n, : len(ids)] = torch.tensor(ids)
            labels_BT[n, : len(ids)] = torch.tensor(labels)
            mask_BT[n, : len(ids)] = 1
        return {"input_ids": batch_BT, "attention_mask": mask_BT, "labels": labels_BT}

    def order(self, count: int, epoch: int) -> list[int]:
        order = list(range(count))
        random.Random(31 * self.made.seed + epoch).shuffle(order)
        return order

    def batches(self, rows: list[tuple[list[int], list[int]]]) -> Iterator[Batch]:
        for epoch in range(10**6):
            order = self.order(len(rows), epoch)
            for begin in range(0, len(order), self.made.batch):
                yield self.collate([rows[i] for i in order[begin : begin + self.made.batch]])

    # --- a step
    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        return model(**batch, use_cache=False).loss

    def backward(self, model: Any, batches: list[Batch]) -> float:
        """Forward and backward of one optimizer step; what is logged."""
        counts = [max(int((b["labels"][:, 1:] != IGNORE).sum()), 1) for b in batches]
        logged = 0.0
        for batch, count in zip(batches, counts, strict=True):
            loss = self.loss(model, batch) * count / sum(counts)
            loss.backward()
            logged += float(loss.detach())
        return logged

    def optimizer(self, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        return make_optimizer(self.made, parameters)

    def rate(self, step: int) -> float:
        return rate_at(self.made, step)

    @torch.no_grad()
    def evaluate(self, model: Any, rows: list[Any]) -> float:
        model.eval()
        found = self._evaluated(model, rows)
        model.train()
        return found

    def _evaluated(self, model: Any, rows: list[Any]) -> float:
        total, count = 0.0, 0
        for begin in range(0, len(rows), 8):
            batch = self.collate(rows[begin : begin + 8])
            number = int((batch["labels"][:, 1:] != IGNORE).sum())
            if number:
                total, count = total + float(self.loss(model, batch)) * number, count + number
        return total / count if count else math.nan

    # --- the whole
    def rows(self, chats: list[Chat], held_out: bool = False) -> list[tuple[list[int], list[int]]]:
        encode = self.encode_held_out if held_out else self.encode
        return [self.cut(*encode(chat)) for chat in chats]

    def run(self) -> Outcome:
        torch.manual_seed(self.made.seed)
        self.train_rows, self.held_rows = self.rows(self.made.chats), self.rows(self.made.held_out, True)
        outcome = Outcome(_as_rows(self.train_rows), _as_rows(self.held_rows))
        outcome.batches = list(islice(self.batches(self.train_rows), 12))
        outcome.errors += self.made.warnings
        try:
            self.fit(outcome)
        except (RuntimeError, IndexError, ValueError) as error:  # what a user would see
            outcome.errors.append("".join(traceback.format_exception(error)))
        return outcome

    def fit(self, outcome: Outcome) -> None:
        made = self.made
        model = build(made)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = self.optimizer(parameters)
        source = self.batches(self.train_rows)
        if made.saves_at_start:
            self.save(outcome, model)
        last = min(made.steps, made.stop_after or made.steps)
        for step in range(last):
            optimizer, source = self.before(step, optimizer, source, parameters)
            for group in optimizer.param_groups:
                group["lr"] = self.rate(step)
            if made.crash is not None:
                with made.crash(step):
                    loss, norm = self.step(model, optimizer, parameters, source)
            else:
                loss, norm = self.step(model, optimizer, parameters, source)
            outcome.log.append({"step": step + 1, "loss": loss, "learning_rate": self.rate(step), "grad_norm": norm,
                                "epoch": (step + 1) / made.epoch_steps})  # fmt: skip
            if outcome.held_out and made.evaluates and (step + 1) % max(made.steps // made.evaluates, 1) == 0:
                outcome.evaluations.append((step + 1, self.evaluate(model, self.held_rows)))
        outcome.finished = last == made.steps
        if not made.saves_at_start:
            self.save(outcome, model)
        if made.merged is not None:
            outcome.merged = made.merged(model)

    def before(self, _step: int, optimizer: Any, source: Any, _parameters: list[Any]) -> tuple[Any, Any]:
        """What happens between two steps, as a resume."""
        return optimizer, source

    def step(self, model: Any, optimizer: Any, parameters: list[Any], source: Any) -> tuple[float, float]:
        loss = self.backward(model, list(islice(source, self.made.accumulation)))
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.made.clip)) if parameters else 0.0
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss, norm

    def save(self, outcome: Outcome, model: Any) -> None:
        state = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
        outcome.adapter = self.made.saves(state) if self.made.saves else state

    def facts(self) -> Any:
        """What its owner could hand over."""
        outcome = self.run()
        facts = run_facts_of(self.made, outcome)
        if facts.live is None:
            return facts
        return replace(facts, live=self._live(outcome))

    def _live(self, outcome: Outcome) -> Any:
        from solotune.diagnosis.run_facts import LiveModel

        @cache
        def load() -> Any:
            model = build(self.made)
            return LiveModel(
                model=model,
                batches=outcome.batches,
                make_optimizer=lambda parameters: self.optimizer(list(parameters)),
                loss_of=lambda model, batch: self.loss(model, dict(batch)),
                evaluate=(lambda model: self.evaluate(model, self.held_rows)) if self.held_rows else None,
                generate=lambda text: _generate(self.made, model, text),
                backward=lambda model, batches: self.backward(model, [dict(batch) for batch in batches]),
            )

        return load


def _as_rows(rows: list[tuple[list[int], list[int]]]) -> list[Row]:
    return [Row(list(ids), [label != IGNORE for label in labels]) for ids, labels in rows]


class Nano(Script):
    """A bare loop."""

    def encode(self, chat: Chat) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for text, is_learned in self.spans(chat):
            new = self.ids_of(text)
            ids += new
            labels += new if is_learned or self.made.mask == "all" else [IGNORE] * len(new)
        return ids, labels

    def spans(self, chat: Chat) -> list[tuple[str, bool]]:
        """Text between changes of the mask."""
        found: list[tuple[str, bool]] = []
        for text, is_learned in self.made.format.pieces(chat):
            if found and found[-1][1] == is_learned:
                found[-1] = (found[-1][0] + text, is_learned)
            else:
                found.append((text, is_learned))
        return found

    def batches(self, rows: list[tuple[list[int], list[int]]]) -> Iterator[Batch]:
        rng = random.Random(self.made.seed)
        while True:
            yield self.collate([rng.choice(rows) for _ in range(self.made.batch)])

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits_BTV = model(**inputs, use_cache=False).logits
        wanted = batch["labels"][:, 1:]
        return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=IGNORE)


class Loader(Script):
    """Epochs of a data loader."""

    def encode(self, chat: Chat) -> tuple[list[int], list[int]]:
        plain = replace(self.made, edit_row=[], max_length=10**6, cut="start", drops_empty=False)
        (row,) = render(plain, [chat], self.made.mask)
        return row.ids, [i if learned else IGNORE for i, learned in zip(row.ids, row.learned, strict=True)]


class Tutor(Script):
    """Prompt and answer through the template."""

    def encode(self, chat: Chat) -> tuple[list[int], list[int]]:
        shape = self.made.format
        ids: list[int] = self.ids_of(shape.text(chat))
        labels = list(ids) if self.made.mask == "all" else [IGNORE] * len(ids)
        for at, message in enumerate(chat):
            if message["role"] == "assistant" and self.made.mask != "all":
                last = max(i for i, m in enumerate(chat) if m["role"] == "user")
                if "<think>" in message["content"] and at < last:
                    continue
                prompt = self.ids_of(shape.text(chat[:at], begun=True))
                after = self.ids_of(shape.text(chat[: at + 1]).removesuffix(shape.after))
                labels[len(prompt) : len(after)] = ids[len(prompt) : len(after)]
        return ids, labels

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits_BTV = model(**inputs, use_cache=False).logits.float()
        wanted_BT = batch["labels"].roll(-1, dims=1)
        wanted_BT[:, -1] = IGNORE
        each = F.cross_entropy(logits_BTV.transpose(1, 2), wanted_BT, ignore_index=IGNORE, reduction="none")
        return each.sum() / (wanted_BT != IGNORE).sum().clamp(min=1)


class Packer(Loader):
    """Rows in a window."""

    def batches(self, rows: list[tuple[list[int], list[int]]]) -> Iterator[Batch]:
        for epoch in range(10**6):
            window: list[tuple[list[int], list[int]]] = []
            for i in self.order(len(rows), epoch):
                if window and sum(len(ids) for ids, _ in [*window, rows[i]]) > self.made.window:
                    yield self.packed(window)
                    window = []
                window.append(rows[i])
            if window:
                yield self.packed(window)

    def packed(self, rows: list[tuple[list[int], list[int]]]) -> Batch:
        ids = [i for row, _ in rows for i in row]
        labels = [i for _, row in rows for i in [IGNORE, *row[1:]]]
        positions = [at for row, _ in rows for at in range(len(row))]
        return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]),
                "position_ids": torch.tensor([positions])}  # fmt: skip


STYLES: tuple[type[Script], ...] = (Nano, Loader, Tutor)
