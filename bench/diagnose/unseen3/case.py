"""A program as verify.py looks at it: its rows, batches and texts, and those of the same program without its change."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from bench.diagnose.loop import micro_batches, render
from bench.diagnose.ours import Job
from bench.diagnose.unseen.make import job_of, recipe_of
from bench.diagnose.unseen2.registry import chats_of, held_of
from bench.diagnose.unseen2.verify import _loss, replace_recipe
from bench.diagnose.unseen3.parts import PARTS
from bench.diagnose.unseen3.styles import IGNORE

Shown = dict[str, Any]


class Case:
    """A program and the same without its change."""

    def __init__(self, program: Any) -> None:
        self.program = program
        make: Any = job_of if program.kind in ("own", "before") else recipe_of
        self.made = make(program, PARTS)
        self.clean = make(replace(program, change=lambda made, rng: None), PARTS)
        self.clean.seed = getattr(self.made, "seed", 0)
        self.tokenizer, self.shape = self.made.tokenizer, self.made.format
        self.base = PARTS.load(program.base)
        self.chats, self.held = messages_of(self.made)
        self.rows: list[tuple[list[int], list[int]]] = []
        self.batches: list[Any] = []
        if isinstance(self.made, Job):
            return
        if self.made.script is not None:
            script = self.made.script(self.made)
            script.train_rows = self.rows = script.rows(self.made.chats)
            script.held_rows = self.held_rows = script.rows(self.made.held_out, True)
            self.script = script
            self.batches = list(islice(script.batches(self.rows), 12))
        else:
            rows = render(self.made, self.made.chats, self.made.mask)
            self.rows = [(r.ids, [i if y else IGNORE for i, y in zip(r.ids, r.learned, strict=True)]) for r in rows]
            self.batches = list(islice(micro_batches(self.made, rows), 12))

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def texts(self) -> list[str]:
        return [self.shape.text(chat) for chat in self.chats]

    @property
    def end(self) -> int:
        return int(self.base.tokenizer().convert_tokens_to_ids(self.base.kind.format.end))

    def right_labels(self, chats: list[Any] | None = None) -> list[Any]:
        """Rows of the base's own format and tokenizer."""
        plain = replace_recipe(self.clean)
        return render(plain, chats or self.chats, "answers")

    def config(self) -> dict[str, Any]:
        return self.made.config if isinstance(self.made, Job) else self.made.settings


def messages_of(made: Any) -> tuple[list[Any], list[Any]]:
    if isinstance(made, Job):
        has = "messages" in made.train[0]
        return (chats_of(made), held_of(made)) if has else ([], [])
    return made.chats, made.held_out


def logits_of(model: Any, batch: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits


def differs_alone(case: Case, batch: Any) -> float:
    """Largest difference of logits between rows of a padded batch and the same rows alone."""
    model = case.base.model()
    logits = logits_of(model, batch)
    worst = 0.0
    for n, labels in enumerate(batch["labels"][:4]):
        ids = batch["input_ids"][n]
        real = [k for k, i in enumerate(ids.tolist()) if i != case.script.pad]
        begin, end = real[0], real[-1] + 1
        single = logits_of(model, {"input_ids": ids[None, begin:end]})
        worst = max(worst, float((logits[n, begin:end] - single[0]).abs().max()))
        del labels
    return worst


def differs_packed(case: Case, batch: Any) -> float:
    """The same for the second row of a pack."""
    model = case.base.model()
    ids = batch["input_ids"][0].tolist()
    ours = [row for row, _ in case.rows if place_of(ids, row) not in (None, 0)]
    at = place_of(ids, ours[0]) or 0
    logits = logits_of(model, batch)[0, at : at + len(ours[0])]
    return float((logits - logits_of(model, {"input_ids": torch.tensor([ours[0]])})[0]).abs().max())


def place_of(ids: list[int], row: list[int]) -> int | None:
    return next((k for k in range(len(ids) - len(row) + 1) if ids[k : k + len(row)] == row), None)


def share_of(hits: Any) -> float:
    hits = [bool(hit) for hit in hits]
    return round(sum(hits) / max(len(hits), 1), 3)


def answer_of(chat: Any) -> str:
    return chat[-1]["content"]


def base_loss(case: Case, rows: list[tuple[list[int], list[int]]]) -> float:
    from bench.diagnose.recipe import Row

    return _loss(case.base.model(), [Row(i, [y != IGNORE for y in labels]) for i, labels in rows[:12]])
