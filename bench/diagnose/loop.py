"""A fine-tuning with plain transformers and PEFT, written so that it can be done wrong.

None of solotune's own data path or loop is used: its collator cannot leave a mask out, and its labels cannot be
shifted. `build(recipe)` makes the model as it is before the first step, `train(recipe)` runs it.

Shape legend: B sequences, T tokens.
"""

from __future__ import annotations

import contextlib
import math
import random
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from bench.diagnose.recipe import Recipe, Row

Batch = dict[str, torch.Tensor]


@dataclass
class Outcome:
    """What a run left behind."""

    rows: list[Row]
    held_out: list[Row]
    batches: list[Batch] = field(default_factory=list)
    log: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    adapter: dict[str, torch.Tensor] | None = None
    """None where it crashed before it saved anything."""
    merged: torch.nn.Module | None = None
    finished: bool = False
    of_ranks: dict[int, Outcome] = field(default_factory=dict)
    """The other ranks' outcomes, where they were gathered."""


def render(recipe: Recipe, chats: list, mask: str) -> list[Row]:
    """Chats to ids and mask: the whole text at once, a token learned where its first character is."""
    rows = []
    for chat in chats:
        pieces = recipe.format.pieces(chat)
        text = "".join(piece for piece, _ in pieces)
        wanted = [learned for piece, learned in pieces for _ in piece]
        encoded = recipe.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        learned = [wanted[begin] if begin < len(wanted) else False for begin, _ in encoded["offset_mapping"]]
        learned = {"answers": learned, "all": [True] * len(learned), "none": [False] * len(learned)}.get(
            mask, [not one for one in learned]
        )
        row = Row(list(encoded["input_ids"]), learned)
        for edit in recipe.edit_row:
            row = edit(row)
        keep = slice(0, recipe.max_length) if recipe.cut == "start" else slice(-recipe.max_length, None)
        row = Row(row.ids[keep], row.learned[keep])
        if any(row.learned[1:]) or not recipe.drops_empty:
            rows.append(row)
    return rows


def collate(recipe: Recipe, rows: list[Row]) -> Batch:
    """Rows to a batch, padded to the longest."""
    pad, eos = recipe.tokenizer.pad_token_id, recipe.tokenizer.eos_token_id
    pad = eos if pad is None else pad
    longest = max(len(row.ids) for row in rows)
    ids, labels, mask = [], [], []
    for row in rows:
        gap = longest - len(row.ids)
        wanted = [
            i if learned and not (recipe.masks_pad_id and i == pad) else -100
            for i, learned in zip(row.ids, row.learned, strict=True)
        ]
        fill = ([pad] * gap, [pad if recipe.pads_learned else -100] * gap, [0] * gap)
        own = (row.ids, wanted, [1] * len(row.ids))
        for into, filled, given in zip((ids, labels, mask), fill, own, strict=True):
            into.append(filled + given if recipe.pad_left else given + filled)
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}
    if recipe.shift:
        batch["labels"] = torch.roll(batch["labels"], -recipe.shift, dims=1)
    if recipe.positions == "counted":
        batch["position_ids"] = torch.arange(longest).repeat(len(rows), 1)
    if recipe.positions == "real":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if not recipe.sends_mask:
        del batch["attention_mask"]
    return batch


