"""Collect the inputs of a plan: the card, the model's shape and the lengths of the rows; then make the plan.

`planner.py` computes. This module gets what it needs: the model's shape (once for each base precision), the card of
this machine or a named one, and the lengths of the rows if the data is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any

import numpy as np

from solotune.config.run_config import RunConfig
from solotune.config.settings import BatchSettings, EvaluationSettings
from solotune.dataset import Prepared
from solotune.dataset.collate import num_labels
from solotune.dataset.example import lengths_of
from solotune.dataset.sampler import BatchSampler, deal, pack_sequences
from solotune.hardware import link, several_gpus
from solotune.hardware.machine import Machine
from solotune.hub.model_files import ModelFiles
from solotune.model.sharded_blocks import require_ranks
from solotune.planning import planner
from solotune.planning.gpus import Card, card_of, cards_named, cpu_card
from solotune.planning.layer_profile import ModelShape, Workload
from solotune.planning.model_shape import cpu_gflops, model_shape
from solotune.planning.plan import Plan
from solotune.planning.planner import full_rows

MAX_COUNTED_MICRO_BATCHES = 20_000
MAX_READ_ROWS = 256


def plan_for(
    config: RunConfig,
    machine: Machine,
    prepared: Prepared | None,
    gpu: str | None = None,
    model_files: ModelFiles | None = None,
    host_memory: int | None = None,
    local_ranks: int | None = None,
) -> Plan:
    """The plan of a config that is resolved for the machine it would run on.

    Args:
        prepared: its rows; None: not known, full rows are assumed.
        machine: with the memory that one rank may use (`Machine.shared_by`).
        gpu: a card of the table, instead of this machine's.
        model_files: the files of the config's model; None: they are resolved here.
        host_memory: free bytes of the host; None: this machine's, or not known for a card of the table.
        local_ranks: the ranks of the config that are on one machine; None: all.

    Raises:
        InputError: no such card, a budget that the card does not have, or see `model_shape` and `require_ranks`.
    """
    card, free = card_here(machine, config.use_cpu) if gpu is None else (cards_named(gpu).card, None)
    local = local_ranks or config.ranks
    card = card.beside(local - 1)
    require_ranks(config, [range(first, first + local) for first in range(0, config.ranks, local)])
    shapes = shapes_of(model_files)
    first = planner.precisions(config.memory, card)[0]
    positions = shapes(config.replaced("plan", base_precision=first)).max_positions

    def work(config: RunConfig) -> Workload:
        if prepared is None:
            return replace(_assumed(config, positions), local_ranks=local)
        return replace(work_of(config.batches, config.evaluation, prepared), local_ranks=local)

    notes = []
    if host_memory is not None:
        host_memory //= local
    elif gpu is None:
        if machine.ram_limited_by:
            notes.append(machine.ram.in_words())
        if not card.is_cpu:
            host_memory = machine.ram_free_bytes
    plan = planner.make_plan(config, shapes, card, work(config), free, host_free_bytes=host_memory, workloads=work)
    return replace(plan, notes=[*notes, *plan.notes])


def card_here(machine: Machine, use_cpu: bool) -> tuple[Card, int]:
    """This machine's card (or its CPU), and its free bytes."""
    if machine.has_cuda and not use_cpu:
        assert machine.gpu and machine.gpu_bytes and machine.compute_capability
        card = card_of(machine.gpu, machine.gpu_bytes, machine.compute_capability)
        with suppress(RuntimeError):  # no room for the copy: the table's figure stands
            card = replace(card, link_bytes=link.host_to_device_bytes_per_second(), link_is_measured=True)
        if machine.num_gpus > 1:
            reach = not several_gpus.pairs_without_peer_access(machine.num_gpus)
            card = replace(card, has_peer_access=reach, nvlink_bytes=card.nvlink_bytes if reach else 0.0)
        return card, machine.gpu_free_bytes or machine.gpu_bytes
    return cpu_card(machine.ram_bytes, cpu_gflops()), machine.ram_free_bytes


def for_card(name: str, machine: Machine) -> Machine:
    """This machine as if the card or cards of `--gpu` were in it, to resolve a config for them.

    Raises:
        InputError: no such card in the table.
    """
    card, count = cards_named(name)
    versions = {"triton": "there", **machine.versions}
    facts = {"compute_capability": card.compute_capability, "gpu_bytes": card.memory_bytes, "versions": versions}
    return replace(machine, gpu=card.name, num_gpus=count, gpu_free_bytes=card.memory_bytes, **facts)


