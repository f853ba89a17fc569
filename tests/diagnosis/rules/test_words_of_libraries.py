"""Errors and warnings that libraries write for one fault, and those that they write in healthy runs too."""

from __future__ import annotations

from dataclasses import replace

import pytest

from solotune.diagnosis.run_diagnosis import examine
from tests.diagnosis.rules.test_rules import run_facts, trace

FAULTS = {
    "AttributeError: 'NoneType' object has no attribute 'cquantize_blockwise_fp16_nf4'": "F01",
    "Error named symbol not found at line 529 in file /src/csrc/ops.cu": "F01",
    "AssertionError: Torch not compiled with CUDA enabled": "F01",
    "ValueError: Some keys are not used by the HfArgumentParser: ['max_seq_length']": "F02",
    "train.py: error: unrecognized arguments: --evaluation_strategy steps": "F02",
    "AttributeError: 'SFTConfig' object has no attribute 'max_seq_length'": "F02",
    "ImportError: cannot import name 'DataCollatorForCompletionOnlyLM' from 'trl' (/lib/trl/__init__.py)": "F02",
    "AttributeError: 'BitsAndBytesConfig' object has no attribute 'get_loading_attributes'": "F49",
    "ValueError: The model is quantized with Mxfp4Config but you are passing a BitsAndBytesConfig config.": "F49",
    "UserWarning: Input type is bfloat16, but bnb_4bit_compute_dtype=torch.float32 (default).": "F50",
    "UserWarning: You passed a quantization_config, but the model is already loaded; it will be ignored.": "F51",
    "Exception: Current loss scale already at minimum - cannot decrease scale anymore.": "F53",
    "ValueError: Target modules {'q_proj'} not found in the base model.": "F56",
    "ValueError: No modules were targeted for adaptation.": "F56",
    "ValueError: optimizer got an empty parameter list": "F58",
    "trainable params: 0 || all params: 8,030,261,248 || trainable%: 0.0000": "F58",
    "UserWarning: Found missing adapter keys while loading the checkpoint: ['layers.0.q_proj.lora_A.weight']": "F78",
    "size mismatch for layers.0.q_proj.lora_A.default.weight: copying a param with shape [16, 4096]": "F78",
    "RuntimeError: [1]: params[0] in this process with sizes [8, 32] appears not to match sizes of the same param in "
    "process 0.": "F79",
    "RuntimeError: DDP expects same model across all ranks, but Rank 1 has 8 params, while rank 0 has inconsistent 4 "
    "params.": "F79",
    "\n".join(f"[0/{i}] [__recompiles] size mismatch at index 1. expected 9, actual {90 + i}" for i in range(8)): "F73",
}
HEALTHY = [
    "bitsandbytes library loaded, no errors: libbitsandbytes_cuda124.so",
    "FutureWarning: `tokenizer` is deprecated and will be removed in version 5.0.0. Use `processing_class` instead.",
    "trainable params: 0,020,971 || all params: 8,051,232,768",
    "UserWarning: the model you're loading already has a `quantization_config` attribute, which will be used.",
    "UserWarning: Found missing adapter keys while loading the checkpoint: ['lm_head.modules_to_save.weight']",
    "[0/1] [__recompiles] size mismatch at index 1. expected 9, actual 12",
]


@pytest.mark.parametrize("text", FAULTS, ids=lambda text: text[:40])
def test_a_message_names_its_fault(text: str) -> None:
    found = examine(run_facts(trace=trace(errors=(text,))), budget=0)
    assert found.culprits[0].fault == FAULTS[text]


@pytest.mark.parametrize("text", HEALTHY, ids=lambda text: text[:40])
def test_a_message_of_healthy_runs_names_none(text: str) -> None:
    assert examine(run_facts(trace=trace(errors=(text,))), budget=0).verdict == "healthy"


def test_solotune_writes_none_of_them() -> None:
    ours = run_facts({"tool": "solotune"}, trace=replace(trace(), errors=tuple(FAULTS)))
    assert not {"F49", "F50", "F78"} & {culprit.fault for culprit in examine(ours, budget=0).culprits}
