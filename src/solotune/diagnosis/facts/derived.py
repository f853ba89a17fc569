"""Numbers derived from settings, trace and config.json: steps, scales, bytes, modules; None if they are not known.

planned_steps(run_facts)  warmup_steps(run_facts)  scale(run_facts)  activation_bytes(run_facts, ...)
linears(run_facts)
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from solotune.dataset.example import lengths_of
from solotune.diagnosis.run_facts import RunFacts
from solotune.hub.hf_config import refuse_code
from solotune.planning import memory
from solotune.planning.layer_profile import BaseWeights, Linear, MemoryStrategy

SCALE_FREE = ("adam", "lion", "lamb", "adafactor", "rmsprop", "adagrad", "sophia", "muon", "apollo", "galore")
"""Name parts of optimizers whose step does not depend on the gradient's scale, so that clipping hardly matters."""

BY_DESIGN = ("pissa", "olora", "loftq", "eva", "corda", "lora_ga", "orthogonal", "mica")
"""Prefixes of `init_lora_weights` values that start with a nonzero adapter."""
HEADS = ("lm_head", "embed_out", "output", "output_layer")
"""Names of output heads."""
_FULL = re.compile(
    r"out of memory|OutOfMemory|CUBLAS_STATUS_ALLOC_FAILED|can't allocate memory|not enough memory", re.IGNORECASE
)


def number(value: Any) -> float | None:
    """A value as a number, also if a YAML file has it as a string (`2e-4`); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        found = float(value)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def setting(run_facts: RunFacts, key: str) -> float | None:
    """A setting as a number."""
    return number(run_facts.settings.get(key))


def initialisation(run_facts: RunFacts) -> Any:
    """`init_lora_weights` of the settings, else of the saved adapter; None if neither has it."""
    found = run_facts.settings.get("init_lora_weights")
    return run_facts.saved.adapter_config.get("init_lora_weights") if found is None and run_facts.saved else found


def begins_by_design(run_facts: RunFacts) -> bool:
    """Whether the initialization makes a nonzero adapter by design and changes the base accordingly."""
    return str(initialisation(run_facts)).lower().startswith(BY_DESIGN)


def planned_steps(run_facts: RunFacts) -> int | None:
    """Optimizer steps of the whole run: as recorded, as set, or from epochs and rows."""
    if run_facts.trace is not None and run_facts.trace.total_steps:
        return run_facts.trace.total_steps
    steps = setting(run_facts, "max_steps")
    if steps is not None and steps > 0:
        return int(steps)
    return steps_of_epochs(run_facts)


def steps_of_epochs(run_facts: RunFacts) -> int | None:
    """Optimizer steps of all epochs, from the number of rows."""
    epochs, one = setting(run_facts, "num_train_epochs"), steps_of_an_epoch(run_facts)
    return math.ceil(epochs * one) if epochs and one else None


def steps_of_an_epoch(run_facts: RunFacts) -> int | None:
    """Optimizer steps of one epoch, from the number of rows."""
    rows = len(run_facts.train) or setting(run_facts, "train_rows")
    batch = setting(run_facts, "per_device_train_batch_size")
    if not rows or not batch or run_facts.settings.get("packing"):
        return None
    return math.ceil(rows / (batch * (setting(run_facts, "gradient_accumulation_steps") or 1) * world_size(run_facts)))


def world_size(run_facts: RunFacts) -> int:
    """Ranks (processes, each on its own GPU) of the run; 1 if nothing says that there were several."""
    seen = run_facts.ranks.world_size if run_facts.ranks is not None else 1
    return max(int(setting(run_facts, "world_size") or 1), seen)


def warmup_steps(run_facts: RunFacts) -> float | None:
    """Warmup steps: from `warmup_steps` (below 1 a fraction, as in transformers 5) or `warmup_ratio`."""
    total, steps, ratio = (
        planned_steps(run_facts),
        setting(run_facts, "warmup_steps"),
        setting(run_facts, "warmup_ratio"),
    )
    if steps is not None and steps >= 1:
        return steps
    share = steps or ratio
    return math.ceil(share * total) if share and total else 0.0 if share == 0 else None


def scale(run_facts: RunFacts) -> float | None:
    """The factor of B A x: alpha / r, or with rslora alpha / sqrt(r)."""
    alpha, rank = setting(run_facts, "lora_alpha"), setting(run_facts, "lora_r")
    if not alpha or not rank:
        return None
    return alpha / (math.sqrt(rank) if run_facts.settings.get("use_rslora") else rank)


def is_lora(run_facts: RunFacts) -> bool:
    """Whether the run trains LoRA adapters, as far as is known."""
    return setting(run_facts, "lora_r") is not None or (
        run_facts.saved is not None and bool(run_facts.saved.adapter_config)
    )


def is_scale_free(run_facts: RunFacts) -> bool:
    """Whether the optimizer normalizes the gradient's scale; True if its name is not known."""
    name = str(run_facts.settings.get("optim") or "adamw").lower()
    return any(part in name for part in SCALE_FREE)