def pack(recipe: Recipe, rows: list[Row]) -> list[Batch]:
    """Rows one after the other in sequences of at most `window` tokens; a longer row is cut there."""
    packs: list[list[Row]] = [[]]
    for row in rows:
        row = Row(row.ids[: recipe.window], row.learned[: recipe.window])
        if sum(len(one.ids) for one in packs[-1]) + len(row.ids) > recipe.window:
            packs.append([])
        packs[-1].append(row)
    batches = []
    for members in filter(None, packs):
        ids = [i for row in members for i in row.ids]
        # the first token of a document has no predecessor
        labels = [
            i if learned and at else -100
            for row in members
            for at, (i, learned) in enumerate(zip(row.ids, row.learned, strict=True))
        ]
        document = torch.tensor([n for n, row in enumerate(members) for _ in row.ids])
        restarted = [at for row in members for at in range(len(row.ids))]
        batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}
        if recipe.packing == "apart":
            batch["position_ids"] = torch.tensor([restarted])
        else:
            batch["position_ids"] = torch.arange(len(ids))[None]
        if recipe.packing == "plain":
            batch["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
        if recipe.packing == "blocks":
            allowed = (document[:, None] == document[None]) & torch.ones(len(ids), len(ids)).tril().bool()
            batch["attention_mask"] = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
        batches.append(batch)
    return batches


def micro_batches(recipe: Recipe, rows: list[Row]) -> Iterator[Batch]:
    """Batches without end, epoch after epoch."""
    epoch = 0
    while True:
        order = list(range(len(rows))) * recipe.copies
        if recipe.shuffles:
            random.Random(1000 * recipe.seed + epoch).shuffle(order)
        chosen = [rows[i] for i in order]
        if recipe.packing:
            yield from pack(recipe, chosen)
        else:
            for begin in range(0, len(chosen), recipe.batch):
                yield collate(recipe, chosen[begin : begin + recipe.batch])
        epoch += 1


def build(recipe: Recipe) -> torch.nn.Module:
    """The model with its adapters, as it is before the first step; the same at every call."""
    torch.manual_seed(recipe.seed + recipe.rank * recipe.seed_of_rank)
    model = recipe.base.model()
    model.config.use_cache = False
    for prepare in recipe.prepare:
        prepare(model)
    model = get_peft_model(model, LoraConfig(**recipe.adapters))
    for touch in recipe.touch:
        touch(model)
    model.train()
    return model


def default_loss(model: torch.nn.Module, batch: Batch, _step: int) -> torch.Tensor:
    return model(**batch, use_cache=False).loss


def make_optimizer(recipe: Recipe, parameters: list) -> torch.optim.Optimizer:
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    return recipe.optimizer_class(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


def rate_at(recipe: Recipe, step: int) -> float:
    """Learning rate of the step, counted from 0."""
    total = recipe.schedule_steps or recipe.steps
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    if recipe.decay == "constant":
        return recipe.learning_rate
    done = min((step - recipe.warmup) / max(total - recipe.warmup, 1), 1.0)
    return recipe.learning_rate * (1 - done if recipe.decay == "linear" else (1 + math.cos(math.pi * done)) / 2)


@torch.no_grad()
def evaluate(recipe: Recipe, model: torch.nn.Module, rows: list[Row]) -> float:
    """Loss per label over the held-out rows."""
    was_training = model.training
    model.train(recipe.evaluates_in_training_mode)
    total, count = 0.0, 0
    for begin in range(0, len(rows), 8):
        batch = collate(recipe, rows[begin : begin + 8])
        labels = int((batch["labels"][:, 1:] != -100).sum())
        if labels:
            total += float(model(**batch, use_cache=False).loss) * labels
            count += labels
    model.train(was_training)
    return total / count if count else math.nan


def one_step(recipe: Recipe, model: Any, batches: list[Batch], step: int) -> float:
    """Forward and backward of one optimizer step; the loss as this training logs it."""
    counts = [max(int((batch["labels"][:, 1:] != -100).sum()), 1) for batch in batches]
    weights = {
        "tokens": [count / sum(counts) for count in counts],
        "means": [1 / len(batches)] * len(batches),
        "none": [1.0] * len(batches),
    }[recipe.normalise]
    logged = 0.0
    for batch, weight in zip(batches, weights, strict=True):
        loss = (recipe.loss_of or default_loss)(model, batch, step) * weight
        loss.backward()
        logged += float(loss.detach())
    return logged


def step_of_ranks(recipe: Recipe, model: Any, of_ranks: list[list[Batch]], step: int) -> float:
    """Forward and backward of one step of several ranks: the gradients of `recipe.rank`, and the mean of all losses."""
    counts = [sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches) for batches in of_ranks]
    size, total = len(of_ranks), max(sum(counts), 1)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    logged, gradients = 0.0, []
    for batches, count in zip(of_ranks, counts, strict=True):
        model.zero_grad(set_to_none=True)
        factor = {"all": count * size / total, "own": 1.0, "all and ranks": count / total}[recipe.divides_by]
        logged += one_step(recipe, model, batches, step) * factor / size
        gradients.append({name: p.grad * factor for name, p in parameters.items() if p.grad is not None})
    for place, (name, parameter) in enumerate(parameters.items()):
        found = [gradient[name] for gradient in gradients if name in gradient]
        alone = recipe.exchange == "none" or (recipe.exchange == "half" and place >= len(parameters) / 2)
        if len(found) == size:
            whole = torch.stack(found).sum(0)
            parameter.grad = found[recipe.rank] if alone else whole if recipe.exchange == "sum" else whole / size
    return logged


def train(recipe: Recipe) -> Outcome:
    """Runs the training to its end or to its crash."""
    torch.manual_seed(recipe.seed)
    rows = render(recipe, recipe.chats, recipe.mask)
    outcome = Outcome(rows, render(recipe, recipe.held_out, recipe.held_out_mask or recipe.mask))
    source = micro_batches(recipe, rows) if rows else iter(())
    outcome.batches = [batch for batch, _ in zip(source, range(12), strict=False)]
    outcome.errors += recipe.warnings
    if recipe.is_static or not rows:
        return outcome
    try:
        _run(recipe, outcome)
        for rank in range(1, recipe.ranks if recipe.gathers else 1):
            outcome.of_ranks[rank] = Outcome(rows, [])
            _run(replace(recipe, rank=rank), outcome.of_ranks[rank])
    except (RuntimeError, IndexError, ValueError) as error:  # what a user would see
        outcome.errors.append("".join(traceback.format_exception(error)))
    return outcome


def _run(recipe: Recipe, outcome: Outcome) -> None:
    model = build(recipe)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(recipe, parameters)
    source = micro_batches(recipe, outcome.rows)
    last = min(recipe.steps, recipe.stop_after or recipe.steps)
    if recipe.saves_at_start:
        _save(recipe, outcome, model)
    begin_of_schedule, shown = 0, math.nan
    for step in range(last):
        if recipe.seam and step == recipe.seam[0]:
            lost = recipe.seam[1]
            optimizer = make_optimizer(recipe, parameters) if "optimizer" in lost else optimizer
            begin_of_schedule = step if "schedule" in lost else begin_of_schedule
            source = micro_batches(recipe, outcome.rows) if "order" in lost else source
            if recipe.ranks_after is not None:  # the position is counted in steps of the new size
                recipe = replace(recipe, ranks=recipe.ranks_after)
                source = micro_batches(recipe, outcome.rows)
                _take(source, step * recipe.accumulation * recipe.ranks)
        rate = rate_at(recipe, step - begin_of_schedule)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with recipe.crash(step) if recipe.crash else contextlib.nullcontext():
            loss = _step(recipe, model, _take(source, recipe.accumulation * recipe.ranks), step)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, recipe.clip)) if parameters else 0.0
            if math.isfinite(norm) or not recipe.hides_nan:
                optimizer.step()
            optimizer.zero_grad()
        shown = loss if math.isfinite(loss) or not recipe.hides_nan else shown
        outcome.log.append(
            {
                "step": step + 1,
                "loss": shown,
                "learning_rate": rate,
                "grad_norm": norm,
                "epoch": (step + 1) / recipe.epoch_steps,
            }
        )
        if recipe.gathers:
            outcome.log[-1]["adapter_norm"] = float(torch.stack([p.detach().norm() for p in parameters]).norm())
        if outcome.held_out and recipe.evaluates and (step + 1) % max(recipe.steps // recipe.evaluates, 1) == 0:
            outcome.evaluations.append((step + 1, evaluate(recipe, model, outcome.held_out)))
    outcome.finished = last == recipe.steps
    if not recipe.saves_at_start:
        _save(recipe, outcome, model)
    if recipe.merged is not None:
        outcome.merged = recipe.merged(model)


def _step(recipe: Recipe, model: Any, batches: list[Batch], step: int) -> float:
    if recipe.ranks == 1:
        return one_step(recipe, model, batches, step)
    return step_of_ranks(recipe, model, [batches[rank :: recipe.ranks] for rank in range(recipe.ranks)], step)


def _take(source: Iterator[Batch], count: int) -> list[Batch]:
    return [next(source) for _ in range(count)]


def _save(recipe: Recipe, outcome: Outcome, model: torch.nn.Module) -> None:
    state = {name: tensor.detach().clone() for name, tensor in get_peft_model_state_dict(model).items()}
    outcome.adapter = recipe.saves(state) if recipe.saves else state
