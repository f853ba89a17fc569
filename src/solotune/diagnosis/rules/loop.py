"""S14, batch, memory and the mechanics of the loop: F71 to F74; several GPUs are in `ranks`."""

from __future__ import annotations

import math

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import (
    activation_bytes,
    has_error,
    is_ours,
    logits_bytes,
    micro_batch_tokens,
    out_of_memory,
    row_lengths,
    setting,
    shape_of,
    weight_bytes,
)
from solotune.diagnosis.facts.out_of_memory import phase_of
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

EARLY = 3
"""Steps within which a run without checkpointing reaches its largest activations."""
SURELY = 1.25
"""Bytes needed / bytes of the GPU from which an estimate of memory is beyond its own error."""
_GIB = 2**30


def checkpoints(run_facts: RunFacts) -> bool | None:
    """Whether gradient checkpointing is on; None if unknown."""
    found = run_facts.settings.get("gradient_checkpointing")
    return None if found is None or found == "auto" else bool(found)


def last_step(run_facts: RunFacts) -> int:
    """The last logged step."""
    return int(run_facts.trace.step_S.max()) if run_facts.trace is not None and len(run_facts.trace.step_S) else 0


@rule("F71", needs=("settings",), probes=("P11",))
def no_checkpointing(run_facts: RunFacts) -> Signal | None:
    """F71: activations do not fit without gradient checkpointing.

    Sees: gradient checkpointing off, and one of: an out-of-memory error in forward or backward of the first steps;
    activations that, by the model's shape and the longest row, need a quarter more than GPU memory and would fit with
    checkpointing (less is a remark), in a run that has not taken steps.
    Why: without it the inputs of every layer are kept until backward: sixteen times as much on an 8B model.
    Not: F72, which fails at the loss and grows with the vocabulary; F42, where a long batch fails late in the run; F70,
    which fails in the optimizer step; F51, where the base itself is too large.
    Fix: `gradient_checkpointing: true`. Where the base takes most of the card, solotune can keep it in host memory
    too (`base_offload: true`).
    Wrong when: another process used the memory. Control: a run that took steps fits, whatever the estimate says.
    Source: the article behind examples/walkthrough.yaml; trl turns it on by default.
    """
    if is_ours(run_facts) or checkpoints(run_facts) is not False:
        return None
    fix = "gradient_checkpointing: true"
    text, tokens, memory = out_of_memory(run_facts), micro_batch_tokens(run_facts), setting(run_facts, "memory_bytes")
    if text is not None and last_step(run_facts) <= EARLY and phase_of(text) != "loss":
        if phase_of(text) in ("step", "load"):
            return None
        says = f"out of memory at step {last_step(run_facts) + 1}, with gradient checkpointing off"
        return Signal("F71", "measured", says, 0.75, {"step": last_step(run_facts) + 1}, fix=fix)
    if tokens is None or memory is None or last_step(run_facts) > EARLY:
        return None
    needs = [activation_bytes(run_facts, tokens[0], on) for on in (False, True)]
    base = weight_bytes(run_facts)
    if None in needs or base is None or base + (needs[0] or 0) <= memory or base + (needs[1] or 0) > memory:
        return None
    if tail_decides(run_facts):
        return None
    says = f"activations need about {(needs[0] or 0) / _GIB:.1f} GiB and the base {base / _GIB:.1f}; the GPU has "
    says += f"{memory / _GIB:.1f}"
    kind, weight = ("measured", 0.75) if base + (needs[0] or 0) > SURELY * memory else ("remark", 0.3)
    return Signal("F71", kind, says, weight, {"activations": needs[0], "memory": memory}, fix=fix)


def tail_decides(run_facts: RunFacts) -> bool:
    """Whether only the longest rows do not fit into GPU memory, so that the lengths are the cause (F42)."""
    tokens, memory, base = micro_batch_tokens(run_facts), setting(run_facts, "memory_bytes"), weight_bytes(run_facts)
    if tokens is None or memory is None or base is None:
        return False
    longest, usual = (activation_bytes(run_facts, count, checkpoints(run_facts) is not False) or 0 for count in tokens)
    return base + usual <= memory < base + longest


