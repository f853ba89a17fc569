"""Which fault of `solotune explain` a refused value is, and the line to write instead.

    faults_of({"weight_decay": 1000}, [["weight_decay"]])   [Refused("F69", "weight_decay: 0.0")]
    faults_of({"fp16": True}, [["fp16"]])                   [Refused("F53", "bf16: true, without fp16")]
    faults_of({"lora_r": "eight"}, [["lora_r"]])            [None]: a typing error is no fault of a training

The config refuses these values since no run can be meant so; a diagnosis names the fault that the run would have had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Refused(NamedTuple):
    """The fault of a refused value."""

    code: str
    change: str


Test = Callable[[Any, Mapping[str, Any]], bool]


def _above(limit: float) -> Test:
    return lambda value, _values: _is_number(value) and value > limit


def _at_most(limit: float) -> Test:
    return lambda value, _values: _is_number(value) and value <= limit


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_half(value: Any, _values: Mapping[str, Any]) -> bool:
    return str(value).rpartition(".")[2].lower() in ("float16", "fp16", "half")


def _is_float32(value: Any, values: Mapping[str, Any]) -> bool:
    return str(value) == "float32" and values.get("bf16", True) is True


def _is_empty(value: Any, _values: Mapping[str, Any]) -> bool:
    return value in ([], "")


def _exceeds_max_steps(value: Any, values: Mapping[str, Any]) -> bool:
    steps = values.get("max_steps")
    return isinstance(value, (int, float)) and isinstance(steps, (int, float)) and 0 < steps < value


_BF16 = "bf16: true"
_FAULTS: tuple[tuple[str, Test, Refused], ...] = (
    ("weight_decay", _above(1), Refused("F69", "weight_decay: 0.0")),
    ("learning_rate", _above(0), Refused("F67", "learning_rate: 2e-4")),
    ("learning_rate", _at_most(0), Refused("F64", "learning_rate: 2e-4")),
    ("lora_alpha", lambda value, _values: _is_number(value), Refused("F61", "lora_alpha: 2 x lora_r")),
    ("lora_r", _at_most(0), Refused("F62", "lora_r: 16")),
    ("lora_target_modules", _is_empty, Refused("F56", "lora_target_modules: all-linear")),
    ("warmup_ratio", _above(0.5), Refused("F65", "warmup_ratio: 0.03")),
    ("warmup_steps", _exceeds_max_steps, Refused("F65", "warmup_steps: 0, warmup_ratio: 0.03")),
    ("max_length", _at_most(7), Refused("F25", "max_length: 2048")),
    ("fp16", lambda value, _values: value is True, Refused("F53", f"{_BF16}, without fp16")),
    *((key, _is_half, Refused("F53", f"{_BF16}, without {key}")) for key in
      ("bnb_4bit_compute_dtype", "dtype", "torch_dtype", "compute_dtype", "model_dtype", "mixed_precision",
       "adapter_dtype")),
    ("base_precision", _is_half, Refused("F53", f"base_precision: bf16, {_BF16}")),
    ("bf16", _is_half, Refused("F53", _BF16)),
    ("bnb_4bit_compute_dtype", _is_float32, Refused("F50", "bnb_4bit_compute_dtype: bfloat16")),
)  # fmt: skip


def faults_of(values: Mapping[str, Any], refused: Sequence[Sequence[str]]) -> list[Refused | None]:
    """The fault of each mistake. float16 counts only if all mistakes are faults: configs of other tools have it, and
    much else that is refused.

    Args:
        values: of the config, as written.
        refused: the keys of each mistake.
    """
    found = [_fault_of(values, keys) for keys in refused]
    is_ours = None not in found
    return [one if one is not None and (one.code != "F53" or is_ours) else None for one in found]


def _fault_of(values: Mapping[str, Any], keys: Sequence[str]) -> Refused | None:
    for key in keys:
        for name, is_fault, found in _FAULTS:
            if key == name and key in values and is_fault(values[key], values):
                rank = values.get("lora_r")
                alpha = f"lora_alpha: {2 * rank}" if isinstance(rank, int) and 0 < rank < 65_536 else "lora_alpha: 32"
                return found._replace(change=alpha) if found.code == "F61" else found
    return None