def is_ours(run_facts: RunFacts) -> bool:
    """Whether solotune ran it; then faults that its training loop prevents are impossible."""
    return run_facts.settings.get("tool") == "solotune"


def in_4bit(run_facts: RunFacts) -> bool:
    """Whether the settings ask for a 4-bit base."""
    return quantization(run_facts, "load_in_4bit") is True or run_facts.settings.get("base_precision") == "nf4"


def quantization(run_facts: RunFacts, key: str) -> Any:
    """A setting of bitsandbytes: of its own, or in `quantization_config` (a mapping, or transformers' object)."""
    value, config = run_facts.settings.get(key), run_facts.settings.get("quantization_config")
    if value is not None:
        return value
    return config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)


def has_error(run_facts: RunFacts, *patterns: str) -> str | None:
    """The first log line that matches one of the patterns; None if there is none."""
    for text in run_facts.trace.errors if run_facts.trace else ():
        for line in text.splitlines() or [text]:
            if any(re.search(pattern, line, re.IGNORECASE) for pattern in patterns):
                return line.strip()[:200]
    return None


def out_of_memory(run_facts: RunFacts) -> str | None:
    """The whole text of an out-of-memory error, with its traceback; None if there is none."""
    for text in run_facts.trace.errors if run_facts.trace else ():
        if _FULL.search(text):
            return text
    return None


# --- tokens and bytes


def row_lengths(run_facts: RunFacts) -> np.ndarray:
    """int64 (R,): tokens of each training row."""
    return np.asarray(lengths_of(run_facts.train), dtype=np.int64)


def shape_of(run_facts: RunFacts) -> dict[str, int] | None:
    """hidden, layers, intermediate and vocabulary sizes of the base from config.json, under any usual name."""
    found = run_facts.model_config.get("text_config") or run_facts.model_config
    names = {
        "hidden": ("hidden_size", "n_embd", "d_model"),
        "layers": ("num_hidden_layers", "n_layer", "num_layers"),
        "intermediate": ("intermediate_size", "n_inner", "ffn_dim"),
        "vocabulary": ("vocab_size",),
    }
    shape = {what: next((found[k] for k in keys if isinstance(found.get(k), int)), 0) for what, keys in names.items()}
    shape["intermediate"] = shape["intermediate"] or 4 * shape["hidden"]
    return shape if all(shape.values()) else None


def logits_bytes(run_facts: RunFacts, tokens: float) -> float | None:
    """Bytes of the logits of a micro-batch in float32, with gradient and one copy, without a fused loss."""
    shape = shape_of(run_facts)
    return None if shape is None else 3 * 4.0 * tokens * shape["vocabulary"]


def activation_bytes(run_facts: RunFacts, tokens: float, checkpointing: bool) -> float | None:
    """Bytes that layers keep for backward; with checkpointing one state per layer, and all of one recomputed layer."""
    shape = shape_of(run_facts)
    if shape is None:
        return None
    whole = 2.0 * tokens * (10 * shape["hidden"] + 4 * shape["intermediate"])
    return whole + 2.0 * tokens * shape["hidden"] * shape["layers"] if checkpointing else whole * shape["layers"]


