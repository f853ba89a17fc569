"""S1, environment and library versions: F01 to F03."""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

from solotune.config.key_aliases import FOREIGN_KEYS
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import has_error, in_4bit, is_lora, is_ours, number, setting
from solotune.diagnosis.facts.library_defaults import default_exists, is_default
from solotune.diagnosis.facts.texts import Batches
from solotune.diagnosis.rules import rule, signals_of_rows
from solotune.diagnosis.run_facts import RunFacts

_OWN_RULES = {"load_in_4bit", "load_in_8bit", "quantization_config", "base_precision"}
"""Settings with their own rule: F51."""
_SAME_WORD = {
    "max_seq_length", "max_seq_len", "sequence_len", "cutoff_len", "lr", "epochs", "num_epochs", "batch_size",
    "micro_batch_size", "train_batch_size", "grad_accum", "gradient_clipping", "lora_rank", "rank", "r", "alpha",
    "lora_target", "target_modules", "lr_scheduler", "optimizer", "evaluation_strategy", "activation_checkpointing",
}  # fmt: skip
"""Names in other tools for settings with the same values; `train_on_inputs`, for example, is the opposite of one."""
_FORMER = {
    "max_length": r"(max_|model_)*(seq|sequence|context|ctx|input|source|text)_?(max_)?(len|length|size)|max_len"
    r"|model_max_length|block_size|max_seqlen",
    "learning_rate": r"(init|initial|base|peak)?_?(lr|learning_?rate)",
    "per_device_train_batch_size": r"(per_(device|gpu)_)?(train_)?(micro_)?batch_size(_per_(device|gpu))?",
    "gradient_accumulation_steps": r"(grad|gradient)s?_?(acc|accum|accumulation)(_steps|_iters)?|accumulation(_steps)?"
    r"|accumulate_grad_batches",
    "max_grad_norm": r"(grad|gradient)_?clip(ping)?(_val|_value|_norm)?|clip(_grad|_gradient)?(_norm|_value)?|max_norm",
    "num_train_epochs": r"(n|nb|num|max|train)?_?(train_|training_)?epochs?",
    "lr_scheduler_type": r"(lr_)?sched(uler|ule)?(_type|_name)?",
    "warmup_ratio": r"warmup_(proportion|fraction|share)",
    "warmup_steps": r"(n|num)?_?warmup(_steps?|_iters)?",
    "max_steps": r"(n|num|total|max|train)_(train_|training_)?(steps|iters)",
    "weight_decay": r"wd|weight_?decay|l2(_reg)?",
    "optim": r"optim(izer)?(_type|_name|_class)?",
    "lora_r": r"(lora_)?(r|rank)",
    "lora_alpha": r"(lora_)?alpha",
    "gradient_checkpointing": r"(use_)?(grad|gradient|activation)_?checkpoint(ing|s)?",
    "neftune_noise_alpha": r"neftune(_alpha|_noise)?|noise_alpha",
    "label_smoothing_factor": r"label_smoothing",
}
"""Setting of transformers, TRL and PEFT -> its names in earlier versions, in scripts and in other libraries."""
BESIDE = 2
"""Tokens that a tool adds after truncation: the begin and the end of a text."""
NO_LABEL, SOME_STEPS = 0.95, 10
"""Share of the rows without a label from which nearly every batch has none, and losses that contradict it."""
_OTHER_CUTS = ("cutoff_len", "sequence_len")
"""Lengths of LLaMA-Factory, which shortens prompt and answer in proportion, and of Axolotl, which drops long rows."""
_ALIKE = 0.9
"""Likeness of a misspelt name (`max_lenght`, `learning_rates`) to the setting's own."""


@rule("F01")
def binary_mismatch(run_facts: RunFacts) -> Signal | None:
    """F01: bitsandbytes has no binary for the CUDA version of this torch.

    Sees: the errors that say so; BNB_CUDA_VERSION set to another CUDA version than torch was built for, in a 4-bit run
    that took no step (else a remark). `solotune doctor`, and every run of solotune before it starts, computes one 4-bit
    matrix as a test.
    Why: loading crashes, or, in old versions, the CPU is used silently.
    Not: F50, where loading and computing work, but slowly.
    Fix: install a bitsandbytes version that fits this torch, and unset BNB_CUDA_VERSION.
    Wrong when: BNB_CUDA_VERSION names a binary that was compiled by hand. Control: a run that took steps loaded it.
    Source: bitsandbytes#1559, #1614.
    """
    fix = "pip install --upgrade bitsandbytes, and unset BNB_CUDA_VERSION"
    line = has_error(
        run_facts,
        r"CUDA Setup failed|libbitsandbytes.*(not found|cannot|No such|undefined)",
        r"bitsandbytes.*(not compiled|no kernel|without GPU support|binary)",
        r"no kernel image is available|undefined symbol.*(cquantize|cdequantize|cgemm)|cextension",
    )
    if line is not None:
        return Signal("F01", "invariant", f"the log says: {line}", 0.9, {}, fix=fix)
    environment = run_facts.environment
    failed = environment.get("bitsandbytes_error")
    if failed:
        return Signal("F01", "invariant", f"4-bit layers do not work on this machine: {failed}", 0.95, {}, fix=fix)
    override = str(environment.get("BNB_CUDA_VERSION") or "")
    runtime = re.sub(r"\D", "", str(environment.get("cuda_runtime") or ""))
    if not override or not runtime or re.sub(r"\D", "", override)[:3] == runtime[:3]:
        return None
    says = f"BNB_CUDA_VERSION is {override}, but torch is built for CUDA {environment['cuda_runtime']}"
    took_steps = run_facts.trace is not None and len(run_facts.trace.step_S) > 0
    kind, weight = ("measured", 0.75) if in_4bit(run_facts) and not took_steps else ("remark", 0.3)
    return Signal("F01", kind, says, weight, {"override": override}, fix=fix)


