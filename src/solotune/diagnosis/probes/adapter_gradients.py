"""P4, P5 and P6: effect of the adapter at the start, gradients of every adapter, updates lost to rounding.

P4  logits with the adapter on and off
P5  gradients of every adapter in the second step: in the first, gradients of A are zero even in a healthy run (B = 0)
P6  share of the elements whose stored value one optimizer step changes

P5 and P6 share two real steps on one small batch, at the peak learning rate: two forward and backward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import HEADS, begins_by_design
from solotune.diagnosis.probes.adapter_scale import other_scale
from solotune.diagnosis.probes.probed_model import (
    Adapter,
    adapters_of,
    adapters_off,
    has_labels,
    is_untouched,
    logits_of,
    on_device,
    optimizer_of,
    restore_model_state,
    sequences_of,
    trainable_of,
    training_loss,
)
from solotune.diagnosis.probes.skipped import Skipped
from solotune.diagnosis.run_facts import LiveModel, RunFacts

ARRIVES = 0.6  # of the elements: below it, rounding loses most of a step
ARRIVES_IN_A = 0.4  # of the elements of A, which have their size from the start
NOT_THE_BASE = 1e-3  # largest difference of log-probabilities that an untouched adapter may make (rounding)
MOST, SOME = 0.9, 0.1  # of the adapters
NO_RATE = 1e-7  # a step of this size may round to nothing in float32
FIRST_STEPS = 3  # a log that begins with the run
MOVED, OF_USE = 0.1, 0.95  # nats a token that an adapter changes; share of the base's loss from which it is of no use


def on_and_off(live: LiveModel, run_facts: RunFacts, budget: float) -> tuple[list[Signal], dict[str, Any]]:
    """P4."""
    if not adapters_of(live.model):
        raise Skipped("the model has no adapter")
    batch = _small(live)
    with restore_model_state(live), torch.no_grad():
        live.model.eval()
        on = logits_of(live.model, batch).float().log_softmax(-1)
        with adapters_off(live.model):
            off = logits_of(live.model, batch).float().log_softmax(-1)
    difference = float((on - off).abs().max())
    divergence = float((on.exp() * (on - off)).sum(-1).mean())
    untouched = is_untouched(live.model)
    found = {"largest_difference": difference, "divergence": divergence, "B_all_zero": untouched}
    scaled, steps = other_scale(live, run_facts), _steps_done(run_facts)
    if not untouched and steps == 0 and difference > NOT_THE_BASE and not begins_by_design(run_facts):
        says = (
            f"before the first step the adapter changes log-probabilities by {difference:.2g}; with B = 0 it should not"
        )
        fix = "init_lora_weights: true"
        return [*scaled, Signal("F59", "invariant", says, 0.9, found, fix=fix)], found
    if not untouched and steps and not begins_by_design(run_facts):
        return [*scaled, *_began_elsewhere(live, run_facts, batch, found)], found
    if difference <= NOT_THE_BASE:
        says = f"with the adapter on, the model equals its base (difference {difference:.1g})"
        return [*scaled, Signal("F59", "measured", says, 0.9, found, against=True)], found
    return scaled, found


def _began_elsewhere(
    live: LiveModel, run_facts: RunFacts, batch: dict[str, Any], found: dict[str, Any]
) -> list[Signal]:
    """F59 if this is the adapter of the first step (the run began at its loss, and did not end there), and it changes
    the model without being of use: the adapter of an earlier run lowers the loss.
    """
    trace = run_facts.trace
    if trace is None or trace.step_S[0] > FIRST_STEPS or not np.isfinite(trace.loss_S[[0, -1]]).all():
        return []
    first, last = float(trace.loss_S[0]), float(trace.loss_S[-1])
    with restore_model_state(live), torch.no_grad():
        live.model.eval()
        on = float(training_loss(live, batch))
        with adapters_off(live.model):
            off = float(training_loss(live, batch))
    found |= {"loss_on": on, "loss_off": off, "first_logged": first}
    is_first = abs(first - on) < 0.25 * abs(first - last)
    if not is_first or found["divergence"] < MOVED or on < OF_USE * off:
        return []
    says = f"the run began with an adapter that changes the output by {found['divergence']:.2f} nats a token and is of "
    says += f"no use: the loss of its rows is {on:.2f}, with the base alone {off:.2f}"
    kind = "measured" if live.is_rebuilt else "invariant"  # the labels that were logged are not known
    return [Signal("F59", kind, says, 0.85, found, fix="init_lora_weights: true")]


def gradients_and_steps(live: LiveModel, run_facts: RunFacts, budget: float) -> tuple[list[Signal], dict[str, Any]]:
    """P5 and P6."""
    adapters = adapters_of(live.model)
    if not adapters:
        raise Skipped("the model has no adapter")
    rate = learning_rate_of(run_facts)
    with restore_model_state(live):
        live.model.train()
        found = _two_steps(live, adapters, rate)
        signals = [] if live.is_rebuilt else _without_gradient(live, adapters, found)
    with restore_model_state(live):
        live.model.train()
        signals += _lost(live, run_facts, adapters, rate, found)
    return signals, found


def learning_rate_of(run_facts: RunFacts) -> float:
    """The peak learning rate: as set, else as logged, else 2e-4."""
    given = run_facts.settings.get("learning_rate")
    if given:
        return float(given)
    rates = [] if run_facts.trace is None else [float(r) for r in run_facts.trace.learning_rate_S if r == r]
    return max(rates, default=0.0) or 2e-4


def _small(live: LiveModel, rows: int = 2) -> dict[str, Any]:
    for batch in live.batches:
        part = sequences_of(batch, rows)
        if has_labels(part):
            return on_device(live, part)
    raise Skipped("no batch has a label")


def _steps_done(run_facts: RunFacts) -> int:
    if run_facts.trace is None or not len(run_facts.trace.step_S):
        return 0
    return int(run_facts.trace.step_S[-1])


def _two_steps(live: LiveModel, adapters: Sequence[Adapter], rate: float) -> dict[str, Any]:
    """Gradients in the second step, and the share of elements that it changes."""
    batch = _small(live)
    parameters = trainable_of(live.model)
    found: dict[str, Any] = {
        "adapters": len(adapters),
        "B_trainable": sum(a.B.requires_grad for a in adapters),
        "rate": rate,
        "dtype": str(adapters[0].A.dtype).removeprefix("torch."),
    }
    if not parameters:
        return found
    optimizer = optimizer_of(live, parameters, rate)
    for step in (1, 2):
        loss = training_loss(live, batch)
        if not loss.requires_grad:
            found["error"] = "the loss does not depend on any trainable parameter"
            return found
        loss.backward()
        found[f"loss_{step}"] = loss.item()
        if step == 2:
            found |= _zeros(adapters)
            found["head_without_gradient"] = _head_without_gradient(adapters)
            found["without_gradient"] = [a.name for a in adapters if _none(a.A) and _none(a.B)][:5]
            found["other_gradients"] = any(
                p.grad is not None and bool(p.grad.any()) for p in parameters if not _is_adapter(p, adapters)
            )
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        if step == 2:
            found["share_changed"] = _share_changed(parameters, before)
            found["never_changed"] = _never_changed(adapters, parameters, before)
            first = [(p, old) for p, old in zip(parameters, before, strict=True) if any(p is a.A for a in adapters)]
            found["share_changed_A"] = _share_changed([p for p, _ in first], [old for _, old in first])
        optimizer.zero_grad(set_to_none=True)
    return found


def _share_changed(parameters: Sequence[nn.Parameter], before: Sequence[torch.Tensor]) -> float | None:
    """Share of the elements with a gradient whose stored value changed."""
    changed = total = 0
    for p, old in zip(parameters, before, strict=True):
        if p.grad is not None:
            moves = p.grad != 0
            total += int(moves.sum())
            changed += int(((p.detach() != old) & moves).sum())
    return changed / total if total else None


def _never_changed(
    adapters: Sequence[Adapter], parameters: Sequence[nn.Parameter], before: Sequence[torch.Tensor]
) -> float:
    """Share of the adapters in float32 that have a gradient, and that the optimizer's step leaves as they were."""
    old = {id(p): values for p, values in zip(parameters, before, strict=True)}
    stays = [
        all(torch.equal(p.detach(), old[id(p)]) for p in (a.A, a.B) if id(p) in old)
        for a in adapters
        if not (_none(a.A) and _none(a.B)) and a.B.dtype == torch.float32
    ]
    return sum(stays) / len(adapters)


