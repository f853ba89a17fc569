"""S12, the LoRA adapter: F56 to F63."""

from __future__ import annotations

import re

import numpy as np

from solotune.diagnosis.evidence import Kind, Signal
from solotune.diagnosis.facts.derived import (
    HEADS,
    has_error,
    initialisation,
    is_ours,
    is_zero,
    linears,
    lora_layers,
    scale,
    setting,
    targets,
)
from solotune.diagnosis.facts.step_size import HALF, diverges, odd_one, one_step, too_small
from solotune.diagnosis.facts.target_names import EMBEDDINGS, count_named, is_embedding, matched_alternatives
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

WEAK, STRONG = 0.25, 32.0
"""Limits of alpha / r; 1 to 4 is usual, and 32 still trained well with a suitable learning rate."""
_NOT_ALWAYS = re.compile(r"expert|router|" + "|".join(HEADS))
"""Modules that may get no gradient in a healthy run: an expert that no token was sent to; heads are F63."""


@rule("F56", needs=("settings",))
def targets_missed(run_facts: RunFacts) -> Signal | None:
    """F56: some names in lora_target_modules match few modules of this model, or none.

    Sees: names, or alternatives of a regular expression, without a module; names that have an adapter in only some of
    the layers. The names of the config are compared with the modules in the adapter file and with the modules that
    config.json builds.
    Why: PEFT raises an error if no name matches. If some names match, it ignores the others silently, so fewer
    parameters are trained.
    Not: F62, where every name matched; models with several kinds of layers, where a name may exist in some layers only
    (the modules of the model itself are counted).
    Fix: `lora_target_modules: all-linear`.
    Wrong when: one list of names is used for several architectures on purpose.
    Source: dllm-reasoning/d1#6 ("silently ignores the rest"); peft 0.21 accepted [q, v, c_attn, fc9] without a message
    (measured).
    """
    names = targets(run_facts)
    modules = linears(run_facts)
    if isinstance(names, str) and names != "all-linear":
        return _alternatives_missed(names, list(modules or ()), list(lora_layers(run_facts)))
    if not isinstance(names, list):
        return None
    found, known = list(lora_layers(run_facts)), list(modules or ())
    if not found and not known:
        return None
    names = [name for name in names if found or not is_embedding(name)]  # PEFT adapts them, and they are no linears
    missed = [name for name in names if not count_named(found or known, name)]
    numbers = {"asked": names, "missed": missed, "modules": len(found)}
    fix = "lora_target_modules: all-linear"
    if missed and (found or len(missed) < len(names) or not is_ours(run_facts)):
        says = f"{', '.join(missed)} in lora_target_modules match{'es' if len(missed) == 1 else ''} no adapted module"
        return Signal("F56", "invariant", says, 0.9, numbers, fix=fix, affected=len(missed) / len(names))
    few = {name: (count_named(found, name), count_named(known, name)) for name in names} if found and known else {}
    few = {name: counts for name, counts in few.items() if counts[0] < counts[1]}
    chosen = run_facts.saved.adapter_config if run_facts.saved else {}
    if not few or chosen.get("layers_to_transform") is not None or chosen.get("exclude_modules"):
        return None
    name, (has, could) = next(iter(few.items()))
    says = f"only {has} of {could} modules named {name} have an adapter"
    return Signal("F56", "measured", says, 0.75, numbers, fix=fix, affected=1 - has / could)


def _alternatives_missed(pattern: str, modules: list[str], found: list[str]) -> Signal | None:
    """F56 of a regular expression: alternatives that match no module."""
    parts, missed = matched_alternatives(pattern, modules)
    missed = [part for part in missed if not any(path.endswith(part) for path in found)]
    is_open = pattern.startswith((".*", "(.*", "^.*"))  # else models of several kinds may name the beginning otherwise
    if not modules or not missed or (len(missed) == len(parts) and not is_open):
        return None
    says = f"{', '.join(missed)} in lora_target_modules {pattern} match{'es' * (len(missed) == 1)} no module"
    numbers, fix = {"asked": parts, "missed": missed}, "lora_target_modules: all-linear"
    return Signal("F56", "invariant", says, 0.9, numbers, fix=fix, affected=len(missed) / len(parts))


