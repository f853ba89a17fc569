"""What a plan chose, in words: the config keys that it sets, each with its reason, and notes for the user."""

from __future__ import annotations

from solotune.config.run_config import Choice, RunConfig
from solotune.planning.gpus import Card
from solotune.planning.layer_profile import MemoryStrategy, ModelShape, Workload
from solotune.planning.plan import Budget, Candidate
from solotune.units import format_bytes, format_rate


def chosen_values(config: RunConfig, knobs: MemoryStrategy, depth: int) -> dict[str, object]:
    """The config keys that the plan sets.

    Args:
        depth: number of the model's layers.
    """
    settings = config.memory
    values: dict[str, object] = {}
    if settings.gradient_checkpointing == "auto":
        values["gradient_checkpointing"] = _number_of_layers(knobs.num_checkpointed, depth)
    if settings.base_residency == "auto" and knobs.base_precision == "nf4":
        values["base_residency"] = "dequantized" if knobs.has_dequantized_copy else "quantized"
    if config.base_offload == "auto":
        values["base_offload"] = _number_of_layers(knobs.num_streamed, depth)
    if settings.base_sharding == "auto" and config.ranks > 1:
        values["base_sharding"] = knobs.num_shards > 1
    if settings.offload_is_open:
        values["activation_offload"] = knobs.is_offloaded
    return values


def _number_of_layers(count: int, depth: int) -> bool | int:
    return bool(count) if count in (0, depth) else count


def choices(config: RunConfig, option: Candidate, card: Card, shape: ModelShape, fits: bool) -> list[Choice]:
    """What was chosen, and why."""
    settings, knobs, depth = config.memory, option.knobs, len(shape.layers)
    found = []
    if settings.base_precision == "auto":
        why = {
            "fp8": f"it fits, {card.name} supports fp8 products, and the quality is better than with 4 bits",
            "bf16": f"16 bits fit and are better than 4 bits; {card.name} has no fp8",
            "fp32": "it fits, and there is no bfloat16 on this device",
            "nf4": "only 4 bits fit" if fits else "it needs the least memory",
        }[knobs.base_precision]
        found.append(Choice("base_precision", knobs.base_precision, why))
    if settings.gradient_checkpointing == "auto":
        n = knobs.num_checkpointed
        why = "the activations of all layers fit"
        if n:
            why = f"the activations of {depth - n} of {depth} layers fit" if fits else "it needs the least memory"
        found.append(Choice("gradient_checkpointing", _number_of_layers(n, depth), why))
    if settings.base_residency == "auto" and knobs.base_precision == "nf4":
        dequantized_copy = format_bytes(shape.num_frozen * shape.dtype_bytes)
        why = f"unpacked weights would need {dequantized_copy}, which does not fit or is better used elsewhere"
        if knobs.has_dequantized_copy:
            why = f"unpacked weights need {dequantized_copy}, which fits and saves unpacking them in each pass"
        elif knobs.copies_base:
            why = f"layers that {'are sharded' if knobs.num_shards > 1 else 'stream'} are unpacked when they are used"
        found.append(Choice("base_residency", "dequantized" if knobs.has_dequantized_copy else "quantized", why))
    found += _base_choices(config, option, card, depth)
    if knobs.is_offloaded and settings.offload_is_open:
        host = format_bytes(option.footprint.host.activations)
        why = "less on the card" if knobs.copies_base else "nothing else fits"
        found.append(Choice("activation_offload", True, f"{why}; it needs {host} of pinned host memory"))
    return found


def _base_choices(config: RunConfig, option: Candidate, card: Card, depth: int) -> list[Choice]:
    """Where the base is if it does not fit on the card, and the speed that the other place would give."""
    settings, knobs, used = config.memory, option.knobs, option.footprint
    instead = ""
    if other := option.instead:
        speeds = [format_rate(one.seconds.tokens_per_second) for one in (option, other)]
        place = "sharded" if other.knobs.num_shards > 1 else "streamed from host memory"
        instead = f"; {speeds[0]}, {place} {speeds[1]}"
    if knobs.num_streamed and settings.base_offload == "auto":
        host = format_bytes(used.host.layers)
        why = f"the base does not fit; {knobs.num_streamed} of {depth} layers stream from {host} of pinned memory"
        return [Choice("base_offload", _number_of_layers(knobs.num_streamed, depth), why + instead)]
    if knobs.num_shards > 1 and settings.base_sharding == "auto":
        part = format_bytes(used.peers_bytes / (knobs.num_shards - 1))
        why = f"the base does not fit; each of {knobs.num_shards} GPUs holds {part} of its layers, and copies the "
        why += f"rest from the others over {card.peer_link}"
        return [Choice("base_sharding", True, why + instead)]
    return []


def notes(shape: ModelShape, work: Workload, option: Candidate, card: Card, budget: Budget) -> list[str]:
    """What the plan does not know, and what several ranks share."""
    found = []
    used, ranks = option.footprint, work.local_ranks
    if used.host_bytes and ranks > 1:
        pinned = format_bytes(ranks * used.host_bytes)
        found.append(f"each rank pins its own host memory: {pinned} for the {ranks} GPUs of a machine")
    if used.host_bytes and budget.host_bytes is None:
        words = f"it pins {used.host.in_words()} of host memory{' for each GPU' if ranks > 1 else ''}"
        found.append(f"{words}; not compared with a host's memory (solotune plan --host-memory 64GiB does)")
    if work.ranks > ranks:
        found.append(
            f"{work.ranks} ranks, {ranks} of them on a machine: the time of the network between machines is not known"
        )
    if option.knobs.num_shards > 1 and not card.has_peer_access:
        found.append("base_sharding needs GPUs that read each other's memory; solotune doctor says whether they do")
    if any(layer.how == "estimated" for layer in shape.layers):
        found.append(f"the memory of {shape.family} layers cannot be computed without data; it is estimated")
    if not work.is_measured:
        found.append(
            f"the data is not known; {work.rows} rows of {work.tokens:,} tokens are assumed in each micro-batch"
        )
    if work.steps is None:
        found.append("the number of steps and the total time are not known")
    return found
