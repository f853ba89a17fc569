"""Frozen linear layers: y = x W^T + b, with W stored small and never trained.

    forward   y  = x W^T + b
    backward  dx = dy W            (no dW: W is frozen)

What is kept for backward
-------------------------
dx needs W but not x, so a frozen layer keeps *nothing* of its input. If W has to be dequantised, that is done at each
use, in forward and again in backward: keeping the dequantised copies of an 8B model would cost 13 GiB (measured).

Why not `bnb.nn.Linear4bit`
---------------------------
It computes the same, but has its own state handling, which a compiler cannot trace. Here the stored tensors are plain
buffers, so saving, moving, counting bytes and compiling need no special code.

Storages, all with `matmul(x_TI) -> y_TO`
-----------------------------------------
- `DenseWeight`: the weight unchanged, in 16 or 32 bits.
- `NF4Weight`: QLoRA's 4-bit NormalFloat (Dettmers et al. 2023, arXiv 2305.14314, section 3): blocks of 64 weights, each
  weight an index into 16 fixed values, each block scaled by its largest magnitude; with double quantisation those
  scales are themselves stored in 8 bits, in blocks of 256. 4.127 bits a weight (4.5 without).
- `Fp8Weight`: 8-bit floats (e4m3) with a scale for each row, multiplied directly by the tensor cores of Hopper and
  newer, which do twice the 16-bit products a second.

Shape legend: T tokens (any leading dimensions), I in_features, O out_features, K blocks of 64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from solotune.hardware.bnb import functional as bnb
from solotune.model.nf4_codes import BLOCK, quantize_nf4

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NESTED_BLOCK = 256  # scales per scale of their own, with double quantisation
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite e4m3


@torch.library.custom_op("solotune::dequant_matmul", mutates_args=())
def dequant_matmul(
    x_TI: torch.Tensor, stored: list[torch.Tensor], shape: list[int], nested_block: int, transposed: bool
) -> torch.Tensor:
    """x W^T (transposed: x W), with W dequantised from its storage for this one product.

    It is one opaque operation, because a compiler that sees W dequantised in forward and again in backward treats both
    as one value and keeps it in between.

    Args:
        stored: `[W_OI]` in another dtype than x, or `NF4Weight.stored`.
        shape: (O, I).
        nested_block: of NF4's double quantisation; 0 for none.
    """
    weight_OI = (
        stored[0].to(x_TI.dtype) if len(stored) == 1 else dequantize_nf4(stored, shape, nested_block, x_TI.dtype)
    )
    return x_TI @ weight_OI if transposed else F.linear(x_TI, weight_OI)


@dequant_matmul.register_fake
def _(x_TI: torch.Tensor, stored: list[torch.Tensor], shape: list[int], nested_block: int, transposed: bool):
    return x_TI.new_empty((*x_TI.shape[:-1], shape[1 if transposed else 0]))


def _keep_storage(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, ctx.stored, ctx.shape, ctx.nested_block, ctx.transposed = inputs


def _through_weight(ctx: Any, dy: torch.Tensor):
    dx = dequant_matmul(dy, ctx.stored, ctx.shape, ctx.nested_block, not ctx.transposed)
    return dx, [None] * len(ctx.stored), None, None, None


dequant_matmul.register_autograd(_through_weight, setup_context=_keep_storage)


def dequantize_nf4(stored: list[torch.Tensor], shape: list[int], nested_block: int, dtype: torch.dtype) -> torch.Tensor:
    """W_OI of `NF4Weight.stored`, dequantised by bitsandbytes' kernel."""
    scales_K = nf4_scales(stored, nested_block)
    return torch.ops.bitsandbytes.dequantize_4bit(stored[0], scales_K, BLOCK, "nf4", shape, dtype).view(shape)


def nf4_scales(stored: list[torch.Tensor], nested_block: int) -> torch.Tensor:
    """The scale of each block in float32; of double quantisation, dequantised."""
    if not nested_block:
        return stored[1]
    _, codes_K, nested_absmax, nested_code, offset = stored
    return offset + torch.ops.bitsandbytes.dequantize_blockwise(
        codes_K, nested_absmax, nested_code, nested_block, torch.float32
    )