@rule("F57", probes=("P5",))
def no_gradient(run_facts: RunFacts) -> list[Signal]:
    """F57: the adapters get no gradient, because gradient checkpointing cuts them off.

    Sees: gradients of the adapters that are None at step 1 (probe P5); `lora_B` exactly zero in the saved adapter after
    steps at a learning rate above zero, with reentrant checkpointing; the error or warning that says so.
    Why: reentrant checkpointing builds no graph if a layer's input needs no gradient. Then nothing is trained. Or
    something else is trained (lm_head, embeddings): the loss falls, and nothing shows that the adapters are not
    trained.
    Not: `lora_A` without gradient at step 0, which is normal, since B is zero; F58, where `requires_grad` is False;
    F60, where A is zero too; F75, where nothing was trained at all; experts that no token was sent to; F63, where only
    the head is untrained.
    Fix: in transformers, `gradient_checkpointing_kwargs: {use_reentrant: false}` or
    `model.enable_input_require_grads()`.
    Wrong when: the learning rate was zero.
    Source: open-unlearning#178, transformers#42489, peft#1142.
    """
    reentrant = run_facts.settings.get("use_reentrant") is True and bool(
        run_facts.settings.get("gradient_checkpointing")
    )
    fix = "gradient_checkpointing_kwargs: {use_reentrant: false}, or model.enable_input_require_grads() (transformers)"
    signals = []
    if line := has_error(run_facts, r"none of the inputs have requires_grad"):
        signals.append(Signal("F57", "measured", f"the log says: {line}", 0.85, {}, fix=fix))
    if line := has_error(run_facts, r"does not require grad and does not have a grad_fn"):
        signals.append(
            Signal("F57", "measured", f"the run ended with this error: {line}", 0.7 if reentrant else 0.5, {}, fix=fix)
        )
    zero, whole = zero_products(run_facts)
    if whole and took_steps(run_facts) and ((zero == whole and reentrant) or 0 < zero < whole):
        says = f"{zero} of {whole} lora_B are exactly zero after training"
        says += ", with reentrant checkpointing" * reentrant
        weight, numbers = 0.8 if reentrant else 0.5, {"zero": zero, "of": whole}
        signals.append(Signal("F57", "invariant", says, weight, numbers, fix=fix, affected=zero / whole))
    return signals


def zero_products(run_facts: RunFacts) -> tuple[int, int]:
    """Count the saved `lora_B` that are exactly zero, and all saved `lora_B`, without heads and experts."""
    layers = {name: parts["B"] for name, parts in lora_layers(run_facts).items() if "B" in parts}
    second = [tensor for name, tensor in layers.items() if not _NOT_ALWAYS.search(name)] or list(layers.values())
    return sum(map(is_zero, second)), len(second)


def stayed_zero(run_facts: RunFacts) -> bool:
    """Whether steps were taken, and a checkpoint written after them still has every `lora_B` at zero."""
    held = run_facts.saved.in_checkpoint if run_facts.saved else None
    second = [tensor for name, tensor in (held or {}).items() if "lora_B" in name]
    return bool(second) and all(map(is_zero, second)) and took_steps(run_facts)


def took_steps(run_facts: RunFacts) -> bool:
    """Whether at least one step was recorded with a learning rate above zero, or with an unknown rate."""
    trace = run_facts.trace
    return trace is not None and len(trace.step_S) > 0 and not bool((trace.learning_rate_S == 0).all())