def _none(p: nn.Parameter) -> bool:
    return p.grad is None or not bool(p.grad.any())


def _is_adapter(p: nn.Parameter, adapters: Sequence[Adapter]) -> bool:
    return any(p is a.A or p is a.B for a in adapters)


def _zeros(adapters: Sequence[Adapter]) -> dict[str, float]:
    """Shares of the A and of the B without a gradient."""
    return {
        "A_without_gradient": sum(_none(a.A) for a in adapters) / len(adapters),
        "B_without_gradient": sum(_none(a.B) for a in adapters) / len(adapters),
    }


def _without_gradient(live: LiveModel, adapters: Sequence[Adapter], found: dict[str, Any]) -> list[Signal]:
    """Signals of F58, F60 or F57, confirmed by applying the fix."""
    if found.get("never_changed", 0.0) >= SOME and live.make_optimizer is not None and found["rate"] >= NO_RATE:
        says = (
            f"a step of the training's optimizer at {found['rate']:.2g} does not change {found['never_changed']:.0%} "
        )
        says += "of the adapters, though they have gradients: they are not among its parameters"
        fix = "make the optimizer after the adapters, of all parameters with requires_grad"
        return [Signal("F58", "invariant", says, 0.95, _numbers(found), fix=fix)]
    if (head := found.get("head_without_gradient")) is not None:
        says = f"the adapter of {head} has no gradient in the second step, and all others have one"
        fix = f"remove {head} from lora_target_modules, or use a loss that calls the module"
        signals = [Signal("F63", "invariant", says, 0.9, _numbers(found), fix=fix)]
        return signals + _cleared(found)
    # A alone may be frozen (LoRA-FA), and a second adapter that is in use (B is not zero)
    useless = sum(not a.B.requires_grad and not a.B.detach().any() for a in adapters)
    frozen = max(len(adapters) - found["B_trainable"], useless)
    both = min(found.get("A_without_gradient", 1.0), found.get("B_without_gradient", 1.0))
    if frozen > 0.5 * len(adapters) or useless >= SOME * len(adapters):
        says = f"in {frozen} of {len(adapters)} adapters B does not require a gradient"
        signals = [
            Signal("F58", "invariant", says, 0.95, _numbers(found), fix="load the adapter with is_trainable=True")
        ]
        for a in adapters:
            a.A.requires_grad_(True)
            a.B.requires_grad_(True)
        return signals + _confirmed(live, adapters, "F58", "with requires_grad on", found)
    if both < MOST and found.get("B_without_gradient", 0.0) < MOST:
        return _cleared(found)
    if not any(bool(a.A.detach().any()) or bool(a.B.detach().any()) for a in adapters):
        says = "A and B are both zero in every adapter, so neither can get a gradient"
        signals = [Signal("F60", "invariant", says, 0.95, _numbers(found), fix="init_lora_weights: true")]
        with torch.no_grad():
            for a in adapters:
                a.A.normal_(std=0.02)
        return signals + _confirmed(live, adapters, "F60", "with random A", found)
    says = f"{found.get('B_without_gradient', 1.0):.0%} of the adapters have no gradient in the second step"
    says += ", though they require one" + (", while other weights have one" if found.get("other_gradients") else "")
    fix = "gradient_checkpointing_kwargs: {use_reentrant: false}, or model.enable_input_require_grads()"
    with _inputs_require_gradients(live.model):
        confirmed = _confirmed(live, adapters, "F57", "with inputs that require gradients", found)
    if not confirmed:
        return []
    return [Signal("F57", "invariant", says, 0.95, _numbers(found), fix=fix), *confirmed]


