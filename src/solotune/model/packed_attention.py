"""Attention over packed rows by their lengths instead of by a mask.

    softmax(q k^T * scale) v, causal, within each row of a pack

Why not a mask
--------------
With a mask, each of B packs of T tokens needs T x T pairs and a kernel that reads the mask, which is slow. The flash
kernel takes the start of each row (`cu_seq_lens`, as transformers' own flash path calls them) and visits only pairs
within a row (Dao 2023, arXiv 2307.08691). The rows of all packs are concatenated, so shapes depend only on the number
of packs.

How it is installed
-------------------
Under its own name in transformers' registries of attention and mask functions, so a model's code runs unchanged. Passes
without gradients use transformers' sdpa and its masks.

What it does not do: sliding windows shorter than a row, soft caps, sinks, biases. Such models stay with sdpa, where a
mask separates the rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "solotune"
MAX_HEAD_SIZE = 256  # of the flash kernel
# cuDNN's is up to twice as fast as flash on Hopper; if it does not apply, the next one is used
FASTEST_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: q (B, H, T, D), k and v (B, H_kv, T, D) -> (B, T, H, D).

    Args:
        cu_seq_lens_q: int32, start of each row in the B * T tokens, then their end.
        max_length_q: length of the longest row, or more.
    """
    if cu_seq_lens_q is None:
        if attention_mask is not None or not query.is_cuda or not torch.is_grad_enabled():
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        with sdpa_kernel(FASTEST_FIRST, set_priority=True):
            return sdpa_attention_forward(module, query, key, value, None, scaling=scaling, **kwargs)
    num_packs, _, length, size = query.shape
    q, k, v = (x.transpose(1, 2).reshape(num_packs * length, x.shape[1], size) for x in (query, key, value))
    return flash(q, k, v, cu_seq_lens_q, max_length_q, scaling).view(num_packs, length, -1, size), None


def flash(
    q_NHD: torch.Tensor,
    k_NHD: torch.Tensor,
    v_NHD: torch.Tensor,
    cu_seqlens_S: torch.Tensor,
    longest: int | None,
    scale: float | None,
) -> torch.Tensor:
    """Causal attention within each row of the N tokens, by PyTorch's flash kernel."""
    return torch.ops.aten._flash_attention_forward(
        q_NHD, k_NHD, v_NHD, cu_seqlens_S, cu_seqlens_S, longest, longest, 0.0, True, False, scale=scale
    )[0]


def mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """No mask for a training pass; sdpa's mask for all others."""
    if torch.is_grad_enabled() and attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


def unsupported_reason(module: PreTrainedModel, max_length: int, dtype: torch.dtype) -> str | None:
    """Reason why this model must stay with sdpa; None if there is none."""
    config = module.config.get_text_config()
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the flash kernel computes in 16 bits, not in {str(dtype).removeprefix('torch.')}"
    if not module._can_set_attn_implementation():
        return f"{config.model_type} has its own attention code"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if size > MAX_HEAD_SIZE or size % 8:
        return f"its heads have size {size}; the flash kernel takes multiples of 8 up to {MAX_HEAD_SIZE}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    if kinds - {"full_attention", "sliding_attention"} or ("sliding_attention" in kinds and not window):
        return f"{config.model_type} has layers of type {', '.join(sorted(kinds))}"
    if window and window < max_length and getattr(config, "use_sliding_window", True):
        return f"a sliding window of {window} tokens is shorter than max_length"
    if any(getattr(config, name, None) for name in ("attn_logit_softcapping", "alibi", "position_bias")):
        return f"{config.model_type} changes the attention scores before the softmax"
    return None


def install(module: PreTrainedModel) -> None:
    """Make this model use `attention` and `mask`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    module.set_attn_implementation(NAME)