class DenseWeight(nn.Module):
    """W_OI in 16 or 32 bits."""

    weight_OI: torch.Tensor

    def __init__(self, weight_OI: torch.Tensor) -> None:
        super().__init__()
        self.shape = tuple(weight_OI.shape)
        self.register_buffer("weight_OI", weight_OI, persistent=False)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W_OI in `dtype`; no copy if it is stored in that dtype."""
        return self.weight_OI.to(dtype)

    def matmul(self, x_TI: torch.Tensor) -> torch.Tensor:
        """x W^T"""
        if self.weight_OI.dtype == x_TI.dtype:
            return F.linear(x_TI, self.weight_OI)  # autograd keeps only W, because only x needs a gradient
        return dequant_matmul(x_TI, [self.weight_OI], self.shape, 0, transposed=False)


class NF4Weight(nn.Module):
    """W_OI in 4 bits: bit-equal to bitsandbytes' `quantize_4bit` and `dequantize_4bit`."""

    packed: torch.Tensor
    code: torch.Tensor
    absmax: torch.Tensor
    nested_absmax: torch.Tensor
    nested_code: torch.Tensor
    offset: torch.Tensor
    dequantized_OI: torch.Tensor | None

    def __init__(self, weight_OI: torch.Tensor, double_quant: bool) -> None:
        """Quantise `weight_OI` (float dtype) on its device.

        Args:
            weight_OI: the 16- or 32-bit weight; not kept.
            double_quant: store the per-block scales in 8 bits.
        """
        super().__init__()
        packed, absmax = _nf4_codes(weight_OI.contiguous())
        self.shape = tuple(weight_OI.shape)
        self.register_buffer("dequantized_OI", None, persistent=False)
        self.nested_block = NESTED_BLOCK if double_quant else 0
        buffers: dict[str, Any] = {"packed": packed, "code": bnb.get_4bit_type("nf4", device=packed.device)}
        if double_quant:
            offset = absmax.mean()
            absmax, nested = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
            buffers |= {"nested_absmax": nested.absmax, "nested_code": nested.code, "offset": offset}
        for name, tensor in (buffers | {"absmax": absmax}).items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def stored(self) -> list[torch.Tensor]:
        """The tensors that `dequantize_nf4` needs."""
        nested = [self.nested_absmax, self.nested_code, self.offset] if self.nested_block else []
        return [self.packed, self.absmax, *nested]

    def keep_dequantized_copy(self, dtype: torch.dtype) -> None:
        """Keep W_OI dequantised from now on: the same numbers, no work per use, 4 to 8 times the memory."""
        self.dequantized_OI = self.dense(dtype)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W_OI in `dtype`: the dequantised copy if there is one, else a new tensor."""
        if self.dequantized_OI is not None and self.dequantized_OI.dtype == dtype:
            return self.dequantized_OI
        return dequantize_nf4(self.stored, list(self.shape), self.nested_block, dtype)

    def rows(self, dtype: torch.dtype) -> Callable[[int, int], torch.Tensor]:
        """(begin, end) -> these rows of `dense(dtype)`, dequantised when they are asked for."""
        scales_K, width, size = nf4_scales(self.stored, self.nested_block), self.shape[1], math.prod(self.shape)

        def rows(begin: int, end: int) -> torch.Tensor:
            first, last = begin * width // BLOCK, -(-end * width // BLOCK)  # blocks
            at, count = first * BLOCK, min(last * BLOCK, size) - first * BLOCK
            packed = self.packed[at // 2 : (at + count + 1) // 2]
            numbers = torch.ops.bitsandbytes.dequantize_4bit(
                packed, scales_K[first:last], BLOCK, "nf4", [1, count], dtype
            )
            return numbers.view(-1)[begin * width - at : end * width - at].view(-1, width)

        return rows

    def matmul(self, x_TI: torch.Tensor) -> torch.Tensor:
        """x W^T"""
        if self.dequantized_OI is not None and self.dequantized_OI.dtype == x_TI.dtype:
            return F.linear(x_TI, self.dequantized_OI)
        return dequant_matmul(x_TI, self.stored, self.shape, self.nested_block, transposed=False)

    def dense_reference(self, dtype: torch.dtype) -> torch.Tensor:
        """W_OI in plain PyTorch, slower: the definition that the kernels are tested against."""
        pairs = self.packed.reshape(-1).to(torch.int32)
        index = torch.stack([pairs >> 4, pairs & 15], dim=-1).reshape(-1)[: math.prod(self.shape)]
        if not self.nested_block:
            scales_K = self.absmax
        else:
            nested = self.nested_absmax.repeat_interleave(self.nested_block)[: self.absmax.numel()]
            scales_K = self.nested_code[self.absmax.to(torch.int32)] * nested + self.offset
        scales = scales_K.repeat_interleave(BLOCK)[: index.numel()]
        return (self.code[index] * scales).to(dtype).view(self.shape)


def _nf4_codes(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scale of each block): by bitsandbytes' kernel, on a CPU, for which it has none, by ours."""
    if weight_OI.device.type == "cpu":
        return quantize_nf4(weight_OI)
    packed, state = bnb.quantize_4bit(weight_OI, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    return packed, state.absmax


def round_to_fp8(x_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round to e4m3 codes (R, K) with scales (R, 1): x is about codes * scales, each row's largest magnitude at 448.

    The scale is a product with 1 / 448 in float32, which is how torch divides by a number on CUDA; on the CPU it really
    divides. With a scale that differs in its last bit, a weight in the middle between two codes gets the other one, and
    a merge on the CPU would not be of what was trained on the card.
    """
    scales_R1 = x_RK.abs().amax(1, keepdim=True).float().clamp(min=1e-12) * (1 / FP8_MAX)
    return (x_RK.float() / scales_R1).to(FP8), scales_R1


@torch.library.custom_op("solotune::scaled_matmul", mutates_args=())
def scaled_matmul(
    codes_TK: torch.Tensor, scales_T1: torch.Tensor, codes_NK: torch.Tensor, scales_N1: torch.Tensor
) -> torch.Tensor:
    """(codes_TK scales_T1) (codes_NK scales_N1)^T in bfloat16, with sums in float32; tensor cores on CUDA."""
    if codes_TK.is_cuda:
        scales = {"scale_a": scales_T1, "scale_b": scales_N1.t()}
        return torch._scaled_mm(codes_TK, codes_NK.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)
    return (codes_TK.float() @ codes_NK.float().t() * scales_T1 * scales_N1.t()).bfloat16()


@scaled_matmul.register_fake
def _(codes_TK: torch.Tensor, scales_T1: torch.Tensor, codes_NK: torch.Tensor, scales_N1: torch.Tensor):
    return codes_TK.new_empty((codes_TK.shape[0], codes_NK.shape[0]), dtype=torch.bfloat16)


def fp8_product(x_TK: torch.Tensor, codes_NK: torch.Tensor, scales_N1: torch.Tensor) -> torch.Tensor:
    """x W^T with both in e4m3: x is rounded row by row here, W is `codes * scales`."""
    return scaled_matmul(*round_to_fp8(x_TK), codes_NK, scales_N1).to(x_TK.dtype)


class _Fp8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, codes_OI: Any, scales_O1: Any, codes_IO: Any, scales_I1: Any):
        ctx.save_for_backward(codes_IO, scales_I1)
        return fp8_product(x_TI, codes_OI, scales_O1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor):
        codes_IO, scales_I1 = ctx.saved_tensors
        return fp8_product(grad_outputs[0].contiguous(), codes_IO, scales_I1), None, None, None, None


@torch.compiler.allow_in_graph
def fp8_matmul(
    x_TI: torch.Tensor,
    codes_OI: torch.Tensor,
    scales_O1: torch.Tensor,
    codes_IO: torch.Tensor,
    scales_I1: torch.Tensor,
) -> torch.Tensor:
    """x W^T forward and dy W backward, each with the weight in the layout that it needs.

    Warning: torch 2.11 must not trace into this function (hence `allow_in_graph`). It would see x rounded to a dtype
    without gradients, and dx would be 0 without an error.
    """
    return _Fp8Matmul.apply(x_TI, codes_OI, scales_O1, codes_IO, scales_I1)  # type: ignore[return-value]


class Fp8Weight(nn.Module):
    """W_OI in e4m3 twice: by its rows for y = x W^T and by its columns for dx = dy W.

    Tensor cores sum along the last dimension of both factors, with one scale for each sum, so backward needs the weight
    transposed and scaled by columns. 16 bits a weight in total.
    """

    codes_OI: torch.Tensor
    scales_O1: torch.Tensor
    codes_IO: torch.Tensor
    scales_I1: torch.Tensor

    def __init__(self, weight_OI: torch.Tensor) -> None:
        super().__init__()
        self.shape = tuple(weight_OI.shape)
        forward, backward = round_to_fp8(weight_OI), round_to_fp8(weight_OI.t().contiguous())
        for name, tensor in zip(("codes_OI", "scales_O1", "codes_IO", "scales_I1"), (*forward, *backward), strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """W_OI in `dtype`, with the values of the forward product."""
        return (self.codes_OI.float() * self.scales_O1).to(dtype)

    @staticmethod
    def forward_values(weight_OI: torch.Tensor) -> torch.Tensor:
        """The values of the forward product in float32, of a weight or some rows of it."""
        codes_OI, scales_O1 = round_to_fp8(weight_OI)
        return codes_OI.float() * scales_O1

    def matmul(self, x_TI: torch.Tensor) -> torch.Tensor:
        """x W^T"""
        rows = x_TI.reshape(-1, x_TI.shape[-1])
        y = fp8_matmul(rows, self.codes_OI, self.scales_O1, self.codes_IO, self.scales_I1)
        return y.view(*x_TI.shape[:-1], self.shape[0])


Storage = DenseWeight | NF4Weight | Fp8Weight


class FrozenLinear(nn.Module):
    """Replaces a model's `nn.Linear` (or GPT-2's `Conv1D`); nothing in it requires a gradient."""

    bias_O: torch.Tensor | None

    def __init__(self, storage: Storage, bias_O: torch.Tensor | None, transposed: bool = False) -> None:
        """Args:
        storage: the weight, always as W_OI.
        bias_O: its bias, or None.
        transposed: the checkpoint stores W_IO (`Conv1D`); kept only for the adapter's `fan_in_fan_out`.
        """
        super().__init__()
        self.storage = storage
        self.register_buffer("bias_O", bias_O, persistent=False)
        self.transposed = transposed

    @property
    def out_features(self) -> int:
        return self.storage.shape[0]

    @property
    def in_features(self) -> int:
        return self.storage.shape[1]

    def forward(self, x_TI: torch.Tensor) -> torch.Tensor:
        y_TO = self.storage.matmul(x_TI)
        return y_TO if self.bias_O is None else y_TO + self.bias_O.to(x_TI.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias_O is not None}"


def stored_bytes(module: nn.Module) -> int:
    """Bytes of all buffers of the frozen linears in `module`."""
    return sum(
        buffer.numel() * buffer.element_size()
        for linear in module.modules()
        if isinstance(linear, FrozenLinear)
        for buffer in linear.buffers()
    )


def frozen_linears(module: PreTrainedModel) -> dict[str, nn.Module]:
    """All linears except the output head, by dotted name: those that a `FrozenLinear` replaces."""
    head = module.get_output_embeddings()
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, (nn.Linear, Conv1D)) and part is not head and _is_linear(part)
    }


def _is_linear(part: nn.Module) -> bool:
    """Whether a subclass of a linear still returns one product: routers of Llama 4 and Phi MoE return scores too."""
    if type(part).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight = part.weight
    assert isinstance(weight, torch.Tensor)
    out, into = weight.shape
    with torch.no_grad():
        x = torch.empty(1, 1, into, device="meta", dtype=weight.dtype)
        empty = {name: torch.empty_like(p, device="meta") for name, p in part.named_parameters()}
        try:
            y = torch.func.functional_call(part, empty, (x,))
        except (RuntimeError, TypeError, ValueError):
            return False
    return isinstance(y, torch.Tensor) and y.shape == (1, 1, out)
