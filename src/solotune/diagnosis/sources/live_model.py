"""Load a run of solotune as a `LiveModel`: model, batches as dicts, loss, evaluation, generation.

    live = load_live_model(config, machine, tokenizer, prepared.train, prepared.validation)      fresh adapters
    live = load_live_model(config, ..., tensors=adapter_tensors(folder))                         adapters of a run

The batches are those of the first steps, made by `collate.py`. Only their padding gets the tokenizer's pad id (in
training it is any id), so that checks that read only ids can recognize it. Loss and accumulation use the code of
`training`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from solotune import dataset
from solotune.config.run_config import RunConfig
from solotune.config.settings import BatchSettings
from solotune.dataset import Example, sampler
from solotune.dataset.collate import Batch, collate_packs
from solotune.diagnosis.facts.texts import IGNORED
from solotune.diagnosis.run_facts import LiveModel
from solotune.evaluation import generation, scores
from solotune.hardware.machine import Machine
from solotune.hub.model_files import ModelFiles
from solotune.model import lora
from solotune.model.loading import TrainableModel
from solotune.training import forward_backward, trained_run
from solotune.training.optimizer import make_optimizer

NUM_BATCHES = 8
NUM_EVALUATED = 8  # held-out rows of the evaluation that a probe repeats
NEW_TOKENS = 48

Tensors = dict[str, torch.Tensor]


def batches_of(
    batches: BatchSettings, tokenizer: Any, rows: Sequence[Example], count: int = NUM_BATCHES
) -> list[Tensors]:
    """The first micro-batches of a run: input_ids, labels and, where rows are packed, position_ids; on the CPU."""
    packs, shape = sampler.pack_and_shape(batches, rows)
    schedule = sampler.BatchSampler.of(batches, len(packs))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    parts = (part for step in schedule.steps(0) for part in step)
    found = []
    for part in islice(parts, count):
        chosen = [[rows[row] for row in packs[i]] for i in part]
        found.append(_as_dict(collate_packs(chosen, torch.device("cpu"), shape), chosen, pad))
    return found


def _as_dict(batch: Batch, packs: Sequence[Sequence[Example]], pad: int | None) -> Tensors:
    ids_BT = batch.input_ids_BT
    labels_BT = torch.full_like(ids_BT, IGNORED)
    labels_BT.view(-1)[batch.label_positions_N] = ids_BT.view(-1)[batch.label_positions_N]
    if pad is not None:
        ids_BT = ids_BT.clone()
        for b in range(len(ids_BT)):
            used = sum(len(row.input_ids) for row in packs[b]) if b < len(packs) else 0
            ids_BT[b, used:] = pad
    found = {"input_ids": ids_BT, "labels": labels_BT}
    return found if batch.position_ids_BT is None else {**found, "position_ids": batch.position_ids_BT}


def _as_batch(batch: Mapping[str, Any]) -> Batch:
    """A `Batch` for `TrainableModel.token_losses`, without the rows of the labels."""
    ids_BT, labels_BT, position_ids_BT = batch["input_ids"], batch["labels"], batch.get("position_ids")
    is_label_BT = labels_BT != IGNORED
    is_label_BT[:, 0] = False
    label_positions_N = is_label_BT.flatten().nonzero()[:, 0]
    cu_seqlens_S = None
    if position_ids_BT is not None:
        ends = torch.tensor([ids_BT.numel()], device=ids_BT.device)
        cu_seqlens_S = torch.cat([(position_ids_BT.flatten() == 0).nonzero()[:, 0], ends]).to(torch.int32)
    return Batch(ids_BT, label_positions_N, position_ids_BT, cu_seqlens_S, None, ())


def load_live_model(
    config: RunConfig,
    machine: Machine,
    tokenizer: Any,
    train: Sequence[Example],
    validation: Sequence[Example],
    tensors: Mapping[str, torch.Tensor] | None = None,
    model_files: ModelFiles | None = None,
) -> LiveModel:
    """Load the model on this machine.

    Args:
        config: resolved for this machine (`trained_run.resolve_for_machine`).
        tensors: the adapter of a run; None: fresh adapters.
        model_files: of the config's model; None: they are looked for.

    Raises:
        InputError: as `load_model`; or the adapter does not fit.
    """
    model = trained_run.load_base(config, machine, model_files)
    if tensors is not None:
        lora.load_state_dict(model.lora_layers, tensors, "the run's adapter")
    held_out = [validation[i] for i in range(min(NUM_EVALUATED, len(validation)))]
    return LiveModel(
        model=model.module,
        batches=batches_of(config.batches, tokenizer, train),
        make_optimizer=lambda parameters: make_optimizer(config.optimizer, list(parameters)),
        loss_of=lambda module, batch: model.token_losses(_as_batch(batch))[0].mean(),
        evaluate=(lambda module: scores.score(model, held_out, len(held_out)).loss) if held_out else None,
        generate=lambda text: _answer(model, tokenizer, train, text),
        backward=lambda module, batches: _backward(model, batches),
    )


def _backward(model: TrainableModel, batches: Sequence[Mapping[str, Any]]) -> float:
    """Compute the gradients of one step as training does; return the loss."""
    made = [_as_batch(batch) for batch in batches]
    total = sum(len(batch.label_positions_N) for batch in made)
    for p in model.trainable:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    loss_and_correct_2 = torch.zeros(2, device=model.device)
    for batch in made:
        forward_backward.accumulate(model, batch, total, loss_and_correct_2)
    return float(loss_and_correct_2[0] / total)


def _answer(model: TrainableModel, tokenizer: Any, rows: Sequence[Example], text: str) -> str:
    """The answer of `solotune chat`, with the end of turn as text."""
    stops = generation.stop_ids(model, tokenizer, [row.last_loss_token for row in rows[:1]])
    prompt = dataset.render_prompt(tokenizer, [{"role": "user", "content": text}])
    ids = generation.generate(model, prompt, NEW_TOKENS, stops)
    ended = [tokenizer.eos_token_id] if len(ids) < NEW_TOKENS and tokenizer.eos_token_id is not None else []
    return tokenizer.decode(np.array([*ids, *ended], dtype=np.int64).tolist(), skip_special_tokens=False)
