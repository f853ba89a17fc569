"""S12, the LoRA adapter: F56 to F63."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import (
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
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

WEAK, STRONG = 0.25, 32.0
"""Limits of alpha / r; 1 to 4 is usual, and 32 still trained well with a suitable learning rate."""
_HEADS = ("lm_head", "embed_out", "output", "output_layer")


@rule("F56", needs=("settings",))
def targets_missed(run_facts: RunFacts) -> Signal | None:
    """F56: some names in lora_target_modules match few modules of this model, or none.

    Sees: names without a module, and names that have an adapter in only some of the layers. The names of the config are
    compared with the modules in the adapter file and with the modules that config.json builds.
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
    if not isinstance(names, list):
        return None
    modules = linears(run_facts)
    found, known = list(lora_layers(run_facts)), list(modules or ())
    if not found and not known:
        return None
    missed = [name for name in names if not _with_name(found or known, name)]
    numbers = {"asked": names, "missed": missed, "modules": len(found)}
    fix = "lora_target_modules: all-linear"
    if missed and (found or len(missed) < len(names) or not is_ours(run_facts)):
        says = f"{', '.join(missed)} in lora_target_modules match{'es' if len(missed) == 1 else ''} no adapted module"
        return Signal("F56", "invariant", says, 0.9, numbers, fix=fix)
    few = {name: (_with_name(found, name), _with_name(known, name)) for name in names} if found and known else {}
    few = {name: counts for name, counts in few.items() if counts[0] < counts[1]}
    chosen = run_facts.saved.adapter_config if run_facts.saved else {}
    if not few or chosen.get("layers_to_transform") is not None or chosen.get("exclude_modules"):
        return None
    name, (has, could) = next(iter(few.items()))
    return Signal(
        "F56", "measured", f"only {has} of {could} modules named {name} have an adapter", 0.75, numbers, fix=fix
    )


def _with_name(modules: Iterable[str], name: str) -> int:
    return sum(module == name or module.endswith(f".{name}") for module in modules)


@rule("F57", probes=("P5",))
def no_gradient(run_facts: RunFacts) -> list[Signal]:
    """F57: the adapters get no gradient, because gradient checkpointing cuts them off.

    Sees: gradients of the adapters that are None at step 1 (probe P5); `lora_B` exactly zero in the saved adapter after
    steps at a learning rate above zero, with reentrant checkpointing; the error or warning that says so.
    Why: reentrant checkpointing builds no graph if a layer's input needs no gradient. Then nothing is trained. Or
    something else is trained (lm_head, embeddings): the loss falls, and nothing shows that the adapters are not
    trained.
    Not: `lora_A` without gradient at step 0, which is normal, since B is zero; F58, where `requires_grad` is False;
    F60, where A is zero too; F75, where nothing was trained at all.
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
        says = f"{zero} of {whole} lora_B are exactly zero after training" + (
            ", with reentrant checkpointing" * reentrant
        )
        signals.append(
            Signal("F57", "invariant", says, 0.8 if reentrant else 0.5, {"zero": zero, "of": whole}, fix=fix)
        )
    return signals


def zero_products(run_facts: RunFacts) -> tuple[int, int]:
    """Count the saved `lora_B` that are exactly zero, and all saved `lora_B`."""
    second = [parts["B"] for parts in lora_layers(run_facts).values() if "B" in parts]
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

    Sees: no trainable parameter in the adapters (probe P5), or the setting that freezes them: `is_trainable: false`
    where an adapter is loaded to continue its training; a gradient norm of exactly zero in all logged steps; `lora_B`
    exactly zero in a checkpoint that was written after steps.
    Why: nothing changes, or only other trainable parts do. The loss is flat, bit by bit the same on the same rows.
    Not: F64, where the loss moves a little; F57, whose parameters are trainable but get no gradient; `inference_mode:
    true` in a saved adapter_config.json, which PEFT always writes there.
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
    if len(norms) >= 2 and not norms.any() and not is_all_zero(run_facts) and not is_ours(run_facts):
        says = f"the gradient norm is exactly zero in all {len(norms):,} logged steps"
        signals.append(Signal("F58", "invariant", says, 0.75, {"steps": len(norms)}, fix=fix))
    return signals


@rule("F59", needs=("settings",), probes=("P4",))
def adapter_not_neutral(run_facts: RunFacts) -> Signal | None:
    """F59: the untrained adapter already changes the model.

    Sees: `init_lora_weights: false`, which makes both A and B random; different logits with the adapter on and off
    before the first step (probe P4). They should be equal.
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

    Sees: alpha / r (alpha / sqrt(r) with rsLoRA) below 1/4 or above 32; a different scale in serving than in training.
    Why: the effect of an update is about learning rate x scale^2. A small scale looks like a low learning rate, a large
    one like a high learning rate. A different scale in serving changes the tuned model.
    Not: alpha / r of 1 to 4, which is usual; F64 and F67, which have the same evidence: both are reported, and the
    range test confirms the product. If alpha / r is ordinary, the learning rate is the cause.
    Fix: `lora_alpha` between lora_r and 2 x lora_r.
    Wrong when: the learning rate was chosen to fit the scale.
    Source: mlx-vlm#841, TensorRT-LLM#1668; 1/8 instead of 2 cost 0.7 nats, 256 ended in a jump of the loss (measured).
    """
    found, rank = scale(run_facts), setting(run_facts, "lora_r")
    fix = f"lora_alpha: {2 * rank:g}" if rank else "lora_alpha: 2 x lora_r"
    signals = []
    if found is not None and not WEAK <= found <= STRONG:
        away = np.log2(WEAK / found) if found < WEAK else np.log2(found / STRONG)
        says = f"the adapter's scale alpha / r is {found:.3g}; 1 to 4 is usual"
        weight = float(min(0.85, 0.6 + 0.05 * away))
        signals.append(Signal("F61", "measured", says, weight, {"scale": found},
                              fix=fix))  # fmt: skip
    alpha, serving_rank = setting(run_facts, "serving_alpha"), setting(run_facts, "serving_r") or rank
    served = setting(run_facts, "serving_scale") or (alpha / serving_rank if alpha and serving_rank else None)
    if found and served and abs(served / found - 1) > 0.01:
        says = f"the adapter was trained with scale {found:.3g} and is served with {served:.3g}"
        signals.append(Signal("F61", "invariant", says, 0.9, {"trained": found, "served": served},
                              fix=f"serve the adapter with alpha / r = {found:.3g}"))  # fmt: skip
    return signals


@rule("F62", needs=("settings",), probes=("P7",))
def too_little_capacity(run_facts: RunFacts) -> Signal | None:
    """F62: the adapter is too small for the task.

    Sees: a rank of 1 or 2 on one or two kinds of modules. This is only a hint. Probe P7 decides: no learning rate
    overfits one batch, but a large adapter on all linear layers does.
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
    return Signal("F62", "measured", says, 0.5, numbers, fix="lora_target_modules: all-linear, lora_r: 16")


