"""Frozen linear layers: y = x W^T + b where W is stored small and never learns.

    forward   y  = x W^T + b
    backward  dx = dy W            (no dW: W is frozen)

dx needs W but not x, so a frozen layer keeps *nothing* of its input for backward. W itself is expanded from its storage
when it is used and dropped again, in forward and in backward: keeping the expanded copy of an 8B model's layers would
cost 13 GiB (measured). The obvious other way, `bnb.nn.Linear4bit`, does the same but is a module of bitsandbytes with
its own state handling; here the stored tensors are plain buffers, so saving, moving and counting bytes need no care.

Storages, all with `dense(dtype) -> W_OI`:
- `DenseWeight`: the weight as it is, in 16 or 32 bits.
- `NF4Weight`: QLoRA's 4-bit NormalFloat (Dettmers et al. 2023, arXiv 2305.14314, section 3): blocks of 64 weights, each
  weight an index into 16 fixed values, each block scaled by its largest magnitude; with double quantisation those
  scales are themselves stored in 8 bits, in blocks of 256. 4.127 bits a weight (4.5 without).

Shape legend: T tokens (any leading dimensions), I in_features, O out_features, K blocks of 64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes import functional as bnb
from torch import nn

BLOCK = 64  # weights per NF4 scale: QLoRA's block size and bitsandbytes' default


class DenseWeight(nn.Module):
    """W_OI as it came, in the dtype it is stored in."""

    weight_OI: torch.Tensor

    def __init__(self, weight_OI: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("weight_OI", weight_OI, persistent=False)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W_OI in `dtype`; no copy where it is stored so."""
        return self.weight_OI.to(dtype)


class NF4Weight(nn.Module):
    """W_OI in 4 bits, quantised by bitsandbytes and bit-equal to its own `dequantize_4bit`."""

    packed: torch.Tensor
    code: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    nested_code: torch.Tensor
    offset: torch.Tensor
    mirror_OI: torch.Tensor | None

    def __init__(self, weight_OI: torch.Tensor, double_quant: bool) -> None:
        """Quantises `weight_OI` (float dtype) on the device it lies on.

        Args:
            weight_OI: the 16- or 32-bit weight; not kept.
            double_quant: store the per-block scales in 8 bits.
        """
        super().__init__()
        packed, state = bnb.quantize_4bit(
            weight_OI.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=double_quant
        )
        self.shape = tuple(weight_OI.shape)
        self.register_buffer("mirror_OI", None, persistent=False)
        self.nested_block = state.state2.blocksize if state.state2 is not None else None
        stored: dict[str, Any] = {"packed": packed, "code": state.code, "absmax": state.absmax}
        if state.state2 is not None:
            stored |= {
                "nested_absmax": state.state2.absmax,
                "nested_code": state.state2.code,
                "offset": state.offset,
            }
        for name, tensor in stored.items():
            self.register_buffer(name, tensor, persistent=False)

    def scales_K(self) -> torch.Tensor:
        """The largest magnitude of each block of 64, float32."""
        if self.nested_block is None:
            return self.absmax
        scales = torch.ops.bitsandbytes.dequantize_blockwise(
            self.absmax, self.nested_absmax, self.nested_code, self.nested_block, torch.float32
        )
        return scales + self.offset

    def keep_mirror(self, dtype: torch.dtype) -> None:
        """Keeps W_OI expanded from now on: the same numbers, no work per use, 4 to 8 times the memory."""
        self.mirror_OI = self.dense(dtype)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W_OI in `dtype`: the mirror where there is one, else a fresh tensor by bitsandbytes' kernel."""
        if self.mirror_OI is not None and self.mirror_OI.dtype == dtype:
            return self.mirror_OI
        return torch.ops.bitsandbytes.dequantize_4bit(
            self.packed, self.scales_K(), BLOCK, "nf4", self.shape, dtype
        ).view(self.shape)

    def dense_reference(self, dtype: torch.dtype) -> torch.Tensor:
        """The same in plain PyTorch, slower: the definition that the kernels are tested against."""
        pairs = self.packed.reshape(-1).to(torch.int32)
        index = torch.stack([pairs >> 4, pairs & 15], dim=-1).reshape(-1)[: math.prod(self.shape)]
        if self.nested_block is None:
            scales_K = self.absmax
        else:
            nested = self.nested_absmax.repeat_interleave(self.nested_block)[: self.absmax.numel()]
            scales_K = self.nested_code[self.absmax.to(torch.int32)] * nested + self.offset
        scales = scales_K.repeat_interleave(BLOCK)[: index.numel()]
        return (self.code[index] * scales).to(dtype).view(self.shape)


class _FrozenMatmul(torch.autograd.Function):
    """x W^T (+ b) that saves neither x nor the expanded W."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, storage: DenseWeight | NF4Weight, bias_O: torch.Tensor | None):
        ctx.storage = storage
        return F.linear(x_TI, storage.dense(x_TI.dtype), bias_O)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        (dy_TO,) = grad_outputs
        return dy_TO @ ctx.storage.dense(dy_TO.dtype), None, None


class FrozenLinear(nn.Module):
    """Stands where a model had an `nn.Linear` (or GPT-2's `Conv1D`); nothing in it requires a gradient."""

    bias_O: torch.Tensor | None

    def __init__(self, storage: DenseWeight | NF4Weight, bias_O: torch.Tensor | None, transposed: bool = False) -> None:
        """Args:
        storage: the weight, always as W_OI.
        bias_O: its bias, or None.
        transposed: the checkpoint stores W_IO (`Conv1D`); only remembered, for the adapter's `fan_in_fan_out`.
        """
        super().__init__()
        self.storage = storage
        self.register_buffer("bias_O", bias_O, persistent=False)
        self.transposed = transposed

    @property
    def out_features(self) -> int:
        return self.storage.shape[0] if isinstance(self.storage, NF4Weight) else self.storage.weight_OI.shape[0]

    @property
    def in_features(self) -> int:
        return self.storage.shape[1] if isinstance(self.storage, NF4Weight) else self.storage.weight_OI.shape[1]

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        bias_O = None if self.bias_O is None else self.bias_O.to(x_TI.dtype)
        if torch.is_grad_enabled() and x_TI.requires_grad:
            return _FrozenMatmul.apply(x_TI, self.storage, bias_O)
        return F.linear(x_TI, self.storage.dense(x_TI.dtype), bias_O)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias_O is not None}"


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all buffers of the frozen linears below `module`."""
    return sum(
        buffer.numel() * buffer.element_size()
        for linear in module.modules()
        if isinstance(linear, FrozenLinear)
        for buffer in linear.buffers()
    )
