"""S15, saving, resuming, merging and serving: F75 to F78; F81 is in `ranks`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import in_4bit, is_ours, linears, lora_layers, setting
from solotune.diagnosis.rules import rule
from solotune.diagnosis.rules.adapter import is_all_zero, stayed_zero, zero_products
from solotune.diagnosis.rules.schedule import mirrored_from
from solotune.diagnosis.run_facts import RunFacts, Trace

JUMP = 1.5
"""Ratio of the learning rate from one logged step to the next; no schedule rises so fast after its warm-up."""
_ROOT = "base_model.model."
"""PEFT's prefix of every module name."""
_WRAPPERS = re.compile(
    r"(?:^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.|^(?:base_model\.model\.)?(module)\."
)
"""What torch.compile, FSDP, activation checkpointing, Lightning and DistributedDataParallel write into names."""


@rule("F75", needs=("saved",), probes=("P4", "P12"))
def empty_adapter(run_facts: RunFacts) -> Signal | None:
    """F75: the saved adapter is empty or was never trained.

    Sees: a file without adapter tensors, or one whose every `lora_B` is exactly zero.
    Why: the tuned model is the base, bit for bit. A file of normal size with B = 0 is hard to notice.
    Not: F57 and F58, where the run trained nothing (its checkpoints are zero too); F60, which never had a gradient;
    F78, whose file is good and whose names do not match.
    Fix: save the adapter after training.
    Wrong when: it is the checkpoint of step 0 on purpose.
    Source: alpaca-lora#446, alpaca-lora#293, transformers#24551.
    """
    saved = run_facts.saved
    if saved is None or (is_all_zero(run_facts) and (not saved.in_checkpoint or stayed_zero(run_facts))):
        return None  # both zero: F60
    fix = "save the adapter after training (in transformers: trainer.train(), then trainer.save_model())"
    others = [name for name in saved.adapter if re.search(r"lora|magnitude|ia3|hada|oft|boft|vera|randlora", name)]
    if not others and not (saved.adapter and saved.adapter_config.get("modules_to_save")):
        says = f"the adapter file has {len(saved.adapter)} tensors, none of them of an adapter"
        return Signal("F75", "invariant", says, 0.95, {"tensors": len(saved.adapter)}, fix=fix)
    zero, whole = zero_products(run_facts)
    if not whole or zero < whole:
        return None
    if stayed_zero(run_facts):
        return None
    says = f"all {whole} saved lora_B are exactly zero, so the adapter changes nothing"
    says += "; those of its checkpoint are not zero" if saved.in_checkpoint else ""
    return Signal("F75", "invariant", says, 0.9, {"zero": zero}, fix=fix)


@rule("F76", needs=("settings",), probes=("P12",))
def merged_into_other_weights(run_facts: RunFacts) -> Signal | None:
    """F76: the adapter was merged into different weights than it was trained on.

    Sees: logits of the merged model that differ from those of base and adapter (probe P12). Training on a 4-bit base
    and merging into another precision of it, or quantizing the merged model again, is only a remark.
    Why: the adapter has learned to correct the rounding of its own base; rounding after the merge removes small
    updates.
    Not: F11, where answers are bad even with the adapter on its own base.
    Fix: merge into the dequantized 4-bit weights in 16 bits, compare the logits, and do not quantize the result again.
    Wrong when: often: merging into the 16-bit base usually loses little.
    Source: unsloth-zoo#810 (fatal on Falcon-H1), peft#2321, mlx-lm#1564.
    """
    into = run_facts.settings.get("merged_into")
    if not into:
        return None
    is_narrow = bool(re.search(r"4bit|8bit|nf4|int4|int8|q4|q8|awq|gptq|4-bit|8-bit", str(into), re.IGNORECASE))
    if is_narrow == in_4bit(run_facts) and not is_narrow:
        return None
    base = "4 bits" if in_4bit(run_facts) else "16 or 32 bits"
    says = f"the adapter was trained on a base in {base} and merged into {into}; what that loses was not measured"
    fix = "merge into the dequantized weights of the run's own base, in 16 bits, and do not quantize the result"
    return Signal("F76", "remark", says, 0.4, {"merged_into": str(into)}, fix=fix)