@rule("F02")
def renamed_argument(run_facts: RunFacts) -> Signal | None:
    """F02: a setting has a name that this version does not read, so the default was used instead.

    Sees: a setting written under another name than the installed version's (also misspelt), and the library's default
    in use; the TypeError for an unexpected argument; a length under another name, and batches with longer rows, or
    finite losses where that length would leave no label. Another value in use that is no default is a remark: it was
    set later (on the command line, by the script).
    Why: a wrapper that filters unknown keys drops the setting silently: the config says `max_seq_length: 256`, and 1024
    is used.
    Not: F03, where nothing was written; F25, whose max_length is the intended one; F51, for quantization; another name
    for the same value (`constant` and `constant_with_warmup`, `adamw_torch` and `adamw_torch_fused`).
    Fix: use the name of the installed version.
    Wrong when: the value was changed later on purpose.
    Source: trl#6168, dspy#8762 (`max_seq_length` is `max_length` now, `tokenizer` is `processing_class`).
    """
    if line := has_error(run_facts, r"unexpected keyword argument", r"got an unexpected argument"):
        fix = "use the argument's name in the installed version"
        return Signal("F02", "invariant", f"the run ended with this error: {line}", 0.9, {}, fix=fix)
    remark: Signal | None = None
    for key, wrote in run_facts.settings.asked.items():
        ours = _meant(run_facts, key)
        if ours is None or ours in _OWN_RULES or key in _OWN_RULES or not differs(run_facts, ours, wrote):
            continue
        is_dropped = is_default(ours, run_facts.settings.get(ours)) and not _is_global_batch(run_facts, key, wrote)
        if key == ours and is_dropped:
            continue  # F03: the name is right, so the value never reached the trainer
        says = f"{key}: {wrote} is in the config, but the run used {ours}: {run_facts.settings.get(ours)}"
        numbers = {"key": key, "wrote": wrote, "held": run_facts.settings.get(ours)}
        if not is_dropped:
            remark = remark or Signal("F02", "remark", says, 0.3, numbers, fix=f"{ours}: {wrote}")
            continue
        return Signal("F02", "invariant", says, 0.9, numbers, fix=f"{ours}: {wrote}")
    return remark


@rule("F02", needs=("settings",), otherwise=True, unless=is_ours)
def length_not_applied(run_facts: RunFacts) -> Signal | None:
    """F02, from what was trained on: rows longer than a length that is written under another name, or losses that rows
    of that length cannot have."""
    written = {**run_facts.settings.values, **run_facts.settings.asked}
    lengths = {key: number(value) for key, value in written.items() if key != "max_length"
               and (_former(key) or FOREIGN_KEYS.get(key)) == "max_length"}  # fmt: skip
    key = next((key for key, limit in lengths.items() if limit), None)
    if key is None or not (limit := lengths[key]):
        return None
    numbers, fix = {"key": key, "wrote": limit}, f"max_length: {limit:g}"
    sizes = [len(document.ids) for document in Batches.of(run_facts).documents]
    longer = sum(size > limit + BESIDE for size in sizes)
    if longer and setting(run_facts, "max_length") in (None, limit):
        says = f"{key}: {limit:g} is in the config, but {longer} of {len(sizes)} rows in the batches are longer"
        return Signal("F02", "invariant", says, 0.9, numbers, fix=fix, affected=longer / len(sizes))
    if sizes or "max_length" in run_facts.settings.asked or key in _OTHER_CUTS:
        return None
    refused = [1.0 for signal in run_facts.refusals if signal.code == "F25"]  # none of the rows can be used
    lost = max([*refused, *(signal.affected or 0.0 for signal in signals_of_rows(run_facts, "F25"))], default=0.0)
    losses = run_facts.trace.loss_S if run_facts.trace is not None else ()
    if lost < NO_LABEL or len(losses) < SOME_STEPS or not all(math.isfinite(loss) and loss > 0 for loss in losses):
        return None
    says = f"{key}: {limit:g} is in the config and leaves nothing to train on in {lost:.0%} of the rows, but all "
    says += f"{len(losses)} logged losses are finite and above zero"
    return Signal("F02", "invariant", says, 0.9, numbers, fix=f"{fix}, if it is meant", affected=lost)