@rule("F63", needs=("settings",))
def head_adapter_ignored(run_facts: RunFacts) -> Signal | None:
    """F63: a fused loss ignores the adapter on the output head.

    Sees: the head in lora_target_modules, and one of: its saved `lora_B` is exactly zero while others are not; a fused
    loss (Liger, TRL's chunked one, cut cross-entropy), which uses the head's own weight.
    Why: the adapter on the head is saved but never trained.
    Not: F56, where the name matches nothing; `all-linear`, which leaves the head out.
    Fix: remove the head from `lora_target_modules`, or train the whole head (in PEFT: `modules_to_save: [lm_head]`).
    Wrong when: the fused loss applies adapters (then its lora_B is not zero).
    Source: trl 1.16 raises an error for it.
    """
    configured = targets(run_facts)
    names = configured if isinstance(configured, list) else []
    if isinstance(configured, str) and configured != "all-linear" and re.search(r"lm_head|embed_out", configured):
        names = [configured]
    heads = [name for name in names if name.rpartition(".")[2] in _HEADS or re.search(r"lm_head|embed_out", name)]
    if not heads:
        return None
    zero = {
        path.rpartition(".")[2]: is_zero(parts["B"]) for path, parts in lora_layers(run_facts).items() if "B" in parts
    }
    fix = f"remove {heads[0]} from lora_target_modules; to train it with PEFT, modules_to_save: [{heads[0]}]"
    dead = [name for name, is_dead in zero.items() if name in _HEADS and is_dead]
    if dead and not all(zero.values()):
        says = f"lora_B of {dead[0]} is exactly zero, but not those of other modules"
        return Signal("F63", "invariant", says, 0.95, {"modules": dead}, fix=fix)
    fused = [
        k for k in ("use_liger_kernel", "use_liger", "fused_loss", "cut_cross_entropy") if run_facts.settings.get(k)
    ]
    if fused or run_facts.settings.get("tool") in ("trl", "unsloth"):
        says = f"{heads[0]} has an adapter, but the fused loss ignores it ({fused[0] if fused else 'fused by default'})"
        return Signal("F63", "measured", says, 0.8, {"fused": fused}, fix=fix)
    return None if zero else Signal("F63", "measured", f"{heads[0]} is in lora_target_modules", 0.4, {}, fix=fix)