def weight_bytes(run_facts: RunFacts) -> int | None:
    """Bytes of the frozen base as stored, computed as the plan does from the modules of config.json."""
    modules, get = _modules_of(run_facts), run_facts.settings.get
    if modules is None:
        return None
    is_wide = str(get("model_dtype")) == "float32" or (is_ours(run_facts) and get("bf16") is False)
    named = "fp32" if is_wide else "bf16"
    if is_ours(run_facts) and get("base_precision") in ("fp8", "bf16", "fp32"):
        named = get("base_precision")
    knobs = MemoryStrategy(
        base_precision="nf4" if in_4bit(run_facts) else named,
        is_double_quantised=bool(get("bnb_4bit_use_double_quant")),
        has_dequantized_copy=False,
        num_checkpointed=0,
        is_offloaded=False,
        optim="adamw_torch",
        device="cpu",
    )
    shape = BaseWeights(modules.frozen, modules.other_parameters, 4 if is_wide else 2)
    return memory.weight_bytes(shape, knobs) + memory.quantisation_bytes(shape, knobs)


def micro_batch_tokens(run_facts: RunFacts) -> tuple[float, float] | None:
    """Tokens of (the largest, a typical) micro-batch: rows times the longest row, and times the 95th percentile."""
    rows, limit = setting(run_facts, "per_device_train_batch_size"), setting(run_facts, "max_length")
    lengths = row_lengths(run_facts)
    if not rows or (not len(lengths) and not limit):
        return None
    if not len(lengths) or run_facts.settings.get("packing"):
        return rows * (limit or lengths.max()), rows * (limit or lengths.max())
    return rows * float(lengths.max()), rows * float(np.quantile(lengths, 0.95))


# --- modules of the base


class _Modules(NamedTuple):
    linears: dict[str, tuple[int, int]]
    """Dotted name -> (in, out)"""
    frozen: tuple[Linear, ...]
    """All of them but the output head."""
    other_parameters: int
    """Parameters of all other modules; tied ones counted once."""


@lru_cache(maxsize=4)
def _modules(config: str) -> _Modules | None:
    """Modules of the architecture, built on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    try:
        values = json.loads(config)
        refuse_code(Path("config.json"), values)
        with torch.device("meta"):
            architecture = AutoConfig.for_model(**values)
            model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=False, attn_implementation="eager")
            model.tie_weights()
    except Exception:  # a foreign config.json can raise anything; the modules are then unknown
        return None
    head, linears, frozen, num_frozen = model.get_output_embeddings(), {}, Counter(), 0
    for name, module in model.named_modules():
        if not isinstance(module, (torch.nn.Linear, Conv1D)):
            continue
        inside, outside = module.weight.shape if isinstance(module, Conv1D) else reversed(module.weight.shape)
        linears[name] = (int(inside), int(outside))
        if module is not head:
            frozen[Linear(outside, inside, 1, module.bias is not None, False)] += 1
            num_frozen += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    others = sum(parameter.numel() for parameter in model.parameters()) - num_frozen
    return _Modules(linears, tuple(one._replace(count=count) for one, count in frozen.items()), others)


def _modules_of(run_facts: RunFacts) -> _Modules | None:
    if not run_facts.model_config.get("model_type"):
        return None
    config = {key: value for key, value in run_facts.model_config.items() if key != "quantization_config"}
    return _modules(json.dumps(config, sort_keys=True, default=str))


def linears(run_facts: RunFacts) -> dict[str, tuple[int, int]] | None:
    """Dotted name of each linear layer of the base -> (in, out), from config.json; None if unknown."""
    modules = _modules_of(run_facts)
    return None if modules is None else modules.linears


def targets(run_facts: RunFacts) -> list[str] | str | None:
    """The target modules of the adapters: names, or one string (`all-linear`, a regular expression)."""
    found = run_facts.settings.get("lora_target_modules")
    if found is None and run_facts.saved is not None:
        found = run_facts.saved.adapter_config.get("target_modules")
    return found if isinstance(found, str) else sorted(map(str, found)) if found else None


def lora_layers(run_facts: RunFacts) -> dict[str, dict[str, Any]]:
    """Module path in the adapter file -> its tensors by part (`A`, `B`), as PEFT and similar tools name them."""
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in (run_facts.saved.adapter if run_facts.saved else {}).items():
        if match := re.search(r"^(.*?)\.lora_(?:embedding_)?([AB])(?:\.|$)", name):
            found.setdefault(match[1], {})[match[2]] = tensor
    return found


def is_zero(tensor: Any) -> bool:
    return not bool((tensor != 0).any())


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}
