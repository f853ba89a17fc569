"""Faults that a library's own error or warning names; such a run often ends before there is anything else to judge.

A message is listed only if its library writes it for this fault alone. What it also writes in healthy runs is not here:
that a checkpoint has its own quantization (as ready-made 4-bit ones do), that an argument is deprecated.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from solotune.diagnosis.catalogue import FAULTS
from solotune.diagnosis.evidence import Signal
from solotune.diagnosis.facts.derived import has_error, is_ours
from solotune.diagnosis.rules import rule
from solotune.diagnosis.run_facts import RunFacts

_LIBRARIES = r"(?:trl|transformers|peft|accelerate|datasets|bitsandbytes|unsloth)"
RECOMPILES = 8
"""Times that torch's compiler compiles one function before it gives up."""


class Words(NamedTuple):
    """Messages of one fault."""

    code: str
    patterns: tuple[str, ...]
    weight: float = 0.9


WORDS = (
    Words("F01", (
        r"'NoneType' object has no attribute 'c(quantize|dequantize|get_|gemm|adam|igemm)",
        r"(named symbol not found|no kernel image|invalid device function).* at line \d+ in file",
        r"bitsandbytes.*requires the latest version of bitsandbytes",
        r"No package metadata was found for bitsandbytes",
        r"NVIDIA driver on your system is too old|CUDA driver version is insufficient for CUDA runtime",
        r"Torch not compiled with CUDA enabled",
    )),
    Words("F02", (
        r"not used by the HfArgumentParser",
        r"unrecognized arguments?: --",
        r"'\w*(Config|Arguments)' object has no attribute '(?!get_loading_attributes)",
        rf"cannot import name '\w+' from '{_LIBRARIES}\b",
        rf"module '{_LIBRARIES}[\w.]*' has no attribute",
        r"Extra inputs are not permitted",
        r"ConfigKeyError: Key '\w+'",
    ), 0.85),
    Words("F49", (
        r"'BitsAndBytesConfig' object has no attribute 'get_loading_attributes'",
        r"model is quantized with \w+ but you are passing a",
    )),
    Words("F50", (r"bnb_4bit_compute_dtype=torch\.float32",)),
    Words("F51", (r"quantization_config\b.*already (loaded|instantiated)",)),
    Words("F53", (r"loss scale already at minimum", r"at::Half without overflow")),
    Words("F56", (r"Target modules .* not found in the base model", r"No modules were targeted for adaptation")),
    Words("F58", (r"optimizer got an empty parameter list", r"trainable params: 0\b(?!,)")),
    Words("F58", (r"No inf checks were recorded for this optimizer",), 0.6),
    Words("F78", (
        r"missing adapter keys while loading.*lora_",
        r"unexpected keys not found in the model.*lora_",
        r"size mismatch for \S*lora_[AB]\b",
    )),
    Words("F79", (
        r"DDP expects same model across all ranks",
        r"appears not to match (sizes|strides) of the same param in process",
    )),
)  # fmt: skip
"""A run's log -> its fault."""


def _rule_of(words: Words) -> Callable[[RunFacts], Signal | None]:
    def said_by_a_library(run_facts: RunFacts) -> Signal | None:
        line = has_error(run_facts, *words.patterns)
        if line is None:
            return None
        return Signal(words.code, "measured", f"the log says: {line}", words.weight, fix=FAULTS[words.code].fix)

    said_by_a_library.__doc__ = f"{words.code}, from the log: an error or a warning of a library names it."
    return said_by_a_library


for one in WORDS:
    rule(one.code, needs=("trace",), otherwise=True, unless=is_ours)(_rule_of(one))


@rule("F73", needs=("trace",), otherwise=True, unless=is_ours)
def compiled_again_and_again(run_facts: RunFacts) -> Signal | None:
    """F73, from the log: as many recompilations of one function for another length as torch's compiler allows."""
    text = "\n".join(run_facts.trace.errors) if run_facts.trace is not None else ""
    lengths = re.findall(r"size mismatch at index \d+\. expected \d+, actual (\d+)", text)
    if "__recompiles" not in text or len(set(lengths)) < RECOMPILES:
        return None
    says = f"the log shows recompilations for {len(set(lengths))} different lengths"
    return Signal("F73", "measured", says, 0.8, {"lengths": len(set(lengths))}, fix=FAULTS["F73"].fix)