def _meant(run_facts: RunFacts, key: str) -> str | None:
    """The setting that a written name means; None if it is another one, or has another unit."""
    if key in FOREIGN_KEYS and key in _SAME_WORD:
        return FOREIGN_KEYS[key]
    if key in run_facts.settings.values:
        return key
    if (former := _former(key)) is not None:
        return former
    if key in FOREIGN_KEYS:
        return None
    known = [
        name for name in run_facts.settings.values if default_exists(name) and name not in run_facts.settings.asked
    ]
    return next(iter(difflib.get_close_matches(key, known, n=1, cutoff=_ALIKE)), key)


def _former(key: str) -> str | None:
    """The setting that has, or had, this name elsewhere."""
    word = key.lower().replace("-", "_")
    return next((name for name, others in _FORMER.items() if re.fullmatch(others, word) and name != word), None)


def _is_global_batch(run_facts: RunFacts, key: str, wrote: Any) -> bool:
    """Whether this may be the batch of a whole step: a multiple of the rows of a device."""
    whole, part = number(wrote), number(run_facts.settings.get("per_device_train_batch_size"))
    return key in ("batch_size", "train_batch_size") and bool(whole) and bool(part) and (whole or 0) % (part or 1) == 0


def differs(run_facts: RunFacts, key: str, wrote: Any) -> bool:
    """Whether the value in use differs from the written one; False if either is unknown or they cannot be compared."""
    if key not in run_facts.settings.values or run_facts.settings.get(key) is None or wrote is None:
        return False
    held = run_facts.settings.get(key)
    if isinstance(wrote, bool) or isinstance(held, bool):
        return isinstance(wrote, bool) and isinstance(held, bool) and wrote != held
    numbers = number(wrote), number(held)
    if None not in numbers:
        return numbers[0] != numbers[1]
    if isinstance(wrote, (list, tuple)) and isinstance(held, (list, tuple)):
        return sorted(map(str, wrote)) != sorted(map(str, held))
    if type(wrote) is not type(held):
        return False
    return not _same_word(str(wrote).rpartition(".")[2], str(held).rpartition(".")[2])


def _same_word(one: str, other: str) -> bool:
    """Whether two words name one value: equal, or one with more said after it (`constant_with_warmup`)."""
    short, long = sorted((one.lower().replace("-", "_"), other.lower().replace("-", "_")), key=len)
    return short == long or long.startswith(f"{short}_")


@rule("F03")
def changed_default(run_facts: RunFacts) -> list[Signal]:
    """F03: a setting was left out, and this version's default is not the one that the recipe assumes.

    Sees: a value in use that is a library's default and differs from the intended one. If the intention is unknown, a
    learning rate of 5e-5 or below that the user did not set is a remark: the range test or the curve show whether it is
    too low (F64).
    Why: defaults of trl and transformers differ (learning rate, checkpointing, dtype, logging), and versions differ
    too. The run needs more memory and learns more slowly than the tutorial promises.
    Not: F64, whose value the user wrote; F02, whose value was written under another name.
    Fix: set every value that matters: `learning_rate`, `bf16`, `gradient_checkpointing`, `max_length`.
    Wrong when: the default is the intended value.
    Source: trl#5138, where several proposed explanations were only seed noise of one point.
    """
    if is_ours(run_facts):
        return []
    signals = []
    for key, wrote in run_facts.settings.asked.items():
        if key in _OWN_RULES or (key in FOREIGN_KEYS and key not in ("dtype", "torch_dtype")):
            continue
        ours = "model_dtype" if key in ("dtype", "torch_dtype") else key
        held = run_facts.settings.get(ours)
        if differs(run_facts, ours, wrote) and is_default(ours, held):
            says = f"{ours}: {wrote} was intended, but the run used the library's default {held}"
            signals.append(Signal("F03", "invariant", says, 0.85, {"key": ours, "held": held}, fix=f"{ours}: {wrote}"))
    sources = run_facts.settings.sources
    if not signals and str(sources.get("learning_rate", "")).startswith("default") and is_lora(run_facts):
        rate = number(run_facts.settings.get("learning_rate"))
        if rate is not None and rate <= 5e-5:
            says = (
                f"learning_rate is not set, so the run used the library's default {rate:g}, made for full fine-tuning"
            )
            signals.append(Signal("F03", "remark", says, 0.3, {"learning_rate": rate}, fix="learning_rate: 2e-4"))
    return signals