@rule("F77", needs=("trace",))
def resumed_without_state(run_facts: RunFacts) -> list[Signal]:
    """F77: the run was resumed without its optimizer, schedule or position in the data.

    Sees: a learning rate that rises again after its warm-up, at a resume or anywhere; a resume from a checkpoint
    without optimizer or scheduler state; `ignore_data_skip: true`; a loss that jumps at the resume.
    Why: the optimizer and the schedule start again; some rows are used twice and others never.
    Not: F67, whose spikes are not at the resume; schedules with restarts; a folder of the final adapter, which never
    has an optimizer state. A rate that rises again, of an unknown schedule and without a resume, is a remark.
    Fix: resume from a complete checkpoint (in transformers: `resume_from_checkpoint`).
    Wrong when: the weights should continue with a new schedule.
    Source: transformers#27749, miles#2661, ms-swift#3396, alpaca-lora#72 (loss from 0.82 to 8.7).
    """
    trace, saved = run_facts.trace, run_facts.saved
    if trace is None:
        return []
    fix = "resume from a complete checkpoint (in transformers: with optimizer.pt, scheduler.pt and rng_state.pth)"
    signals = []
    resumed = bool(trace.seams) or bool(run_facts.settings.get("resume_from_checkpoint"))
    lost = [name for name, has in (("optimizer", saved and saved.optimizer_present),
                                   ("scheduler", saved and saved.scheduler_present)) if has is False]  # fmt: skip
    if resumed and lost:
        says = f"the run was resumed from a checkpoint without {' and '.join(lost)} state"
        signals.append(Signal("F77", "invariant", says, 0.9, {"missing": lost, "seams": trace.seams}, fix=fix))
    if resumed and run_facts.settings.get("ignore_data_skip") is True:
        says = "ignore_data_skip is true, so the resumed run started its epoch again"
        signals.append(Signal("F77", "invariant", says, 0.85, {}, fix="ignore_data_skip: false (transformers)"))
    if jump := _rate_jump(run_facts, trace):
        step, before, after = jump
        says = f"the learning rate jumps from {before:.3g} to {after:.3g} at step {step:,}"
        is_planned = not resumed and not run_facts.settings.get("lr_scheduler_type")  # perhaps: it is not known
        weight = 0.9 if resumed else 0.75
        kind = "remark" if is_planned else "invariant"
        signals.append(Signal("F77", kind, says, weight, {"step": step}, fix=fix))
    for seam in trace.seams:
        if (found := _loss_jump(trace, seam)) is not None:
            says = f"the loss jumps from {found[0]:.2f} to {found[1]:.2f} at the resume after step {seam:,}"
            signals.append(Signal("F77", "measured", says, 0.7, {"seam": seam}, fix=fix))
    return signals


def _rate_jump(run_facts: RunFacts, trace: Trace) -> tuple[int, float, float] | None:
    """(step, rate before, after) if the learning rate rises, or drops to a new warm-up, after its first peak."""
    if re.search(r"restart|cyclic|plateau|wsd", str(run_facts.settings.get("lr_scheduler_type"))):
        return None
    has = np.isfinite(trace.learning_rate_S)
    step, rate = trace.step_S[has], trace.learning_rate_S[has]
    if len(rate) < 5 or mirrored_from(step, rate) is not None:
        return None
    fell = np.flatnonzero(np.diff(rate) < 0)  # the first fall ends the warm-up
    for i in range(int(fell[0]) + 1 if len(fell) else len(rate), len(rate)):
        floor = 1e-3 * rate[:i].max()
        if rate[i] > JUMP * max(rate[i - 1], floor):
            return int(step[i]), float(rate[i - 1]), float(rate[i])
    return None


