"""S10, quantization of the base: F49 to F52."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import in_4bit, is_ours, mapping, quantization
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

if TYPE_CHECKING:
    import torch

_LEVELS = 17
"""Distinct values of 64 weights in 4 bits, plus one for a zero made by rounding."""
_SET_IT = ("unsloth", "llama-factory", "llamafactory", "axolotl", "ms-swift", "swift", "trl")
"""Tools that give 4-bit layers the dtype of the training."""


def quantises(run_facts: RunFacts) -> bool:
    """Whether a quantized base is requested, by any of the settings for it."""
    get = run_facts.settings.get
    return in_4bit(run_facts) or get("load_in_8bit") is True or bool(get("quantization_config"))


@rule("F49", needs=("settings", "model_config"))
def quantised_twice(run_facts: RunFacts) -> Signal | None:
    """F49: a checkpoint that is already quantized is quantized again.

    Sees: `quantization_config` in the checkpoint's config.json, and another quantization in the settings.
    Why: loading fails with an AttributeError, or one of the two is silently ignored and the run does not match its
    config.
    Not: F51, where no quantization takes effect; a bitsandbytes checkpoint loaded in the same number of bits, where the
    setting changes nothing.
    Fix: use the 16-bit checkpoint, or do not quantize again.
    Wrong when: the loader dequantizes the checkpoint first.
    Source: Qwen3-VL#888, unsloth#6087.
    """
    has = mapping(run_facts.model_config.get("quantization_config"))
    if not has or not quantises(run_facts):
        return None
    method = str(has.get("quant_method") or ("bitsandbytes" if has.get("load_in_4bit") else "unknown")).lower()
    if method == "bitsandbytes" and bool(has.get("load_in_4bit")) == in_4bit(run_facts):
        return None
    says = f"the checkpoint is already quantized ({method}), and the settings quantize it again"
    fix = "use the 16-bit checkpoint of this model, or remove load_in_4bit"
    return Signal("F49", "invariant", says, 0.9, {"method": method}, fix=fix)


@rule("F50", needs=("settings",))
def computes_in_float32(run_facts: RunFacts) -> Signal | None:
    """F50: 4-bit layers compute in float32.

    Sees: a 4-bit base whose `bnb_4bit_compute_dtype` is float32, in a run that otherwise computes in 16 bits; or not
    set, where the script makes the quantization itself (transformers' default is float32). If neither the precision nor
    the tool is known, it is a remark.
    Why: every matmul of the base runs in float32, several times slower, without a message.
    Not: F73, which is slow only for new lengths; a run in float32 on purpose (`bf16: false`); solotune, where the
    compute dtype follows `bf16`.
    Fix: `bnb_4bit_compute_dtype: bfloat16`.
    Wrong when: a wrapper sets it (Unsloth, LLaMA-Factory, Axolotl and ms-swift do).
    Source: bitsandbytes#2077; h2ogpt#682 (5 to 16 tokens/s).
    """
    get = run_facts.settings.get
    dtype = quantization(run_facts, "bnb_4bit_compute_dtype")
    is_wide = dtype is None or str(dtype).rpartition(".")[2] in ("float32", "fp32", "float")
    if is_ours(run_facts) or not in_4bit(run_facts) or not is_wide or (dtype is None and get("tool") in _SET_IT):
        return None
    in_16 = get("bf16") is True or get("fp16") is True
    if not in_16 and (get("bf16") is False or get("fp16") is False):
        return None
    says = f"bnb_4bit_compute_dtype is {'not set, which means float32' if dtype is None else dtype}"
    kind, weight = ("invariant", 0.85) if in_16 else ("remark", 0.3)
    return Signal("F50", kind, says, weight, {"dtype": str(dtype)}, fix="bnb_4bit_compute_dtype: bfloat16")


@rule("F51", needs=("settings",))
def not_quantised(run_facts: RunFacts) -> Signal | None:
    """F51: the base should be quantized, but is not.

    Sees: a setting for 4 or 8 bits that did not take effect; or no quantized module in the model.
    Why: the run is plain LoRA with four times the memory, or runs out of memory while loading.
    Not: F71, whose memory is activations; F49, where the checkpoint is already quantized; solotune on a CPU, which
    quantizes too.
    Fix: pass `quantization_config` where the model is loaded, not to the trainer of a loaded model.
    Wrong when: the quantized modules come from a library that this rule does not know.
    Source: trl only prints a warning if the model is already loaded.
    """
    asked, held = run_facts.settings.asked, run_facts.settings.values
    fix = "from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...))"
    for key in ("load_in_4bit", "load_in_8bit", "quantization_config"):
        if asked.get(key) and key in held and not held[key]:
            return Signal("F51", "invariant", f"{key} is set, but did not take effect", 0.9, {"key": key}, fix=fix)
    if quantises(run_facts) and held.get("num_quantised_modules") == 0:
        return Signal("F51", "invariant", "no module of the model is quantized", 0.95, {"quantised": 0}, fix=fix)
    return None


@rule("F51", needs=("settings", "live"))
def none_is_quantised(run_facts: RunFacts) -> Signal | None:
    """F51, from the loaded model: 4 bits are requested, and no parameter is packed or was (few different values)."""
    if is_ours(run_facts) or not quantises(run_facts) or run_facts.live is None:
        return None
    model = run_facts.live().model
    if any(_is_quantised(module) or _has_few_values(module) for module in model.modules()):
        return None
    fix = "from_pretrained(..., quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...))"
    return Signal("F51", "invariant", "no module of the loaded model is quantized", 0.9, {"quantised": 0}, fix=fix)


def _is_quantised(module: Any) -> bool:
    kinds = {type(module).__name__.lower(), type(getattr(module, "weight", None)).__name__.lower()}
    named = ("4bit", "8bit", "nf4", "int8", "gptq", "awq", "quant", "hqq", "fp8", "bnb")
    return any(part in kind for kind in kinds for part in named) or hasattr(module, "quant_state")


@rule("F52", needs=("settings",))
def head_left_unprotected(run_facts: RunFacts) -> Signal | None:
    """F52: the output head, or a router, is quantized too.

    Sees: `llm_int8_skip_modules` without the head, which replaces the default that leaves the head out; a head whose
    weights have only a few distinct values.
    Why: the head chooses between tens of thousands of tokens by small differences. Rounding to 4 bits removes them, so
    the loss of the base itself is worse before any training.
    Not: F59, where the loss is good with the adapter off.
    Fix: in transformers, add `lm_head` to `llm_int8_skip_modules`.
    Wrong when: the head is tied to an embedding that is not quantized.
    Source: transformers#45674, axolotl#3953.
    """
    skipped = quantization(run_facts, "llm_int8_skip_modules")
    if not skipped or not quantises(run_facts) or run_facts.model_config.get("tie_word_embeddings") is True:
        return None
    names = [skipped] if isinstance(skipped, str) else list(map(str, skipped))
    if any("lm_head" in name or "embed_out" in name or "output" in name for name in names):
        return None
    says = f"llm_int8_skip_modules is {names}, which replaces the default that leaves out lm_head"
    fix = f"llm_int8_skip_modules: [{', '.join([*names, 'lm_head'])}]"
    return Signal("F52", "invariant", says, 0.85, {"skipped": names}, fix=fix)


@rule("F52", needs=("live",))
def head_has_few_values(run_facts: RunFacts) -> Signal | None:
    """F52, from the loaded model: 64 neighbouring weights of the head have no more values than 4 bits allow."""
    model = run_facts.live().model if run_facts.live is not None else None
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if weight is None:
        return None
    fix = "llm_int8_skip_modules: [lm_head]"
    if _is_quantised(head):
        return Signal("F52", "invariant", f"the output head is a {type(head).__name__}", 0.95, {}, fix=fix)
    if weight.dim() != 2 or weight.shape[1] < 64 or not weight.dtype.is_floating_point:
        return None
    values = _different_values(weight)
    if values is None or values > _LEVELS:
        return None
    says = f"64 neighbouring weights of the head have only {values} different values"
    return Signal("F52", "invariant", says, 0.9, {"values": values}, fix=fix)


def _has_few_values(module: Any) -> bool:
    """Whether the weights of a linear layer are floats that were packed: quantized before, or by a simulation."""
    import torch

    weight = getattr(module, "weight", None)
    if not isinstance(module, torch.nn.Linear) or weight is None or weight.shape[1] < 64:
        return False
    values = _different_values(weight) if weight.dtype.is_floating_point else None
    return values is not None and values <= _LEVELS


def _different_values(weight: torch.Tensor) -> int | None:
    """Number of different values among 64 neighbours, the median of some rows; None if all are zero."""
    import torch

    rows = weight.detach()[:: max(1, weight.shape[0] // 64), :64].float().cpu()
    counts = sorted(int(torch.unique(row).numel()) for row in rows if row.any())
    return counts[len(counts) // 2] if counts else None
