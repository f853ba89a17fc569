"""What a diagnosis is given of a training: what its owner would have, and nothing of what was done to it."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cache
from typing import Any

import numpy as np
import torch

from bench.diagnose.loop import (
    Outcome,
    build,
    default_loss,
    evaluate,
    make_optimizer,
    one_step,
    step_of_ranks,
)
from bench.diagnose.recipe import Recipe, Row
from bench.diagnose.worlds import Chat
from solotune.config.run_config import RunConfig
from solotune.dataset.data_report import DataReport
from solotune.dataset.example import Example
from solotune.diagnosis.facts.row_facts import RowFacts
from solotune.diagnosis.rules import judge
from solotune.diagnosis.run_facts import LiveModel, RankCheckpoint, Ranks, RunFacts, Saved, Settings, Trace
from solotune.errors import SolotuneError

NOT_HERE = "the base model is not on this machine"
"""Of runs that are told to be an 8B model's: settings, config, curve and errors are all there is."""


def run_facts_of(recipe: Recipe, outcome: Outcome) -> RunFacts:
    """The training as its owner could hand it over, under a name that says nothing."""
    train = _examples(recipe.chats, outcome.rows, recipe)
    validation = _examples(recipe.held_out, outcome.held_out, recipe)
    name = hashlib.sha256(repr((recipe.base.kind.name, recipe.seed, recipe.settings)).encode()).hexdigest()[:10]
    base_config = recipe.base.model().config.to_dict()
    generation = recipe.base.model().generation_config
    return RunFacts(
        name=f"run-{name}",
        settings=Settings(values={**recipe.settings, **_counted(recipe, train)}, asked=dict(recipe.asked)),
        tokenizer=recipe.tokenizer if recipe.has_live else None,
        model_config={**base_config, **recipe.model_config},
        generation_config={**generation.to_diff_dict(), **recipe.generation_config},
        train=train if recipe.has_live else (),
        validation=validation if recipe.has_live else (),
        conversations=recipe.chats,
        findings=(_findings(recipe, train, validation) or None) if recipe.has_live else None,
        trace=None if recipe.is_static else _trace(recipe, outcome),
        saved=_saved(recipe, outcome),
        ranks=_ranks(recipe, outcome),
        live=_live(recipe, outcome) if recipe.has_live and outcome.batches else None,
        batches=outcome.batches if recipe.has_live else (),
        environment=recipe.environment,
        missing={} if recipe.has_live else dict.fromkeys(("tokenizer", "train", "live"), NOT_HERE),
    )


def _counted(recipe: Recipe, train: list[Example]) -> dict[str, int]:
    """Rows of the file and of the trainer's data set, where some were left out."""
    return {"rows_in": len(recipe.chats), "rows_out": len(train)} if 0 < len(train) < len(recipe.chats) else {}


def _examples(chats: Sequence[Chat], rows: Sequence[Row], recipe: Recipe) -> list[Example]:
    chats = chats if len(chats) == len(rows) else [[] for _ in rows]  # rows were left out on the way
    return [
        Example(np.array(row.ids, np.int32), np.array(row.learned, bool), f"chats.jsonl:{number}", list(chat))
        for number, (row, chat) in enumerate(zip(rows, chats, strict=True), start=1)
    ]


def _findings(recipe: Recipe, train: list[Example], validation: list[Example]) -> list:
    """Findings of the rules on rows, if the settings make a solotune config."""
    known = {name: value for name, value in recipe.settings.items() if name in RunConfig.model_fields}
    if not train:
        return []
    report = DataReport(format="messages", rendered_on=date(2026, 1, 1).isoformat())
    report.num_read = len(recipe.chats) + len(recipe.held_out)
    report.num_train, report.num_validation = len(train), len(validation)
    config = None
    with contextlib.suppress(ValueError):  # a key of another tool
        config = RunConfig(**known)
    if config is None:
        return []
    try:
        return judge(RowFacts.of_config(config, recipe.tokenizer, train, validation, report))
    except SolotuneError:
        return []