@rule("F72", needs=("settings",), probes=("P11",))
def logits_memory(run_facts: RunFacts) -> Signal | None:
    """F72: the logits of the whole batch do not fit.

    Sees: an out-of-memory error at the loss; or, without a fused loss, logits (rows x tokens x vocabulary in float32,
    three times) that take more than a third of GPU memory and with the rest a quarter more than it has (less is a
    remark), in a run that has not taken steps.
    Why: one copy of the logits of 8k tokens takes 4.2 GB with a vocabulary of 128k.
    Not: F71, which fails in the layers and does not depend on the vocabulary.
    Fix: a fused or chunked loss (in TRL: `use_liger_kernel: true`), or a smaller `per_device_train_batch_size`.
    Wrong when: the trainer's own loss is fused (as in trl 1.16, except with custom losses, metrics or label smoothing).
    Source: Automodel#3907, ms-swift#6966.
    """
    if is_ours(run_facts):
        return None
    fix = "a smaller per_device_train_batch_size, or in TRL use_liger_kernel: true"
    text, tokens = out_of_memory(run_facts), micro_batch_tokens(run_facts)
    size = logits_bytes(run_facts, tokens[0]) if tokens else None
    if text is not None and phase_of(text) == "loss":
        says = "out of memory at the loss" + (f", whose logits need about {size / _GIB:.1f} GiB" if size else "")
        return Signal("F72", "measured", says, 0.8, {"bytes": size}, fix=fix)
    memory, get = setting(run_facts, "memory_bytes"), run_facts.settings.get
    is_fused = get("use_liger_kernel") or (get("tool") == "trl" and not get("label_smoothing_factor"))
    if size is None or memory is None or is_fused or size <= memory / 3 or last_step(run_facts) > EARLY:
        return None
    base, activations = weight_bytes(run_facts), activation_bytes(run_facts, tokens[0] if tokens else 0, True)
    if base is None or activations is None or base + activations + size <= memory:
        return None
    shape = shape_of(run_facts) or {}
    says = f"logits of {tokens[0] if tokens else 0:,.0f} tokens x {shape.get('vocabulary', 0):,} need about "
    says += f"{size / _GIB:.1f} GiB of the GPU's {memory / _GIB:.1f}"
    kind, weight = ("measured", 0.75) if base + activations + size > SURELY * memory else ("remark", 0.3)
    return Signal("F72", kind, says, weight, {"bytes": size, "memory": memory}, fix=fix)


@rule("F73", needs=("settings",))
def recompiles(run_facts: RunFacts) -> Signal | None:
    """F73: compiled layers are compiled again for every new length.

    Sees: the message of torch's compiler about its recompile limit. Compiling with padding to the longest row of each
    batch and rows of many lengths is a remark: torch makes a dynamic version after the second length.
    Why: minutes are spent on compiling instead of training; above the limit the layer runs uncompiled.
    Not: F50, which is slow for every length; rows that are packed or padded to one length.
    Fix: `packing: true` or `torch_compile: false`; in other tools also `pad_to_multiple_of: 256`.
    Wrong when: the layers are compiled with dynamic shapes.
    Source: pytorch#188150.
    """
    fix = "pad to a few lengths (packing: true or pad_to_multiple_of: 256), or torch_compile: false"
    if line := has_error(run_facts, r"recompile_limit|cache_size_limit|torch\._dynamo hit config"):
        return Signal("F73", "invariant", f"the log says: {line}", 0.95, {}, fix=fix)
    get, lengths = run_facts.settings.get, row_lengths(run_facts)
    is_padded = (
        get("packing") or (setting(run_facts, "pad_to_multiple_of") or 0) >= 64 or get("padding") == "max_length"
    )
    if is_ours(run_facts) or get("torch_compile") is not True or is_padded or get("torch_compile_dynamic"):
        return None
    distinct = len(np.unique(lengths))
    if distinct < 16:
        return None
    says = f"layers are compiled, but rows have {distinct:,} different lengths"
    return Signal("F73", "remark", says, 0.3, {"lengths": distinct}, fix=fix)


@rule("F74", needs=("settings", "trace"), probes=("P9",))
def accumulation_scaled(run_facts: RunFacts) -> Signal | None:
    """F74: with gradient accumulation, the loss is divided by the wrong number.

    Sees: logged training losses that are N times the held-out losses, for N micro-batches. Probe P9 decides by
    comparing the gradient of one batch of N rows with that of N batches of one row: it is N times as long if the sum is
    not divided, and has another direction if means of rows of unequal length are averaged.
    Why: the logged loss is N times too high, and so is the gradient, which Adam hides; short rows count more than long
    ones.
    Not: F67, whose losses depend on the learning rate and not on N; F46, whose training loss is the lower one.
    Fix: sum the loss over the whole batch, and divide it once by the number of loss tokens (in transformers:
    `num_items_in_batch`).
    Wrong when: training rows are really that much harder than held-out rows.
    Source: transformers#34191, #35438, #37197, #37766.
    """
    count, trace = setting(run_facts, "gradient_accumulation_steps"), run_facts.trace
    if is_ours(run_facts) or trace is None or not count or count < 3 or not len(trace.loss_S):
        return None
    ratios = []
    for step, held_out in zip(trace.eval_step_E, trace.eval_loss_E, strict=True):
        near = trace.loss_S[np.isfinite(trace.loss_S) & (np.abs(trace.step_S - step) <= max(2, 0.1 * step))]
        if len(near) and math.isfinite(held_out) and held_out > 0.1:
            ratios.append(float(near.mean() / held_out))
    shape, first = shape_of(run_facts), float(trace.loss_S[0])
    fix = "divide by num_items_in_batch: upgrade transformers, or accept this argument in your compute_loss"
    if ratios and abs(float(np.median(ratios)) / count - 1) < 0.2:
        says = f"training losses are {np.median(ratios):.1f} times the held-out losses, with {count:.0f} micro-batches"
        return Signal(
            "F74", "measured", says, 0.75, {"ratio": float(np.median(ratios)), "micro_batches": count}, fix=fix
        )
    if shape and first > 2 * math.log(shape["vocabulary"]) and first / count < math.log(shape["vocabulary"]):
        says = (
            f"the first logged loss {first:.1f} is above twice that of guessing, but {first / count:.2f} if divided by "
        )
        return Signal("F74", "measured", says + f"{count:.0f}", 0.5, {"loss": first, "micro_batches": count}, fix=fix)
    return None