@rule("F58", probes=("P5",))
def adapters_frozen(run_facts: RunFacts) -> list[Signal]:
    """F58: the adapters are frozen.

    Sees: adapters that are not trainable, all or those whose B is still zero, or that the optimizer's step leaves as
    they were, since it has other parameters (probe P5); the setting that freezes them: `is_trainable: false` where an
    adapter is loaded to continue its training; a gradient norm of exactly zero in all logged steps, with a loss that
    does not fall; evaluations that are equal to the last bit while the learning rate is above zero; `lora_B` exactly
    zero in a checkpoint that was written after steps.
    Why: nothing changes, or only other trainable parts do. The loss is flat, bit by bit the same on the same rows.
    Not: F64, where the loss moves a little; F57, whose parameters are trainable but get no gradient; `inference_mode:
    true` in a saved adapter_config.json, which PEFT always writes there; a tool that logs no gradient norm and writes 0
    (the loss falls).
    Fix: in PEFT, `PeftModel.from_pretrained(..., is_trainable=True)`.
    Wrong when: the run is only an evaluation.
    Source: transformers#26334; with only B frozen the loss stayed at exactly 7.331 (measured).
    """
    fix, signals = "PeftModel.from_pretrained(..., is_trainable=True) (PEFT)", []
    get = run_facts.settings.get
    if get("is_trainable") is False or get("inference_mode") is True or get("trainable_parameters") == 0:
        key = next(k for k in ("is_trainable", "inference_mode", "trainable_parameters") if get(k) is not None)
        signals.append(Signal("F58", "invariant", f"{key} is {get(key)}, so no adapter is trained", 0.9, {}, fix=fix))
    if line := has_error(run_facts, r"does not require grad and does not have a grad_fn"):
        signals.append(Signal("F58", "measured", f"the run ended with this error: {line}", 0.5, {}, fix=fix))
    if stayed_zero(run_facts) and not is_all_zero(run_facts):
        says = "every lora_B is exactly zero in a checkpoint written after steps with a learning rate above zero"
        signals.append(Signal("F58", "invariant", says, 0.85, {}, fix=fix))
    trace = run_facts.trace
    norms = trace.grad_norm_S[np.isfinite(trace.grad_norm_S)] if trace is not None else np.zeros(0)
    is_logged = len(norms) >= 2 and not is_all_zero(run_facts) and not is_ours(run_facts)
    if is_logged and not norms.any() and not _falls(run_facts):
        says = f"the gradient norm is exactly zero in all {len(norms):,} logged steps"
        signals.append(Signal("F58", "invariant", says, 0.75, {"steps": len(norms)}, fix=fix, affected=1.0))
    if (same := equal_evaluations(run_facts)) is not None and not is_all_zero(run_facts):
        says = f"{same[0]} evaluations after different steps are all exactly {same[1]:.6g}: nothing changes the model"
        signals.append(Signal("F58", "invariant", says, 0.6, {"evaluations": same[0]}, fix=fix, affected=1.0))
    return signals