def shapes_of(model_files: ModelFiles | None = None) -> Callable[[RunConfig], ModelShape]:
    """`model_shape` with a cache: configs of a model that do not differ in what changes its shape share one result."""

    @cache
    def of(key: str) -> ModelShape:
        return model_shape(configs[key], model_files)

    configs: dict[str, RunConfig] = {}

    def shape(config: RunConfig) -> ModelShape:
        kind = "fp8" if config.multiplies_in_fp8 else "dense"
        adapter = f"{config.lora_r} {config.lora_target_modules} {config.lora_dropout}"
        key = f"{config.model_name_or_path} {kind} {config.torch_compile} {config.bf16} {adapter}"
        configs[key] = config
        return of(key)

    return shape


def _assumed(config: RunConfig, max_positions: int | None) -> Workload:
    """The work where the data is not known: full rows, in evaluations and as prompts too."""
    work, evaluation = full_rows(config.batches, max_positions), config.evaluation
    if not config.validation_size and config.eval_dataset is None:
        return work
    together = min(evaluation.batch_size, evaluation.num_answers)
    answers = (together, work.tokens, evaluation.max_new_tokens)
    return replace(work, eval_batch=(evaluation.batch_size, work.tokens), answers=answers)


def work_of(batches: BatchSettings, evaluation: EvaluationSettings, prepared: Prepared) -> Workload:
    """The work of a step, counted on the micro-batches that training will draw."""
    lengths = np.asarray(lengths_of(prepared.train))
    packs = pack_sequences(batches, prepared.train)
    sizes = np.array([lengths[rows].sum() for rows in packs]) if batches.packing else lengths
    schedule = BatchSampler.of(batches, len(sizes))
    longest, real = [], 0.0
    drawn = (micro for step in schedule.steps(0) for micro in _computed(step, sizes, batches))
    for length, tokens_in_it in islice(drawn, MAX_COUNTED_MICRO_BATCHES):
        longest.append(length)
        real += tokens_in_it
    rows = min(batches.batch_size, len(sizes))
    if batches.has_one_shape:  # every pass is padded to one shape, see `collate.PaddedShape`
        rows, longest = batches.batch_size, [batches.max_length] * len(longest)
    is_whole = schedule.total_steps * schedule.accumulation <= MAX_COUNTED_MICRO_BATCHES and batches.ranks == 1
    tokens: dict[str, Any] = prepared.report.to_json()["tokens"]
    held_out = sorted(lengths_of(prepared.validation))
    every = evaluation.every(schedule.steps_per_epoch)
    answer = min(evaluation.max_new_tokens, tokens["supervised"] / max(1, len(lengths) + len(held_out)))
    labels, prompt = _longest_held_out(prepared)
    return Workload(
        rows=rows,
        tokens=max(longest) if is_whole else max(longest[0] if batches.packing else 0, int(sizes.max())),
        mean_tokens=float(np.mean(longest)),
        real_share=real / (sum(longest) * rows),
        supervised_share=tokens["supervised"] / max(1, tokens["total"]),
        accumulation=batches.accumulation,
        steps=schedule.total_steps,
        eval_tokens=sum(held_out),
        num_evals=len(
            {*range(every or schedule.total_steps, schedule.total_steps + 1, every or 1)} | {schedule.total_steps}
        ),
        eval_batch=(min(evaluation.batch_size, len(held_out)), max(held_out, default=0)),
        eval_labels=labels,
        answers=(min(evaluation.batch_size, evaluation.num_answers, len(held_out)), prompt, evaluation.max_new_tokens),
        generated_tokens=round(min(evaluation.num_answers, len(held_out)) * (evaluation.max_new_tokens + answer)),
        has_one_shape=batches.packing and batches.takes_graphs,
        is_measured=True,
        ranks=batches.ranks,
        local_ranks=batches.ranks,
    )


def _longest_held_out(prepared: Prepared) -> tuple[int, int]:
    """The most labels of a held-out row, and the tokens of the longest prompt; of the longest rows, as far as read."""
    order = np.argsort(-np.asarray(lengths_of(prepared.validation)), kind="stable")[:MAX_READ_ROWS]
    rows = [prepared.validation[int(row)] for row in order]
    prompts = [len(row.prompt_ids) or len(row.input_ids) // 2 for row in rows]
    return max(map(num_labels, rows), default=0), max(prompts, default=0)


def _computed(step: Sequence[Sequence[int]], sizes: np.ndarray, batches: BatchSettings) -> Iterator[tuple[int, float]]:
    """The longest row and the real tokens of each micro-batch of a step; of several ranks the slowest one's.

    Its tokens are then the mean over all ranks: the others wait for it.
    """
    if batches.ranks == 1:
        yield from ((int(sizes[rows].max()), int(sizes[rows].sum())) for rows in map(list, step))
        return
    rows = [row for micro_batch in step for row in micro_batch]
    dealt = deal(rows, sizes[rows].tolist(), batches.batch_size, batches.ranks)
    longest = [[int(sizes[micro.rows].max()) for micro in own] for own in dealt]
    slowest = max(longest, key=sum)
    yield from ((length, sizes[rows].sum() / batches.ranks / len(slowest)) for length in slowest)