def _trace(recipe: Recipe, outcome: Outcome) -> Trace:
    def column(key: str) -> np.ndarray:
        return np.array([entry[key] for entry in outcome.log], float)

    return Trace(
        step_S=column("step").astype(np.int64),
        loss_S=column("loss"),
        learning_rate_S=column("learning_rate"),
        grad_norm_S=column("grad_norm"),
        epoch_S=column("epoch"),
        eval_step_E=np.array([step for step, _ in outcome.evaluations], np.int64),
        eval_loss_E=np.array([loss for _, loss in outcome.evaluations], float),
        total_steps=recipe.steps,
        is_finished=outcome.finished,
        errors=tuple(outcome.errors),
        seams=(recipe.seam[0],) if recipe.seam else (),
    )


def _saved(recipe: Recipe, outcome: Outcome) -> Saved | None:
    if outcome.adapter is None or not recipe.has_live:
        return None
    told = {key: value for key, value in recipe.adapters.items() if key != "task_type"}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": recipe.settings.get("model_name_or_path"),
        **told,
    }
    lost = recipe.seam[1] if recipe.seam else frozenset()
    merged = outcome.merged
    return Saved(
        adapter=outcome.adapter,
        adapter_config=config,
        optimizer_present="optimizer" not in lost,
        scheduler_present="schedule" not in lost,
        merged=None if merged is None else lambda: merged,
    )


def _ranks(recipe: Recipe, outcome: Outcome) -> Ranks | None:
    """Adapters and logs of all ranks where they were gathered, and the checkpoints of a run that was resumed."""
    checkpoints, adapters = [], {}
    if recipe.ranks_after is not None and recipe.seam is not None:
        for step, ranks in ((recipe.seam[0], recipe.ranks), (len(outcome.log), recipe.ranks_after)):
            rows = recipe.batch * recipe.accumulation * ranks
            checkpoints.append(RankCheckpoint(step, ranks, rows, step * rows / len(recipe.chats)))
    outcomes = {0: outcome, **outcome.of_ranks} if outcome.of_ranks else {}
    if recipe.gathers:
        adapters = {rank: one.adapter for rank, one in outcomes.items() if one.adapter is not None}
    found = Ranks(adapters, {rank: one.log for rank, one in outcomes.items()}, checkpoints)
    return found if found.world_size > 1 else None


def _live(recipe: Recipe, outcome: Outcome) -> Callable[[], LiveModel]:
    def _exchanged(model: Any, of_ranks: Sequence[Sequence[Mapping[str, torch.Tensor]]]) -> float:
        return step_of_ranks(recipe, model, [[dict(batch) for batch in batches] for batches in of_ranks], 0)

    @cache
    def load() -> LiveModel:
        model = build(recipe)
        loss_of = recipe.loss_of or default_loss
        return LiveModel(
            model=model,
            batches=outcome.batches,
            make_optimizer=lambda parameters: make_optimizer(recipe, list(parameters)),
            loss_of=lambda model, batch: loss_of(model, dict(batch), 0),
            evaluate=(lambda model: evaluate(recipe, model, outcome.held_out)) if outcome.held_out else None,
            generate=lambda text: _generate(recipe, model, text),
            backward=lambda model, batches: one_step(recipe, model, [dict(batch) for batch in batches], 0),
            backward_of_ranks=_exchanged if recipe.ranks > 1 else None,
        )

    return load


@torch.no_grad()
def _generate(recipe: Recipe, model: Any, text: str, count: int = 48) -> str:
    """The deployment's answer, with special tokens, since some show a fault; greedy."""
    was_training = model.training
    model.eval()
    ids = recipe.tokenizer(recipe.deployed(text), add_special_tokens=False)["input_ids"]
    stop = recipe.generation_config.get("eos_token_id", recipe.tokenizer.eos_token_id)
    stops = set(stop) if isinstance(stop, list) else {stop}
    answer: list[int] = []
    while len(answer) < count and not (answer and answer[-1] in stops):
        logits = model(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0, -1]
        answer.append(int(logits.argmax()))
    model.train(was_training)
    return recipe.tokenizer.decode(answer, skip_special_tokens=False)


def plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, (list, tuple)) else value