def _loss_jump(trace: Trace, seam: int) -> tuple[float, float] | None:
    """Mean losses before and after a resume, if they differ by more than the losses before it vary."""
    has = np.isfinite(trace.loss_S)
    before = trace.loss_S[has & (trace.step_S <= seam)][-8:]
    after = trace.loss_S[has & (trace.step_S > seam)][:3]
    if len(before) < 4 or not len(after):
        return None
    rise = after.mean() - before.mean()
    return (float(before.mean()), float(after.mean())) if rise > max(4 * before.std(), 0.3 * before.mean()) else None


@rule("F78", needs=("saved",), probes=("P4", "P12"))
def adapter_not_loaded(run_facts: RunFacts) -> list[Signal]:
    """F78: the adapter's names match nothing in the model that it is loaded into, or it belongs to another base.

    Sees: module names in the adapter file that the model of config.json does not have, or that do not begin as PEFT's
    do; names with what a wrapper writes into them (`_orig_mod.` of torch.compile, `module.` of
    DistributedDataParallel, `_fsdp_wrapped_module.`); matrices that do not fit the shapes of the modules. A loaded base
    of another name than the one in adapter_config.json may be a copy or a quantized version of it: a remark.
    Why: PEFT ignores names that it does not find, and the output equals the base's.
    Not: F75, whose file is empty or zero; a model that has a module of such a name itself.
    Fix: load it strictly, on the base named in adapter_config.json; save the model without its wrappers
    (`accelerator.unwrap_model`, `model._orig_mod`, `model.module`).
    Wrong when: the tool that wrote the file uses its own names and reads them itself, or wraps the model in the same
    way before it loads them.
    Source: LlamaFactory#852, alpaca-lora#446 (the adapter's name was missing in the tensor names); peft 0.21 left out
    all tensors with `_orig_mod.` in their names (measured).
    """
    saved, found = run_facts.saved, lora_layers(run_facts)
    if saved is not None and (wrapped := _wrapped(run_facts)) is not None:
        return [wrapped]
    if saved is None or not found:
        return []
    fix, signals = "give the tensors PEFT's names, or load them with PeftModel.from_pretrained on their own base", []
    modules = linears(run_facts)
    paths = {path: path.removeprefix(_ROOT) for path in found}
    if modules is not None and (lost := [path for path, name in paths.items() if not _has(modules, path, name)]):
        if all(path.rpartition(".")[2] in ("embed_tokens", "wte", "lm_head") for path in lost):
            lost = []
        if lost:
            says = f"{len(lost)} of {len(paths)} names in the adapter file are not modules of the model: {lost[0]}"
            weight = 0.9 if len(lost) == len(paths) else 0.7
            signals.append(
                Signal("F78", "invariant", says, weight, {"unmatched": len(lost), "of": len(paths)}, fix=fix)
            )
    elif bare := [path for path in paths if not path.startswith(_ROOT)]:
        says = f"{len(bare)} of {len(paths)} names in the adapter file do not begin with {_ROOT}: {bare[0]}"
        signals.append(Signal("F78", "invariant", says, 0.85, {"unmatched": len(bare), "of": len(paths)}, fix=fix))
    named = [name for name in saved.adapter if re.search(r"\.lora_[AB]\.(?!weight$)\w+\.weight$", name)]
    if named and not is_ours(run_facts):
        says = f"names in the adapter file contain the adapter's name, which PEFT adds a second time: {named[0]}"
        signals.append(Signal("F78", "invariant", says, 0.8, {"named": len(named)}, fix=fix))
    if unlike := _misfits(run_facts, paths):
        path, has, wants = unlike
        says = f"{path} in the adapter file maps {has[0]} to {has[1]} numbers, but the model's {wants[0]} to {wants[1]}"
        signals.append(Signal("F78", "invariant", says, 0.9, {"module": path}, fix=fix))
    signals += _other_base(run_facts)
    return signals


