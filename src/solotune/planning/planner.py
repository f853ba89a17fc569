"""Choose the memory settings of a run: the fastest that fit the memory budget, before anything runs.

    budget = the memory that may be used       (`memory_budget`, or what the card has free)
    for each base precision, best first:       (one, unless `base_precision: auto`)
        of all (layers checkpointed, dequantized copy kept, offload) that fit: the fastest
    the first precision for which one fits is taken
    if none fits, frozen layers are streamed from the host, as few as needed or the fastest number; or, where several
    ranks share a machine, each card holds a part of every layer (sharding): whichever is the fastest that fits
    the fastest is looked for with one row in an evaluation pass, which then gets as many as fit (`eval_batch`)
    where layers are copied in each pass, a micro-batch may have more rows, at the same rows a step (`micro_batch`)

A key that the config sets is kept; only `auto` is chosen. If nothing fits, the plan suggests the smallest change to the
config that does, tried in the order of what it costs the user (`_changes`).

The plan is arithmetic on a `ModelShape`, so the same code plans for a card that is not in this machine. It measures
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import IntEnum
from itertools import product
from typing import NamedTuple, get_args

from solotune.config.run_config import BUDGET_SIZE, Choice, RunConfig
from solotune.config.settings import EVAL_ROWS, MICRO_BATCH, BatchSettings, MemorySettings
from solotune.errors import InputError
from solotune.model.limits import offloaded_layers
from solotune.planning.choices import choices, chosen_values, notes
from solotune.planning.constants import CONTEXT_BYTES
from solotune.planning.eval_batch import eval_changes, eval_choices, fewest_rows, with_fewest_rows, with_most_rows
from solotune.planning.gpus import GIB, Card
from solotune.planning.layer_profile import MemoryStrategy, ModelShape, Precision, Workload
from solotune.planning.memory import footprint
from solotune.planning.micro_batch import Workloads, larger_micro_batch
from solotune.planning.peak_memory import PeakMemory
from solotune.planning.plan import SHARE_OF_CARD, Budget, Candidate, Plan, Ranks
from solotune.planning.throughput import seconds
from solotune.units import format_bytes

FREE_MARGIN_BYTES = 256 << 20
MIN_LENGTH = 128
STREAMED_PARTS = 8
"""The plan tries to stream that many different numbers of layers."""

Shapes = Callable[[RunConfig], ModelShape]


def make_plan(
    config: RunConfig,
    shapes: Shapes,
    card: Card,
    work: Workload,
    free_bytes: int | None,
    host_free_bytes: int | None = None,
    workloads: Workloads | None = None,
) -> Plan:
    """Plan `config`: the fastest memory strategy that fits, or how to make one fit.

    Args:
        config: resolved for the machine; its keys on `auto` are chosen.
        shapes: gives the model's shape for a config whose `base_precision` is not auto.
        card: where it would run.
        work: the rows and tokens of a step, and the ranks that share it.
        free_bytes: free memory of this machine's card; None for a card that is not in this machine.
        host_free_bytes: free memory of the host for each rank; None: not known.
        workloads: the work of a step for a config with another micro-batch; None: rows as long as those of `work`.

    Raises:
        InputError: the budget is more than the card has.
    """
    budget = budget_of(config.memory, card, free_bytes)._replace(host_bytes=host_free_bytes)

    def best(config: RunConfig, work: Workload) -> tuple[Candidate, RunConfig, bool]:
        return _best(config, shapes, card, work, budget)

    option, resolved, fits = best(config, work)
    remarks, sizes = list[str](), list[Choice]()
    same_place = config.replaced("plan", base_sharding=True) if option.knobs.num_shards > 1 else config
    if fits and (larger := larger_micro_batch(same_place, option, work, best, workloads)):
        if config.memory.micro_batch_is_open:
            sizes = larger.choices(option)
            option, resolved, work = larger
        elif "plan" not in map(config.source_of, MICRO_BATCH):  # a resumed run keeps what the plan chose
            remarks.append(larger.note(option))
    shape = shapes(resolved)
    remarks += notes(shape, work, option, card, budget)
    chosen = [*choices(config, option, card, shape, fits), *sizes]
    chosen += eval_choices(config, resolved, option, shape, work, card, fits)
    changes, changed = ([], None) if fits else _suggestion(config, shapes, card, work, budget, option.footprint)
    ranks = Ranks.of(work)
    return Plan(card, budget, option, fits, chosen, remarks, changes, changed, resolved, shape.coverage, ranks=ranks)


def budget_of(settings: MemorySettings, card: Card, free_bytes: int | None) -> Budget:
    """`memory_budget` in bytes.

    Raises:
        InputError: it is more than the card has.
    """
    total, wanted = card.memory_bytes, settings.memory_budget
    available = total if free_bytes is None else free_bytes
    if free_bytes is not None and not card.is_cpu:
        available += CONTEXT_BYTES  # the context of this process is already counted as used
    if wanted == "auto":
        if free_bytes is not None:
            room = int(0.9 * free_bytes) if card.is_cpu else free_bytes - FREE_MARGIN_BYTES
            because = f"{format_bytes(free_bytes)} of {format_bytes(total)} are free, minus a margin"
            return Budget(room, available - (free_bytes - room), because)
        room = int(SHARE_OF_CARD * total)
        return Budget(room, room, f"{SHARE_OF_CARD:.0%} of the card's {format_bytes(total)}")
    size = int(wanted * total) if isinstance(wanted, float) else bytes_of(str(wanted))
    if size > total:
        raise InputError(
            f"{settings.source_of('memory_budget')}, memory_budget: more than the memory of the card",
            seen=f"memory_budget: {wanted}",
            allowed=f"at most {format_bytes(total)}, the memory of {card.name}",
            change="memory_budget: auto",
        )
    return Budget(size, available, f"memory_budget: {wanted}")


def bytes_of(text: str) -> int:
    """`24GiB`, `9.5 GiB`, `24GB` or `500 MiB` in bytes."""
    match = re.fullmatch(BUDGET_SIZE, text)
    assert match is not None, text  # run_config.py has checked it
    units = {"GiB": GIB, "GB": 10**9, "MiB": 1 << 20, "MB": 10**6}
    return int(float(match[1]) * units[match[2]])


def precisions(settings: MemorySettings, card: Card) -> list[Precision]:
    """The base precisions to try, best first.

    Ordered by held-out loss after training (`docs/decisions.md`). fp8 from the 16-bit weights is as good as a 16-bit
    base to 0.7 % and 1.4 times as fast, on cards with fp8 products. A 16-bit base is as fast as NF4 and better. NF4 is
    used only if nothing else fits.
    """
    if settings.base_precision != "auto":
        return [settings.base_precision]
    if card.is_cpu:
        return ["fp32", "nf4"]
    if not card.has_bf16:
        return ["fp32", "nf4"]
    if settings.matmul_precision == "fp8":
        return ["fp8"]
    return ["fp8", "nf4"] if card.has_fp8 and settings.matmul_precision == "auto" else ["bf16", "nf4"]


def _best(
    config: RunConfig, shapes: Shapes, card: Card, work: Workload, budget: Budget
) -> tuple[Candidate, RunConfig, bool]:
    """The fastest option that fits, else the one that lacks the least memory; its config; whether it fits."""
    smallest: tuple[tuple[bool, int], Candidate, RunConfig] | None = None
    settings, least = config.memory, with_fewest_rows(config.memory, work)
    for precision, offloads in _attempts(settings, card, work.local_ranks):
        resolved = config if precision == config.base_precision else config.replaced("plan", base_precision=precision)
        shape = shapes(resolved)
        sized = [
            (knobs, footprint(shape, knobs, least, card))
            for offload in offloads
            for knobs in _knobs(resolved.memory, shape, card, offload, work.local_ranks)
        ]
        if not sized:
            continue
        if fitting := [(knobs, used) for knobs, used in sized if budget.holds(used)]:
            options = [Candidate(knobs, used, seconds(shape, knobs, least, card)) for knobs, used in fitting]
            best, rows = with_most_rows(settings, _fastest(options), shape, work, card, budget)
            return best, resolved.replaced("plan", **chosen_values(config, best.knobs, len(shape.layers)), **rows), True
        knobs, used = min(sized, key=lambda one: budget.lack(one[1]))
        lack = budget.lack(used)
        if smallest is None or lack < smallest[0]:
            values = chosen_values(config, knobs, len(shape.layers)) | fewest_rows(settings, work)
            chosen = resolved.replaced("plan", **values)
            smallest = lack, Candidate(knobs, used, seconds(shape, knobs, least, card)), chosen
    assert smallest is not None
    return *smallest[1:], False


def _fastest(options: list[Candidate]) -> Candidate:
    """The fastest, with the fastest of those that copy the base from elsewhere than it does."""

    def first(options: list[Candidate]) -> Candidate:
        return min(options, key=lambda option: (option.seconds.step, option.footprint.peak_bytes))

    best = first(options)
    others = [one for one in options if one.knobs.copies_base and one.knobs.num_shards != best.knobs.num_shards]
    return replace(best, instead=first(others)) if best.knobs.copies_base and others else best


class _Place(IntEnum):
    """Where the frozen layers of the base are."""

    CARD = 0
    CARDS = 1  # sharded
    HOST = 2


class _Offload(NamedTuple):
    """What is not on the card."""

    activations: bool  # in host memory
    base: _Place


def _attempts(settings: MemorySettings, card: Card, local_ranks: int) -> Iterator[tuple[Precision, list[_Offload]]]:
    """Base precisions, best first, each with what may be elsewhere: first as little as the config allows.

    The base is elsewhere only in the last precision, the smallest: a copy takes time by its bytes.
    """
    is_open = not card.is_cpu
    activations = {settings.activation_offload} | ({True} if settings.offload_is_open and is_open else set())
    base = {_Place.CARDS if settings.base_sharding is True else _Place.CARD}
    if settings.base_offload not in ("auto", False):
        base = {_Place.HOST}
    order, may_move = precisions(settings, card), is_open and _may_move(settings)
    for precision in order:
        if may_move and precision == order[-1] and base == {_Place.CARD}:
            if settings.base_offload == "auto":
                base = base | {_Place.HOST}
            if settings.base_sharding == "auto" and local_ranks > 1 and card.has_peer_access:
                base = base | {_Place.CARDS}
        least, *others = sorted(_Offload(*both) for both in product(activations, base))
        yield precision, [least]
        if others:
            yield precision, others


def _may_move(settings: MemorySettings) -> bool:
    """Whether the base may be elsewhere; an unpacked copy of it is kept on the card."""
    return settings.base_residency != "dequantized"


def _knobs(
    settings: MemorySettings, shape: ModelShape, card: Card, offload: _Offload, local_ranks: int
) -> Iterator[MemoryStrategy]:
    depth = len(shape.layers)
    wanted = settings.gradient_checkpointing
    counts = (
        range(depth + 1) if wanted == "auto" else [depth * wanted if isinstance(wanted, bool) else min(wanted, depth)]
    )
    mirrors = {"auto": [False, True], "quantized": [False], "dequantized": [True]}[settings.base_residency]
    precision = "fp8" if settings.multiplies_in_fp8 else settings.base_precision  # the storage, see `model.load_model`
    assert precision != "auto" and precision in get_args(Precision)
    wanted_streams = settings.base_offload if offload.base == _Place.HOST else False
    shards = local_ranks if offload.base == _Place.CARDS else 1
    if wanted_streams == "auto":
        streams = sorted({-(-depth * part // STREAMED_PARTS) for part in range(1, STREAMED_PARTS + 1)})
    else:
        streams = [len(offloaded_layers(wanted_streams, depth))]
    mirrors = mirrors if precision == "nf4" and offload.base == _Place.CARD else [False]
    for streamed, count, mirrored in product(streams, counts, mirrors):
        if offload.activations and not count:
            continue
        device = "cpu" if card.is_cpu else "cuda"
        optim = "adamw_torch" if card.is_cpu else settings.optim
        yield MemoryStrategy(
            precision, settings.double_quant, mirrored, count, offload.activations, optim, device, streamed, shards
        )


def _suggestion(
    config: RunConfig, shapes: Shapes, card: Card, work: Workload, budget: Budget, used: PeakMemory
) -> tuple[list[tuple[str, object]], Plan | None]:
    """The nearest config that fits: a single change if one is enough, else several together.

    Args:
        used: of the option that lacks the least memory.
    """

    def plan_with(values: dict[str, object]) -> Plan | None:
        changed, other = config.replaced("change", **values), work
        if "per_device_train_batch_size" in values:
            rows, accumulation = changed.per_device_train_batch_size, changed.gradient_accumulation_steps
            other = replace(other, rows=rows, accumulation=accumulation)
        if "max_length" in values:
            tokens = changed.max_length
            other = replace(other, tokens=tokens, mean_tokens=min(work.mean_tokens, tokens)).with_eval_tokens(tokens)
        if EVAL_ROWS in values:
            other = other.with_eval_rows(changed.per_device_eval_batch_size)
        if "max_new_tokens" in values:
            other = replace(other, answers=(*other.answers[:2], changed.max_new_tokens))
        option, resolved, fits = _best(changed, shapes, card, other, budget)
        if not fits:
            return None
        return Plan(card, budget, option, True, [], [], [], None, resolved)

    singles = [*eval_changes(config.memory, work, used, budget), *_changes(config.memory, work, card)]
    for values in singles:
        if plan := plan_with(values):
            return list(values.items()), plan
    together: dict[str, object] = {}
    for values in _less_each(singles):
        together |= values
        if plan := plan_with(together):
            return list(together.items()), plan
    length = int(together.get("max_length", work.tokens))  # type: ignore[call-overload]
    while length >= 2 * MIN_LENGTH:
        length //= 2
        if plan := plan_with(together | {"max_length": length}):
            return list((together | {"max_length": length}).items()), plan
    return [], None


def _changes(settings: MemorySettings, work: Workload, card: Card) -> Iterator[dict[str, object]]:
    """Single changes, cheapest for the user first: speed, then precision, then the length of rows."""
    if settings.gradient_checkpointing not in (True, "auto"):
        yield {"gradient_checkpointing": "auto"}
    if settings.base_residency == "dequantized":
        yield {"base_residency": "auto"}
    rows = work.rows
    while rows > 1:
        rows = max(n for n in range(1, rows) if work.rows % n == 0)
        factor = work.rows // rows
        yield {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": work.accumulation * factor,
        }
    may_move = _may_move(settings)
    if settings.base_sharding is False and work.local_ranks > 1 and card.has_peer_access and may_move:
        yield {"base_sharding": "auto"}
    if settings.base_offload not in (True, "auto") and settings.base_sharding is not True and may_move:
        yield {"base_offload": "auto"}
    if settings.base_precision not in ("nf4", "auto"):
        yield {"base_precision": "nf4"}
    length = work.tokens
    while length >= 2 * MIN_LENGTH:
        length -= max(MIN_LENGTH, length // 8 // MIN_LENGTH * MIN_LENGTH)
        yield {"max_length": length}


def _less_each(singles: list[dict[str, object]]) -> list[dict[str, object]]:
    """The last (largest) change of each key, in order; `max_length` is left out."""
    last = {next(iter(values)): values for values in singles if "max_length" not in values}
    return list(last.values())


def full_rows(batches: BatchSettings, max_positions: int | None = None) -> Workload:
    """The work of a step when the data is not known: rows of the maximum length, every token supervised."""
    tokens = min(batches.max_length, max_positions or batches.max_length)
    return Workload(
        rows=batches.batch_size,
        tokens=tokens,
        mean_tokens=tokens,
        real_share=1.0,
        supervised_share=1.0,
        accumulation=batches.accumulation,
        steps=batches.max_steps if batches.max_steps > 0 else None,
        has_one_shape=batches.takes_graphs,
        ranks=batches.ranks,
        local_ranks=batches.ranks,
    )
