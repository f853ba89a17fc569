"""Where in a step the memory ran out: `phase_of(text)` reads the traceback from its innermost frame outwards.

A trainer calls the model from `compute_loss`, so words of the outer frames tell nothing.
"""

from __future__ import annotations

import re
from typing import Literal

Phase = Literal["load", "forward", "loss", "backward", "step", ""]

_FRAME = re.compile(r'File "?([^",\n]+)"?, line \d+, in (\S+)(?:\n[ \t]+(?!File)([^\n]*))?')
_NEUTRAL = re.compile(r"torch/(nn/modules|utils|_dynamo|_compile|_ops|overrides)|/hooks|accelerate/utils")
_PHASES: tuple[tuple[Phase, str], ...] = (
    (
        "loss",
        r"cross_?entropy|log_?softmax|logsumexp|nll_loss|loss_utils|CausalLMLoss|lm_head|embed_out|logits|loss_fct|"
        r"loss_function|label_smooth|compute_metrics",
    ),
    ("step", r"/optim(izers?)?[/.]|optimizer\.step|exp_avg|_init_group|_adamw?\b|\bin step$"),
    ("load", r"from_pretrained|load_state_dict|_load_|model_loading|safetensors|replace_with_bnb"),
    ("backward", r"autograd|backward"),
    ("forward", r"modeling_|/models?/|attention|attn|mlp|layer|decoder|\bin forward$"),
)
"""The first that fits an inner frame decides."""


def phase_of(text: str) -> Phase:
    """Of an out-of-memory error with or without its traceback; empty if it does not tell."""
    frames = _FRAME.findall(text)
    words = [f"{file} {code} in {function}" for file, function, code in reversed(frames) if not _NEUTRAL.search(file)]
    for word in words or [text]:
        for phase, pattern in _PHASES:
            if re.search(pattern, word, re.IGNORECASE):
                return phase
    return ""
