"""The token embedding in host memory: a lookup reads the rows it needs over the link.

A table of 128,256 x 4,096 in 16 bits takes 0.98 GiB of the GPU; a micro-batch of 8,192 tokens reads 64 MiB of it, once.
No code changes: the module's weight is a tensor of the GPU whose values lie in pinned host memory, so lookups can be
recorded in CUDA graphs, and rows are bit-equal.

A table that is also the output head stays on the GPU: every logit reads all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from solotune.hardware.pinned_memory import pinned_bytes


def own_embedding(module: PreTrainedModel) -> nn.Embedding | None:
    """The token embedding; None if its table is the output head too."""
    embedding, head = module.get_input_embeddings(), module.get_output_embeddings()
    if isinstance(embedding, nn.Embedding) and getattr(head, "weight", None) is not embedding.weight:
        return embedding
    return None


def move_embedding_to_host(module: PreTrainedModel, device: torch.device) -> int:
    """Move the frozen table of the token embedding; the bytes that it takes there, 0 if it stays.

    Raises:
        DeviceError: the system does not pin so much memory.
    """
    if (embedding := own_embedding(module)) is None:
        return 0
    weight = embedding.weight.detach()
    host = pinned_bytes(weight.numel() * weight.element_size(), device)
    host.view(weight.dtype).view(weight.shape).copy_(weight)
    there = _read_in_place(host, device).view(weight.dtype).view(weight.shape)
    embedding.weight = nn.Parameter(there, requires_grad=False)
    return host.numel()


def _read_in_place(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pinned bytes as a tensor of `device`: kernels read them over the link. It keeps `host` alive."""
    return host if device.type != "cuda" else torch.as_tensor(_HostBytes(host), device=device)


class _HostBytes:
    """Pinned bytes as memory that CUDA reads (CUDA array interface, version 3).

    With unified addressing, pinned memory has one address on host and device. PyTorch asks the driver which device an
    address belongs to, and keeps this object.
    """

    def __init__(self, host: torch.Tensor) -> None:
        self.host = host

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (self.host.numel(),), "typestr": "|u1", "data": (self.host.data_ptr(), False), "version": 3}