def _wrapped(run_facts: RunFacts) -> Signal | None:
    """F78 of names that a wrapper changed; None if the model has modules of these names, or if they are not known."""
    names = list(run_facts.saved.adapter) if run_facts.saved else []
    inner = [re.split(r"\.lora_|\.weight$", name)[0].removeprefix(_ROOT) for name in names]
    modules = linears(run_facts) or {}
    shown = {name: match[1] or match[2] for name, path in zip(names, inner, strict=True)
             if (match := _WRAPPERS.search(name)) and path not in modules}  # fmt: skip
    if not shown:
        return None
    name, wrapper = next(iter(shown.items()))
    says = f"{len(shown)} of {len(names)} names in the adapter file have the `{wrapper}.` of a wrapper: {name}"
    fix = f"remove `{wrapper}.` from the tensor names, and save the unwrapped model (accelerator.unwrap_model)"
    weight = 0.9 if len(shown) == len(names) else 0.8
    return Signal("F78", "invariant", says, weight, {"wrapped": len(shown), "of": len(names)}, fix=fix)


def _has(modules: Mapping[str, Any], path: str, name: str) -> bool:
    """Whether the model has this module; for the text model inside a model for images, whose names are longer."""
    return name in modules or (path.startswith(_ROOT) and "language_model." in name)


def _misfits(run_facts: RunFacts, paths: dict[str, str]) -> tuple[str, tuple[int, int], tuple[int, int]] | None:
    modules, found = linears(run_facts) or {}, lora_layers(run_facts)
    for path, name in paths.items():
        parts = found[path]
        if name in modules and {"A", "B"} <= parts.keys() and parts["A"].dim() == 2:
            has = (int(parts["A"].shape[1]), int(parts["B"].shape[0]))
            if has != modules[name]:
                return path, has, modules[name]
    return None


def _other_base(run_facts: RunFacts) -> list[Signal]:
    saved = run_facts.saved
    trained, loaded = (
        saved and saved.adapter_config.get("base_model_name_or_path"),
        run_facts.settings.get("serving_base"),
    )
    loaded = loaded or run_facts.settings.get("model_name_or_path")
    if not trained or not loaded or is_ours(run_facts):
        return []
    names = [PurePath(str(name)).name.lower() for name in (trained, loaded)]
    revision = [saved.adapter_config.get("revision") if saved else None, run_facts.settings.get("model_revision")]
    if names[0] == names[1] and (None in revision or revision[0] == revision[1]):
        return []
    if names[0] == names[1]:
        says = f"the adapter was trained on revision {revision[0]} of the base, but {revision[1]} is loaded"
    else:
        says = f"the adapter was trained on {trained}, but the loaded base is {loaded}"
    fix = f"load the adapter on {trained}"
    return [Signal("F78", "remark", says, 0.4, {"trained": str(trained), "loaded": str(loaded)}, fix=fix)]


def served_scale(run_facts: RunFacts) -> float | None:
    """The adapter's scale by its own config file, which serving reads."""
    config = run_facts.saved.adapter_config if run_facts.saved else {}
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if not isinstance(alpha, (int, float)) or not isinstance(rank, int) or not rank:
        return None
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


@rule("F61", needs=("settings", "saved"))
def saved_with_another_scale(run_facts: RunFacts) -> Signal | None:
    """F61, from the saved adapter: its config has a different scale or rank than the run."""
    alpha, rank = setting(run_facts, "lora_alpha"), setting(run_facts, "lora_r")
    served = served_scale(run_facts)
    if not alpha or not rank or served is None:
        return None
    trained = alpha / (rank**0.5 if run_facts.settings.get("use_rslora") else rank)
    if abs(served / trained - 1) < 0.01:
        return None
    says = f"the adapter was trained with scale {trained:.3g}, but adapter_config.json gives {served:.3g}"
    fix = f"set lora_alpha to {alpha:g} and r to {rank:g} in adapter_config.json"
    return Signal("F61", "invariant", says, 0.9, {"trained": trained, "served": served}, fix=fix)