def _cleared(found: dict[str, Any]) -> list[Signal]:
    """Signals against the faults of adapters without a gradient."""
    says = f"in the second step {1 - found['B_without_gradient']:.0%} of the adapters have a gradient"
    return [Signal(code, "measured", says, 0.9, _numbers(found), against=True) for code in ("F57", "F58", "F60")]


def _head_without_gradient(adapters: Sequence[Adapter]) -> str | None:
    """The output head, if its adapter is the only one that has no gradient."""
    dead = [a.name.rpartition(".")[2] for a in adapters if a.B.requires_grad and _none(a.A) and _none(a.B)]
    return dead[0] if len(dead) == 1 < len(adapters) and dead[0] in HEADS else None


def _numbers(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if isinstance(value, (int, float))}


class _inputs_require_gradients:
    """Context: the effect of `enable_input_require_grads`, undone at exit."""

    def __init__(self, model: nn.Module) -> None:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        self._hook = embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


def _confirmed(
    live: LiveModel, adapters: Sequence[Adapter], code: str, what: str, found: dict[str, Any]
) -> list[Signal]:
    """Run a backward pass after the fix; a counterfactual signal if there are gradients now."""
    for p in live.model.parameters():
        p.grad = None
    loss = training_loss(live, _small(live))
    if not loss.requires_grad:
        return []
    loss.backward()
    have = 1 - sum(_none(a.A) and _none(a.B) for a in adapters) / len(adapters)
    found[f"mended_{code}"] = have
    if have < MOST:
        return []
    says = f"{what}, {have:.0%} of the adapters have a gradient"
    return [Signal(code, "counterfactual", says, 0.95, {"with_gradient": have})]


def _lost(
    live: LiveModel, run_facts: RunFacts, adapters: Sequence[Adapter], rate: float, found: dict[str, Any]
) -> list[Signal]:
    """Signals of F54: updates lost to rounding, confirmed with the adapters in float32."""
    share, dtype = found.get("share_changed"), adapters[0].A.dtype
    if share is None:
        return []
    numbers = {"share_changed": share, "rate": rate, "dtype": found["dtype"]}
    of_A = found.get("share_changed_A")  # B is still near zero, where even small steps arrive
    if dtype == torch.float32 or (share >= ARRIVES and (of_A is None or of_A >= ARRIVES_IN_A)):
        says = f"one step at {rate:.3g} changes {share:.0%} of the {found['dtype']} elements"
        return [Signal("F54", "measured", says, 0.9 if share >= 0.9 else 0.6, numbers, against=True)]
    for a in adapters:
        a.A.data, a.B.data = a.A.data.float(), a.B.data.float()
    again = _two_steps(live, adapters, rate)
    says = f"one step at {rate:.3g} changes {share:.0%} of the {found['dtype']} elements"
    says += f" ({of_A:.0%} of those of A)" if of_A is not None else ""
    signals = [Signal("F54", "measured", says, 0.7, numbers, fix="keep the adapter in float32")]
    if (after := again.get("share_changed")) is not None and after > 0.9:
        found["share_changed_in_float32"] = after
        says += f", in float32 {after:.0%}"
        signals.append(Signal("F54", "counterfactual", says, 0.8, {**numbers, "float32": after}))
    return signals
