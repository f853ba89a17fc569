"""Choose the memory settings of a run: the fastest that fit the memory budget, before anything runs.

    budget = the memory that may be used       (`memory_budget`, or what the card has free)
    for each base precision, best first:       (one, unless `base_precision: auto`)
        of all (layers checkpointed, dequantized copy kept, offload) that fit: the fastest
    the first precision for which one fits is taken
    if none fits, frozen layers are streamed from the host: as few as needed, or the fastest number
    where they are streamed, a micro-batch may have more rows, at the same rows a step (`micro_batch`)

A key that the config sets is kept; only `auto` is chosen. If nothing fits, the plan suggests the smallest change to the
config that does, tried in the order of what it costs the user (`_changes`).

The plan is arithmetic on a `ModelShape`, so the same code plans for a card that is not in this machine. It measures
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple, get_args

from solotune.config.run_config import BUDGET_SIZE, Choice, RunConfig
from solotune.config.settings import MICRO_BATCH, BatchSettings, MemorySettings
from solotune.errors import InputError
from solotune.model.limits import offloaded_layers
from solotune.planning.constants import CONTEXT_BYTES
from solotune.planning.gpus import GIB, Card
from solotune.planning.layer_profile import MemoryStrategy, ModelShape, Precision, Workload
from solotune.planning.memory import footprint
from solotune.planning.micro_batch import Workloads, larger_micro_batch
from solotune.planning.plan import SHARE_OF_CARD, Budget, Candidate, Plan
from solotune.planning.throughput import seconds
from solotune.units import gib

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
    notes: list[str] | None = None,
    host_free_bytes: int | None = None,
    workloads: Workloads | None = None,
) -> Plan:
    """Plan `config`: the fastest memory strategy that fits, or how to make one fit.

    Args:
        config: resolved for the machine; its keys on `auto` are chosen.
        shapes: gives the model's shape for a config whose `base_precision` is not auto.
        card: where it would run.
        work: the rows and tokens of a step.
        free_bytes: free memory of this machine's card; None for a card that is not in this machine.
        notes: for the user, added to those of the plan.
        host_free_bytes: free memory of the host; None: not known.
        workloads: the work of a step for a config with another micro-batch; None: rows as long as those of `work`.

    Raises:
        InputError: the budget is more than the card has.
    """
    budget = budget_of(config.memory, card, free_bytes)._replace(host_bytes=host_free_bytes)

    def best(config: RunConfig, work: Workload) -> tuple[Candidate, RunConfig, bool]:
        return _best(config, shapes, card, work, budget)

    option, resolved, fits = best(config, work)
    notes, choices = list(notes or []), list[Choice]()
    if fits and (larger := larger_micro_batch(config, option, work, best, workloads)):
        if config.memory.micro_batch_is_open:
            choices = larger.choices(option)
            option, resolved, work = larger
        elif "plan" not in map(config.source_of, MICRO_BATCH):  # a resumed run keeps what the plan chose
            notes.append(larger.note(option))
    shape = shapes(resolved)
    notes += _notes(shape, work, option, budget)
    choices = [*_choices(config.memory, option, card, shape, fits), *choices]
    changes, changed = ([], None) if fits else _suggestion(config, shapes, card, work, budget)
    return Plan(card, budget, option, fits, choices, notes, changes, changed, resolved, shape.coverage)


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
            because = f"{gib(free_bytes)} GiB of {gib(total)} GiB are free, minus a margin"
            return Budget(room, available - (free_bytes - room), because)
        room = int(SHARE_OF_CARD * total)
        return Budget(room, room, f"{SHARE_OF_CARD:.0%} of the card's {gib(total)} GiB")
    size = int(wanted * total) if isinstance(wanted, float) else bytes_of(str(wanted))
    if size > total:
        raise InputError(
            f"{settings.source_of('memory_budget')}, memory_budget: more than the memory of the card",
            seen=f"memory_budget: {wanted}",
            allowed=f"at most {gib(total)} GiB, the memory of {card.name}",
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
    settings = config.memory
    for precision, offloads in _attempts(settings, card):
        resolved = config if precision == config.base_precision else config.replaced("plan", base_precision=precision)
        shape = shapes(resolved)
        sized = [
            (knobs, footprint(shape, knobs, work, card))
            for offload in offloads
            for knobs in _knobs(resolved.memory, shape, card, offload)
        ]
        if not sized:
            continue
        if fitting := [(knobs, used) for knobs, used in sized if budget.holds(used)]:
            options = [Candidate(knobs, used, seconds(shape, knobs, work, card)) for knobs, used in fitting]
            best = min(options, key=lambda option: (option.seconds.step, option.footprint.peak_bytes))
            return best, resolved.replaced("plan", **_chosen(settings, best.knobs, shape)), True
        knobs, used = min(sized, key=lambda one: budget.lack(one[1]))
        lack = budget.lack(used)
        if smallest is None or lack < smallest[0]:
            chosen = resolved.replaced("plan", **_chosen(settings, knobs, shape))
            smallest = lack, Candidate(knobs, used, seconds(shape, knobs, work, card)), chosen
    assert smallest is not None
    return *smallest[1:], False


class _Offload(NamedTuple):
    """What is in host memory."""

    activations: bool
    base: bool


def _attempts(settings: MemorySettings, card: Card) -> Iterator[tuple[Precision, list[_Offload]]]:
    """Base precisions, best first, each with what may go to the host: first as little as the config allows.

    The base goes there only in the last precision, the smallest: a copy takes time by its bytes.
    """
    is_open = not card.is_cpu
    activations = {settings.activation_offload} | ({True} if settings.offload_is_open and is_open else set())
    base = {settings.base_offload not in ("auto", False)}
    order = precisions(settings, card)
    for precision in order:
        if settings.base_offload == "auto" and is_open and precision == order[-1]:
            base = {False, True}
        least, *others = sorted(_Offload(*both) for both in product(activations, base))
        yield precision, [least]
        if others:
            yield precision, others


def _knobs(settings: MemorySettings, shape: ModelShape, card: Card, offload: _Offload) -> Iterator[MemoryStrategy]:
    depth = len(shape.layers)
    wanted = settings.gradient_checkpointing
    counts = (
        range(depth + 1) if wanted == "auto" else [depth * wanted if isinstance(wanted, bool) else min(wanted, depth)]
    )
    mirrors = {"auto": [False, True], "quantized": [False], "dequantized": [True]}[settings.base_residency]
    precision = "fp8" if settings.multiplies_in_fp8 else settings.base_precision  # the storage, see `model.load_model`
    assert precision != "auto" and precision in get_args(Precision)
    wanted_streams = settings.base_offload if offload.base else False
    if wanted_streams == "auto":
        streams = sorted({-(-depth * part // STREAMED_PARTS) for part in range(1, STREAMED_PARTS + 1)})
    else:
        streams = [len(offloaded_layers(wanted_streams, depth))]
    mirrors = mirrors if precision == "nf4" and not offload.base else [False]
    for streamed, count, mirrored in product(streams, counts, mirrors):
        if offload.activations and not count:
            continue
        device = "cpu" if card.is_cpu else "cuda"
        optim = "adamw_torch" if card.is_cpu else settings.optim
        yield MemoryStrategy(
            precision, settings.double_quant, mirrored, count, offload.activations, optim, device, streamed
        )


def _chosen(settings: MemorySettings, knobs: MemoryStrategy, shape: ModelShape) -> dict[str, object]:
    """The config keys that the plan sets."""
    values: dict[str, object] = {}
    if settings.gradient_checkpointing == "auto":
        values["gradient_checkpointing"] = _number_of_layers(knobs.num_checkpointed, len(shape.layers))
    if settings.base_residency == "auto" and knobs.base_precision == "nf4":
        values["base_residency"] = "dequantized" if knobs.has_dequantized_copy else "quantized"
    if settings.base_offload == "auto":
        values["base_offload"] = _number_of_layers(knobs.num_streamed, len(shape.layers))
    if settings.offload_is_open:
        values["activation_offload"] = knobs.is_offloaded
    return values


def _number_of_layers(count: int, depth: int) -> bool | int:
    return bool(count) if count in (0, depth) else count


def _choices(settings: MemorySettings, option: Candidate, card: Card, shape: ModelShape, fits: bool) -> list[Choice]:
    """What was chosen, and why."""
    knobs, depth = option.knobs, len(shape.layers)
    choices = []
    if settings.base_precision == "auto":
        why = {
            "fp8": f"it fits, {card.name} supports fp8 products, and the quality is better than with 4 bits",
            "bf16": f"16 bits fit and are better than 4 bits; {card.name} has no fp8",
            "fp32": "it fits, and there is no bfloat16 on this device",
            "nf4": "only 4 bits fit" if fits else "it needs the least memory",
        }[knobs.base_precision]
        choices.append(Choice("base_precision", knobs.base_precision, why))
    if settings.gradient_checkpointing == "auto":
        n = knobs.num_checkpointed
        why = "the activations of all layers fit"
        if n:
            why = f"the activations of {depth - n} of {depth} layers fit" if fits else "it needs the least memory"
        choices.append(Choice("gradient_checkpointing", _number_of_layers(n, depth), why))
    if settings.base_residency == "auto" and knobs.base_precision == "nf4":
        dequantized_copy = f"{gib(shape.num_frozen * shape.dtype_bytes)} GiB"
        why = f"unpacked weights would need {dequantized_copy}, which does not fit or is better used elsewhere"
        if knobs.has_dequantized_copy:
            why = f"unpacked weights need {dequantized_copy}, which fits and saves unpacking them in each pass"
        elif knobs.num_streamed:
            why = "layers that stream are unpacked when they are used"
        choices.append(Choice("base_residency", "dequantized" if knobs.has_dequantized_copy else "quantized", why))
    if knobs.num_streamed and settings.base_offload == "auto":
        host = gib(option.footprint.host.layers)
        why = f"the base does not fit; {knobs.num_streamed} of {depth} layers stream from {host} GiB of pinned memory"
        choices.append(Choice("base_offload", _number_of_layers(knobs.num_streamed, depth), why))
    if knobs.is_offloaded and settings.offload_is_open:
        host = f"{gib(option.footprint.host.activations)} GiB"
        why = "less on the card" if knobs.num_streamed else "nothing else fits"
        choices.append(Choice("activation_offload", True, f"{why}; it needs {host} of pinned host memory"))
    return choices


def _notes(shape: ModelShape, work: Workload, option: Candidate, budget: Budget) -> list[str]:
    notes = []
    if option.footprint.host_bytes and budget.host_bytes is None:
        words = f"it pins {option.footprint.host.in_words()} of host memory"
        notes.append(f"{words}; not compared with a host's memory (solotune plan --host-memory 64GiB does)")
    if any(layer.how == "estimated" for layer in shape.layers):
        notes.append(f"the memory of {shape.family} layers cannot be computed without data; it is estimated")
    if not work.is_measured:
        notes.append(
            f"the data is not known; {work.rows} rows of {work.tokens:,} tokens are assumed in each micro-batch"
        )
    if work.steps is None:
        notes.append("the number of steps and the total time are not known")
    return notes


def _suggestion(
    config: RunConfig, shapes: Shapes, card: Card, work: Workload, budget: Budget
) -> tuple[list[tuple[str, object]], Plan | None]:
    """The nearest config that fits: a single change if one is enough, else several together."""

    def plan_with(values: dict[str, object]) -> Plan | None:
        changed, other = config.replaced("change", **values), work
        if "per_device_train_batch_size" in values:
            rows, accumulation = changed.per_device_train_batch_size, changed.gradient_accumulation_steps
            other = replace(other, rows=rows, accumulation=accumulation)
        if "max_length" in values:
            tokens = changed.max_length
            other = replace(other, tokens=tokens, mean_tokens=min(work.mean_tokens, tokens))
        option, resolved, fits = _best(changed, shapes, card, other, budget)
        if not fits:
            return None
        return Plan(card, budget, option, True, [], [], [], None, resolved)

    singles = list(_changes(config.memory, work))
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


def _changes(settings: MemorySettings, work: Workload) -> Iterator[dict[str, object]]:
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
    if settings.base_offload not in (True, "auto") and settings.base_residency != "dequantized":
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
    )
