"""What to write here for a key of another tool: Axolotl, LLaMA-Factory, TRL, Unsloth, transformers, PEFT, ms-swift.

    answer("quantization_bit", 4)      write base_precision: nf4 instead (...)
    answer("train_on_inputs", False)   write assistant_only_loss: true instead (...): the opposite meaning
    answer("max_samples", 1000)        write dataset_split: train[:1000] instead (...)
    answer("plot_loss", True)          remove the line: metrics.jsonl in the run directory has every step; ...
    answer("learning_rte", 1e-4)       did you mean learning_rate? (...)

A key is offered as what was meant only if it is the same setting under another name (`key_aliases`), or the same word
with a typing error (`typo_of`). A key that merely looks alike (`use_peft`, `use_cpu`) is never offered.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from solotune.config.describe import allowed_values, field_help
from solotune.config.key_aliases import FOREIGN_KEYS, NOT_HERE, PATTERNS
from solotune.config.run_config import RunConfig
from solotune.config.write import yaml_value

Written = dict[str, Any] | str | None
"""What to write instead; or why there is nothing to write; None: the line says what holds anyway."""


def answer(key: str, value: Any) -> str:
    """What to do about a key that is none of solotune's; empty if nothing is known about it."""
    if key in CONVERTED:
        return _written(_converted(key, value))
    if key in FOREIGN_KEYS:
        ours = FOREIGN_KEYS[key]
        refused = "" if is_allowed(ours, value) else f"; not with {str(value)[:80]!r}, but with {allowed_values(ours)}"
        return f"did you mean {ours}? ({field_help(ours)}){refused}"
    for names, reason in NOT_HERE.items():
        if key in names.split():
            return f"remove the line: {reason}"
    if (near := typo_of(key)) is not None:
        return f"did you mean {near}? ({field_help(near)})"
    for pattern, reason in PATTERNS.items():
        if re.fullmatch(pattern, key):
            return f"remove the line: {reason}"
    if isinstance(value, Mapping):
        return "a config has no sections; write the keys in it without indentation"
    return ""


def renamed(key: str, value: Any) -> str | None:
    """The line to write for a key that is a setting under another name; None if it is none."""
    ours = None if key in CONVERTED else FOREIGN_KEYS.get(key) or typo_of(key)
    if ours is None:
        return None
    return f"{ours}: {yaml_value(value) if is_allowed(ours, value) else allowed_values(ours)}"


def names_of_dataset_info(values: Mapping[str, Any]) -> str:
    """What to write for the `dataset` of a LLaMA-Factory config, whose names are those of a file that is not read here;
    empty for other configs."""
    names = values.get("dataset")
    is_theirs = len({"stage", "finetuning_type", "cutoff_len", "dataset_dir", "template"} & values.keys()) > 1
    if not is_theirs or not isinstance(names, str) or "/" in names or os.path.lexists(names):
        return ""
    files = ", ".join(f"{name.strip()}.json" for name in names.split(",")[:4])
    return f"{names[:80]!r} are names from dataset_info.json, which solotune does not read; list the files: [{files}]"


def _converted(key: str, value: Any) -> Written:
    found = CONVERTED[key](value)
    for ours, wanted in found.items() if isinstance(found, dict) else ():
        if not is_allowed(ours, wanted):
            return f"{ours} is the setting, and takes {allowed_values(ours)}"
    return found


def is_allowed(key: str, value: Any) -> bool:
    """Whether a key of solotune accepts a value."""
    try:
        RunConfig.model_validate({"model_name_or_path": "m", "dataset": "d", key: value})
    except ValidationError as error:
        return all(detail["loc"] != () and detail["loc"][0] != key for detail in error.errors())
    return True


def typo_of(word: str) -> str | None:
    """The key that was meant by a word with a typing error; None if it may be another word.

    Each part between `_` has to be equal, or nearly: one letter wrong, or two in a part of more than five letters that
    begins alike, and not more than two in all. Digits have to be the same: adam_beta3 is not adam_beta2.
    """
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).lower().replace("-", "_").replace(" ", "_")
    best: tuple[int, str] | None = None
    for key in RunConfig.model_fields:
        if plain.replace("_", "") == key.replace("_", ""):
            return key
        theirs, ours = plain.split("_"), key.split("_")
        if len(theirs) != len(ours) or re.sub(r"\D", "", plain) != re.sub(r"\D", "", key):
            continue
        wrong = [_distance(a, b) for a, b in zip(theirs, ours, strict=True)]
        limits = [2 if len(b) > 5 and a[:1] == b[:1] else 1 for a, b in zip(theirs, ours, strict=True)]
        is_near = sum(wrong) <= 2 and all(n <= limit for n, limit in zip(wrong, limits, strict=True))
        if is_near and (best is None or sum(wrong) < best[0]):
            best = sum(wrong), key
    return best[1] if best else None


