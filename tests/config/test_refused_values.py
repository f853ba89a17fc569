"""Values that the config refuses name the fault that the run would have had, with the line that puts it right."""

from __future__ import annotations

import pytest

from solotune.config.load import load_config
from solotune.diagnosis.catalogue import FAULTS
from solotune.diagnosis.run_diagnosis import examine
from solotune.diagnosis.sources.detect import run_facts_of
from solotune.errors import InputError

MINIMAL = {"model_name_or_path": "no/such-model", "dataset": "none.jsonl"}
FAULTY = [
    ("F69", {"weight_decay": 1000}),
    ("F53", {"fp16": True}),
    ("F53", {"bnb_4bit_compute_dtype": "float16"}),
    ("F53", {"torch_dtype": "torch.float16"}),
    ("F53", {"base_precision": "fp16"}),
    ("F50", {"bnb_4bit_compute_dtype": "float32"}),
    ("F67", {"learning_rate": 20.0}),
    ("F64", {"learning_rate": 0.0}),
    ("F61", {"lora_alpha": 0}),
    ("F61", {"lora_alpha": 1e9}),
    ("F62", {"lora_r": 0}),
    ("F56", {"lora_target_modules": []}),
    ("F65", {"warmup_ratio": 3}),
    ("F65", {"max_steps": 50, "warmup_steps": 100}),
    ("F25", {"max_length": 4}),
    ("F69", {"weight_decay": 100.0, "seed": "x"}),
]


@pytest.mark.parametrize(("code", "values"), FAULTY, ids=[f"{code}-{i}" for i, (code, _) in enumerate(FAULTY)])
def test_the_error_and_the_diagnosis_name_the_fault(code, values):
    with pytest.raises(InputError, match=f"{code} .solotune explain {code}") as refused:
        load_config({**MINIMAL, **values})
    assert refused.value.fault == code and refused.value.change
    found = examine(run_facts_of({**MINIMAL, **values}), budget=0)
    assert found.verdict == "fault" and found.culprits[0].fault == code in FAULTS
    assert found.culprits[0].fix == refused.value.change


@pytest.mark.parametrize(("key", "line"), [("max_seq_length", "max_length: 64"), ("max_lenght", "max_length: 64")])
def test_a_setting_under_another_name_is_f02(key, line):
    found = examine(run_facts_of({**MINIMAL, key: 64}), budget=0)
    assert (found.culprits[0].fault, found.culprits[0].fix) == ("F02", line)


@pytest.mark.parametrize(
    "values",
    [
        {"max_seq_length": 64, "save_safetensors": True},  # a config of another tool
        {"weight_decay": -1},
        {"lora_r": "eight"},
        {"learning_rate": "high"},
        {"max_grad_norm": 0},
        {"lora_dropout": True},
        {"fp16": False},
        {"fp16": True, "report_to": "none", "save_safetensors": True},  # a config of another tool
    ],
)
def test_a_typing_error_is_no_fault_of_a_training(values):
    for take in (load_config, run_facts_of):
        with pytest.raises(InputError) as refused:
            take({**MINIMAL, **values})
        assert refused.value.fault is None


@pytest.mark.parametrize(("code", "values"), [one for one in FAULTY if "seed" not in one[1]])
def test_the_change_is_allowed(code, values):
    with pytest.raises(InputError) as refused:
        load_config({**MINIMAL, **values})
    change, _, without = str(refused.value.change).partition(", without ")
    changed = {key: value for key, value in values.items() if key != without}
    for line in change.split(", "):
        key, _, value = line.partition(": ")
        changed[key] = value
    load_config({**MINIMAL, **{k: v for k, v in changed.items() if not isinstance(v, str)}},
                [f"{k}={v}" for k, v in changed.items() if isinstance(v, str)])  # fmt: skip