def _falls(run_facts: RunFacts) -> bool:
    """Whether the logged loss falls by a tenth, beyond its noise of single batches."""
    losses = run_facts.trace.loss_S if run_facts.trace is not None else np.zeros(0)
    losses = losses[np.isfinite(losses)]
    quarter = max(1, len(losses) // 4)
    return len(losses) >= 4 and float(losses[-quarter:].mean()) < 0.9 * float(losses[:quarter].mean())


def equal_evaluations(run_facts: RunFacts) -> tuple[int, float] | None:
    """(count, value) of at least three held-out losses, all bit for bit the same though steps were taken between them.

    Not with bfloat16 adapters or clipping to nothing, which lose small steps (F54, F68), or a learning rate of zero.
    """
    trace = run_facts.trace
    if trace is None or len(trace.eval_loss_E) < 3 or not took_steps(run_facts):
        return None
    between = (trace.step_S > trace.eval_step_E[0]) & (trace.step_S <= trace.eval_step_E[-1])
    stepped = bool((trace.learning_rate_S[between] > 0).any())
    is_lost = str(run_facts.settings.get("adapter_dtype")).endswith("16")
    is_clipped = (setting(run_facts, "max_grad_norm") or 1.0) < 1e-5
    value, steps = float(trace.eval_loss_E[0]), np.unique(trace.eval_step_E)
    is_same = len(steps) >= 3 and bool((trace.eval_loss_E == value).all()) and value != round(value, 4)  # not rounded
    return None if not (is_same and stepped) or is_lost or is_clipped else (len(steps), value)


@rule("F59", needs=("settings",), probes=("P4",))
def adapter_not_neutral(run_facts: RunFacts) -> Signal | None:
    """F59: the untrained adapter already changes the model.

    Sees: `init_lora_weights: false`, which makes both A and B random; different logits with the adapter on and off
    before the first step (probe P4), which should be equal; a run that began with an adapter that changes the output
    and is of no use to its rows.
    Why: the adapter damages the base: the first loss is too high, gradients spike, and the final loss is a little
    worse.
    Not: PiSSA, OLoRA, LoftQ, EVA and CorDA, whose adapter holds a part of the base by design; F76 and F78, which show
    when a finished adapter is loaded.
    Fix: in PEFT, `init_lora_weights: true`.
    Wrong when: the adapter continues an earlier run on the same base.
    Source: PEFT's option of this name; the logits with adapter on and off differed by 13 (measured).
    """
    if initialisation(run_facts) is not False or is_ours(run_facts):
        return None
    says = "init_lora_weights is false, so both A and B start with random values"
    return Signal("F59", "invariant", says, 0.9, {}, fix="init_lora_weights: true (PEFT)")


def is_all_zero(run_facts: RunFacts) -> bool:
    """Whether all A and all B of the saved adapter are zero."""
    parts = [part for pair in lora_layers(run_facts).values() for part in pair.values()]
    return bool(parts) and all(map(is_zero, parts))


@rule("F60", probes=("P5",))
def adapter_all_zero(run_facts: RunFacts) -> Signal | None:
    """F60: both matrices of the adapters are zero, and stay zero.

    Sees: A and B exactly zero in the saved adapter; no gradient in either at step 1 (probe P5).
    Why: the gradient of each matrix is a product with the other one, so both stay zero: the loss is constant.
    Not: only B zero, as in every adapter before its first step (F75 if it was saved so, F57 and F58 if it stayed so).
    Fix: in PEFT, `init_lora_weights: true`.
    Wrong when: never.
    Source: measured (at step 1 all gradients of A and of B were zero).
    """
    if not is_all_zero(run_facts) or (run_facts.saved and run_facts.saved.in_checkpoint and not stayed_zero(run_facts)):
        return None
    count = len(lora_layers(run_facts))
    says = f"A and B of all {count} adapted modules are exactly zero"
    return Signal("F60", "invariant", says, 0.95, {"modules": count}, fix="init_lora_weights: true (PEFT)")


@rule("F61", needs=("settings",), probes=("P7",))
def scale_wrong(run_facts: RunFacts) -> list[Signal]:
    """F61: the adapter's scale alpha / r does not suit the learning rate.

    Sees: alpha of zero; a scale alpha / r (alpha / sqrt(r) with rsLoRA) at which one step of Adam changes a weight by
    half of its size, or all steps together change it by less than float16 rounds it; a scale below 1/4 with which one
    batch is learned several times later than with ten times the scale, in a run that is too short for it (probe P7); an
    unusual scale (below 1/4, above 32) together with a loss that jumps and stays high, or does not fall; a different
    scale in serving than in training; modules that multiply by another factor than the settings give (probe P4). An
    unusual scale alone is a remark.
    Why: with Adam the effect of an update is about learning rate x scale. A small scale looks like a low learning rate,
    a large one like a high learning rate. A different scale in serving changes the tuned model.
    Not: alpha / r of 1/2 to 4, which is usual; F64 and F67, which have the same evidence: both are reported, and the
    range test confirms the product. The one that is further from the usual is named first.
    Fix: `lora_alpha` between lora_r and 2 x lora_r.
    Wrong when: the learning rate was chosen to fit the scale. Control: alpha from r / 2 to 4 r, also with rsLoRA.
    Source: mlx-vlm#841, TensorRT-LLM#1668; 1/8 instead of 2 cost 0.7 nats, 32 none, 256 ended in a jump (measured).
    """
    found, rank = scale(run_facts), setting(run_facts, "lora_r")
    fix = f"lora_alpha: {2 * rank:g}" if rank else "lora_alpha: 2 x lora_r"
    signals = []
    if rank and setting(run_facts, "lora_alpha") == 0:
        says = "lora_alpha is 0, so the adapter is multiplied by zero and has no effect"
        signals.append(Signal("F61", "invariant", says, 0.95, {"scale": 0.0}, fix=fix))
    if found is not None and (harm := _harm_of_scale(run_facts, found)) is not None:
        kind, says, weight, numbers = harm
        says = f"the adapter's scale alpha / r is {found:.3g} (1 to 4 is usual){says}"
        signals.append(Signal("F61", kind, says, weight, {"scale": found, **numbers}, fix=fix))
    alpha, serving_rank = setting(run_facts, "serving_alpha"), setting(run_facts, "serving_r") or rank
    served = setting(run_facts, "serving_scale") or (alpha / serving_rank if alpha and serving_rank else None)
    if found and served and abs(served / found - 1) > 0.01:
        says = f"the adapter was trained with scale {found:.3g} and is served with {served:.3g}"
        signals.append(Signal("F61", "invariant", says, 0.9, {"trained": found, "served": served},
                              fix=f"serve the adapter with alpha / r = {found:.3g}"))  # fmt: skip
    return signals


def _harm_of_scale(run_facts: RunFacts, found: float) -> tuple[Kind, str, float, dict[str, float]] | None:
    """Kind, words, weight and numbers of what an unusual scale does; None if it is usual."""
    if WEAK <= found <= STRONG:
        return None
    harm = None
    if found < WEAK and odd_one(run_facts, "F64") == "F61":
        harm = too_small(run_facts)
    elif found > STRONG and odd_one(run_facts, "F67") == "F61":
        change = one_step(run_facts)
        if change is not None and change >= HALF:
            says = f"one step of Adam changes a weight by {change:.1f} times its size"
            harm = ("invariant", says, 0.8, {"change_of_a_step": change})
        else:
            harm = diverges(run_facts)
    if harm is None:
        return "remark", "", 0.3, {}
    kind, says, weight, numbers = harm
    return kind, f": {says}", weight, numbers


@rule("F62", needs=("settings",), probes=("P7",))
def too_little_capacity(run_facts: RunFacts) -> Signal | None:
    """F62: the adapter is too small for the task.

    Sees: a rank of 1 or 2 on one or two kinds of modules, which is a remark. Probe P7 decides: no learning rate
    overfits one batch of two rows, or of eight, but a large adapter on all linear layers does.
    Why: the loss flattens above what the model could reach.
    Not: F64, where a higher learning rate overfits the batch; F56, where some names match nothing; rank 1 on all linear
    layers, which is enough for many tasks.
    Fix: `lora_target_modules: all-linear`, `lora_r: 16`.
    Wrong when: the task is small (a format, a style).
    Source: LoRA Without Regret (adapters on attention only are worse with the same number of parameters); only q_proj
    with r = 1: 2.98 instead of 1.72 (measured).
    """
    rank, names = setting(run_facts, "lora_r"), targets(run_facts)
    if not rank or rank > 2 or not isinstance(names, list) or len(names) > 2:
        return None
    says = f"the adapter has only rank {rank:g} and is only on {', '.join(names)}"
    numbers = {"r": rank, "targets": names}
    return Signal("F62", "remark", says, 0.3, numbers, fix="lora_target_modules: all-linear, lora_r: 16")


@rule("F63", needs=("settings",))
def head_adapter_ignored(run_facts: RunFacts) -> Signal | None:
    """F63: the output head or the embedding is among the targets, where its adapter is lost or changes both.

    Sees: the head or the embedding in lora_target_modules, and one of: head and embedding are one tensor, so merging
    the adapter of one changes the other; the head's saved `lora_B` is exactly zero while others are not, or it alone
    has no gradient (probe P5); a fused loss (Liger, TRL's chunked one, cut cross-entropy), which uses the head's own
    weight. Without these, and for a router or experts among the targets, it is a remark.
    Why: the adapter on the head is saved but never trained, or base with adapter and merged model differ.
    Not: F56, where the name matches nothing; `all-linear`, which leaves the head out; `modules_to_save`, which trains
    the whole head or embedding (with tied weights a remark: it becomes a copy of its own).
    Fix: remove the head from `lora_target_modules`, or train the whole head (in PEFT: `modules_to_save: [lm_head]`).
    Wrong when: the fused loss applies adapters (then its lora_B is not zero); PEFT ties the adapters itself
    (`ensure_weight_tying`). Control: an untied head whose lora_B was trained.
    Source: trl 1.16 raises an error for it; PEFT warns about tied weights ("can lead to complications").
    """
    names = _named_targets(run_facts)
    ends = [name for name in names if name.rpartition(".")[2] in HEADS or re.search(r"lm_head|embed_out", name)]
    ends += [name for name in names if is_embedding(name) or re.search(r"embed_tokens|\bwte\b", name)]
    if not ends:
        return _other_ends(run_facts, names)
    get, zero = run_facts.settings.get, {}
    for path, parts in lora_layers(run_facts).items():
        if "B" in parts:
            zero[path.rpartition(".")[2]] = is_zero(parts["B"])
    keep = "" if is_ours(run_facts) else f"; to train it with PEFT, modules_to_save: [{ends[0]}]"
    fix = f"remove {ends[0]} from lora_target_modules{keep}"
    dead = [name for name, is_dead in zero.items() if name in HEADS and is_dead]
    if dead and not all(zero.values()):
        says = f"lora_B of {dead[0]} is exactly zero, but not those of other modules"
        return Signal("F63", "invariant", says, 0.95, {"modules": dead}, fix=fix)
    if is_ours(run_facts):
        says = f"{ends[0]} is in lora_target_modules, but only linear layers inside the decoder layers get adapters"
        return Signal("F63", "invariant", says, 0.9, {"targets": ends}, fix=fix)
    if run_facts.model_config.get("tie_word_embeddings") is True and not get("ensure_weight_tying"):
        says = f"{ends[0]} has an adapter, but head and embedding are one tensor: merging changes both"
        return Signal("F63", "measured", says, 0.75, {"targets": ends}, fix=fix)
    fused = [k for k in ("use_liger_kernel", "use_liger", "fused_loss", "cut_cross_entropy") if get(k)]
    is_head = ends[0].rpartition(".")[2] not in EMBEDDINGS
    if is_head and (fused or get("tool") in ("trl", "unsloth")) and zero.get(ends[0].rpartition(".")[2]) is not False:
        says = f"{ends[0]} has an adapter, but the fused loss ignores it ({fused[0] if fused else 'fused by default'})"
        return Signal("F63", "measured", says, 0.8, {"fused": fused}, fix=fix)
    return Signal("F63", "remark", f"{ends[0]} is in lora_target_modules", 0.3, {"targets": ends}, fix=fix)


def _named_targets(run_facts: RunFacts) -> list[str]:
    """The target names; a regular expression is one name."""
    configured = targets(run_facts)
    return (
        configured if isinstance(configured, list) else [configured] if configured not in (None, "all-linear") else []
    )


def _other_ends(run_facts: RunFacts, names: list[str]) -> Signal | None:
    """A remark on a router or experts among the targets, or on a tied head or embedding that is trained whole."""
    routers = [name for name in names if name.rpartition(".")[2] in ("gate", "router", "wg") or "expert" in name]
    if routers:
        says = f"{routers[0]} in lora_target_modules changes which expert a token is sent to, or experts themselves"
        return Signal("F63", "remark", says, 0.3, {"targets": routers}, fix=f"remove {routers[0]} if it is not meant")
    saved = run_facts.settings.get("modules_to_save") or ()
    whole = [name for name in ([saved] if isinstance(saved, str) else map(str, saved))
             if name.rpartition(".")[2] in (*HEADS, *EMBEDDINGS)]  # fmt: skip
    if not whole or run_facts.model_config.get("tie_word_embeddings") is not True:
        return None
    says = f"{', '.join(whole)} in modules_to_save: head and embedding are one tensor in this model, and become two"
    fix = f"remove {whole[0]} from modules_to_save, or set ensure_weight_tying: true (PEFT)"
    return Signal("F63", "remark", says, 0.3, {"modules_to_save": whole}, fix=fix)