def _distance(a: str, b: str) -> int:
    """Letters inserted, removed, changed or exchanged with their neighbour; words that differ much are 9 apart."""
    if abs(len(a) - len(b)) > 2:
        return 9
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(rows[-1][j] + 1, row[j - 1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and (x, a[i - 2]) == (b[j - 2], y):
                cost = min(cost, rows[-2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return rows[-1][-1]


def _written(found: Written) -> str:
    if found is None:
        return "remove the line: solotune always does this"
    if isinstance(found, str):
        return f"remove the line: {found}"
    lines = " and ".join(f"{key}: {yaml_value(value)}" for key, value in found.items())
    return f"write {lines} instead ({field_help(next(iter(found)))})"


# --- keys whose value has another meaning, unit or form here


def _bool(key: str, otherwise: str, opposite: bool = False) -> Callable[[Any], Written]:
    return lambda value: {key: value is not opposite} if isinstance(value, bool) else otherwise


def _only(allowed: tuple[Any, ...], otherwise: str) -> Callable[[Any], Written]:
    """A setting that has one value here."""
    return lambda value: None if value in allowed else otherwise


def _off(otherwise: str) -> Callable[[Any], Written]:
    return _only((False, None, 0, 0.0, "none", "no", ""), otherwise)


_BF16_OR_32 = "solotune trains in bf16 or float32 (bf16: false)"
_EIGHT_BITS = "there is no 8-bit base; use base_precision: nf4 (4 bits), fp8 or bf16"


def _bits(value: Any) -> Written:
    word = str(value).lower()
    if word in ("4", "4bit", "nf4", "bnb_4bit", "bnb-4bit"):
        return {"base_precision": "nf4"}
    return {"base_precision": "bf16"} if word in ("none", "no", "16", "0", "", "false") else _EIGHT_BITS


def _dtype(value: Any) -> Written:
    word = str(value).rpartition(".")[2].lower()
    if word in ("bfloat16", "bf16", "auto"):
        return {"bf16": True}
    return {"bf16": False} if word in ("float32", "fp32", "float") else _BF16_OR_32


def _targets(value: Any) -> Written:
    if value in ("all", "all-linear"):
        return {"lora_target_modules": "all-linear"}
    names = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else []
    names = [name.strip() for name in names if isinstance(name, str) and name.strip()]
    return {"lora_target_modules": names} if names else "lora_target_modules lists the layers, or is all-linear"


def _first_rows(value: Any) -> Written:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return {"dataset_split": f"train[:{value}]"}
    return "all rows of the split are used; a slice of them is dataset_split: train[:1000]"


def _held_out_rows(value: Any) -> Written:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return {"validation_size": value}
    return "validation_size is the number of rows that are held out"


def _paths(key: str) -> Callable[[Any], Written]:
    def convert(value: Any) -> Written:
        listed = value if isinstance(value, list) else [value]
        paths = [one.get("path") if isinstance(one, Mapping) else one for one in listed]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            return f"{key} is a file, a list of files, or a hub id"
        return {key: paths if len(paths) > 1 else paths[0]}

    return convert


_TEMPLATE = "the template of the model folder is used; chat_template_path takes another one, as a Jinja file"


def _template(value: Any) -> Written:
    return {"chat_template_path": value} if isinstance(value, str) and value.endswith((".jinja", ".j2")) else _TEMPLATE


def _overflow(value: Any) -> Written:
    words = {"drop": "drop", "delete": "drop", "truncate": "truncate", "right": "truncate", "raise": "error",
             "error": "error", "split": "split"}  # fmt: skip
    found = words.get(str(value).lower())
    return {"overflow": found} if found else "overflow is truncate (the end), drop, split or error"


def _text_column(value: Any) -> Written:
    if not isinstance(value, str) or value in ("", "text"):
        return None
    return {"column_mapping": {value: "text"}}


def _per_epoch(what: str) -> Callable[[Any], Written]:
    return lambda value: (
        {f"{what}_strategy": "epoch"} if value == 1 else f"{what}_steps is the number of steps between two"
    )


def _attention(value: Any) -> Written:
    word = str(value).lower()
    return {"attn_implementation": "eager"} if word in ("eager", "disabled") else {"attn_implementation": "sdpa"}


def _checkpointing(value: Any) -> Written:
    return {"gradient_checkpointing": value is True or value == "unsloth"}


def _number_of_seed(value: Any) -> Written:
    is_seed = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32
    return {"seed": value} if is_seed else "seed is a whole number"


_ADAPTERS_ONLY = "solotune only trains LoRA adapters"
_PLAIN_LORA = "solotune trains plain LoRA or rsLoRA (use_rslora)"
_SFT_ONLY = "solotune only does supervised fine-tuning (SFT)"
_TRUE_FALSE = "true or false"

CONVERTED: dict[str, Callable[[Any], Written]] = {
    "load_in_4bit": lambda value: {"base_precision": "nf4" if value is True else "bf16"},
    "load_in_8bit": lambda value: None if value is not True else _EIGHT_BITS,
    "quantization": _bits,
    "quantization_bit": _bits,
    "quant_bits": _bits,
    "adapter": lambda value: {"base_precision": "nf4"} if value == "qlora" else {"base_precision": "bf16"}
    if value == "lora" else _ADAPTERS_ONLY,
    "finetuning_type": _only(("lora",), _ADAPTERS_ONLY),
    "full_finetuning": _off(_ADAPTERS_ONLY),
    "use_peft": _only((True,), _ADAPTERS_ONLY),
    "peft_type": _only(("LORA", "lora"), _PLAIN_LORA),
    "task_type": _only(("CAUSAL_LM",), "solotune trains causal language models"),
    "lora_task_type": _only(("CAUSAL_LM",), "solotune trains causal language models"),
    "bias": _only(("none", None), "adapters have no biases here"),
    "lora_bias": _off("adapters have no biases here"),
    "use_dora": _off(_PLAIN_LORA),
    "peft_use_dora": _off(_PLAIN_LORA),
    "peft_use_rslora": _bool("use_rslora", _TRUE_FALSE),
    "init_lora_weights": _only((True, None), _PLAIN_LORA),
    "peft_init_lora_weights": _only((True, None), _PLAIN_LORA),
    "stage": _only(("sft",), _SFT_ONLY),
    "do_train": _only((True,), "solotune data, plan and evaluate do not train"),
    "lora_target": _targets,
    "target_modules": _targets,
    "lora_target_linear": lambda value: {"lora_target_modules": "all-linear"} if value is True else None,
    "train_on_inputs": _bool("assistant_only_loss", _TRUE_FALSE, opposite=True),
    "train_on_prompt": _bool("assistant_only_loss", _TRUE_FALSE, opposite=True),
    "train_on_responses_only": _bool("assistant_only_loss", _TRUE_FALSE),
    "completion_only_loss": _bool("assistant_only_loss", "assistant_only_loss: true is the default"),
    "torch_dtype": _dtype,
    "dtype": _dtype,
    "compute_dtype": _dtype,
    "pure_bf16": _bool("bf16", _TRUE_FALSE),
    "bfloat16": _bool("bf16", _TRUE_FALSE),
    "float32": _bool("bf16", _TRUE_FALSE, opposite=True),
    "float16": _off(_BF16_OR_32),
    "max_samples": _first_rows,
    "max_train_samples": _first_rows,
    "max_eval_samples": _held_out_rows,
    "datasets": _paths("dataset"),
    "data_files": _paths("dataset"),
    "test_datasets": _paths("eval_dataset"),
    "chat_template": _template,
    "chat_template_jinja": _template,
    "template": _template,
    "excess_length_strategy": _overflow,
    "truncation_strategy": _overflow,
    "dataset_text_field": _text_column,
    "saves_per_epoch": _per_epoch("save"),
    "evals_per_epoch": _per_epoch("eval"),
    "flash_attn": _attention,
    "flash_attention": _attention,
    "sdp_attention": _attention,
    "xformers_attention": _attention,
    "eager_attention": lambda value: {"attn_implementation": "eager"} if value is True else None,
    "use_gradient_checkpointing": _checkpointing,
    "activation_checkpointing": _checkpointing,
    "disable_gradient_checkpointing": lambda value: {"gradient_checkpointing": value is not True},
    "activation_offloading": _bool("activation_offload", "activation_offload is true or false"),
    "random_state": _number_of_seed,
    "shuffle_dataset": _only((True, None), "rows are always shuffled, by seed"),
    "label_smoothing_factor": _off("there is no label smoothing"),
    "neftune_noise_alpha": _off("there is no noise on embeddings"),
    "save_safetensors": _only((True, None), "weights are always saved as safetensors"),
}  # fmt: skip
