"""The token embedding in host memory: a lookup reads the rows it needs over the link.

A table of 128,256 x 4,096 in 16 bits takes 0.98 GiB of the GPU; a micro-batch of 8,192 tokens reads 64 MiB of it, once.
No code changes: the module's weight is a tensor of the GPU whose values lie in pinned host memory, so lookups can be
recorded in CUDA graphs, and rows are bit-equal.

A table that is also the output head stays on the GPU: every logit reads all of it.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from solotune.hardware.pinned_memory import on_device_in_place, pinned


def move_embedding_to_host(module: PreTrainedModel, device: torch.device) -> int:
    """Move the frozen table of the token embedding; the bytes that it takes there, 0 if it stays.

    Raises:
        DeviceError: the system does not pin so much memory.
    """
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or getattr(head, "weight", None) is embedding.weight:
        return 0
    host = pinned(embedding.weight.detach().cpu().contiguous(), device)
    embedding.weight = nn.Parameter(on_device_in_place(host, device), requires_grad=False)
    return host.numel() * host.element_size()
