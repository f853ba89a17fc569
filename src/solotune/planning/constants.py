"""Measured constants of a plan, each with what it was measured on.

Bytes follow almost entirely from shapes; the constants here are for memory of libraries that shapes do not show.
Seconds are operations divided by the card's rate times the share of that rate that is reached. The shares were fitted
to 18 configs of `bench/plan_runs.py` on one H100 80GB HBM3 (torch 2.11; 1.7B to 8B, NF4, fp8 and bf16,
`bench/results/plan.md`), the launch costs to the configs of 135M, the CPU's constants to the demo on two cores of an
AMD EPYC. For other cards the same shares are used, which is a guess.
"""

from __future__ import annotations

MIB = 1 << 20

# --- bytes
ALLOCATOR_ROUNDING = 512
"""The CUDA allocator hands out multiples of this."""
WORKSPACE_BYTES = {9: 32 * MIB, 10: 32 * MIB, 12: 32 * MIB}
"""One cuBLAS workspace by major compute capability (PyTorch's default); the allocator provides it."""
WORKSPACE_BYTES_OLDER = 8 * MIB + 128 * 1024
CONTEXT_BYTES = 520 * MIB
"""CUDA context, loaded kernels and fragments of the allocator: uses the card's memory, not part of torch's peak."""
NCCL_BYTES = 300 * MIB
"""Buffers of NCCL on each card of several: a guess, some 10 MiB for each of its channels."""
FRAGMENTATION = 1.02
"""Memory reserved by the allocator, relative to what is used at the peak."""
CPU_PROCESS_BYTES = 800 * MIB
"""Resident memory of a process that has imported torch, transformers and bitsandbytes and tokenized some rows."""
CPU_HEAP_SLACK = 1.2
"""Size of glibc's heap relative to the bytes in use."""

# --- share of the card's rate that matrix products reach: large ones, and smaller ones
GEMM_SHARE = 0.687
FP8_GEMM_SHARE = 0.663
GEMM_HALF_FLOPS = 6.4e9
"""A product of this many operations reaches half of the share (launch, tails, too few tiles)."""
SMALL_GEMM_SHARE_OF_BANDWIDTH = (
    0.99  # LoRA's products: one side is r, so reading and writing takes longer than multiplying
)
ATTENTION_FORWARD, ATTENTION_BACKWARD = (0.61, 750), (0.56, 1400)
"""cuDNN, causal: the share for long rows, and the length that reaches half of it (4 x 2,048 and 32,768 tokens)."""
BANDWIDTH_SHARE = 1.0  # reached by fused element-wise kernels
NF4_EXPANSION_SHARE = 0.457  # of bandwidth, reading 4 and writing 16 bits
EAGER_KERNEL_SECONDS = 2.7e-5  # dispatching one uncompiled operation, with its autograd node
KERNEL_SECONDS = 7e-6  # launching one from Python's wrapper of a compiled graph; limits small models
LAYER_SECONDS = 2.2e-4  # guards, autograd nodes and hooks of one compiled layer, forward and backward
GRAPH_KERNEL_SECONDS = 1.2e-6  # the least time of a kernel in a CUDA graph
STEP_SECONDS = 0.003  # reading rows, the optimizer's launches, the loss's transfer to the host

DUPLEX_SHARE = 0.89  # of the link's rate that each direction has while both copy (48.9 of 54.9 GB/s, one H200)

# --- several ranks
HOP_SECONDS = 6e-6  # of each of the 2 (N - 1) sends of an all-reduce in a ring of N: a guess
ALL_REDUCE_SECONDS = 1.3e-4  # of each: 0.03 ms beside the sends (two H200), and the loop that asks whether it is done
SHARE_BESIDE_PEER_COPIES = 0.87  # speed of matrix products while the card copies from another one's memory (two H200)
GLOO_BYTES_PER_SECOND = 1e9  # over loopback, each CPU rank: a guess

# --- once per run
CUDA_IMPORT_SECONDS = 3.0
READ_BYTES_PER_SECOND = 3.7e9  # weights from the page cache, over the bus, quantized
COMPILE_SECONDS = 9.0  # one shape of one kind of layer, forward and backward, nothing cached
COMPILE_SECONDS_CHECKPOINTED = 3.0

# --- the CPU
CPU_GEMM_SHARE = 0.80  # of the rate that one large product reaches
CPU_OPERATION_SECONDS = 8e-6
CPU_IMPORT_SECONDS = 5.0
CPU_QUANTISED_WEIGHTS_PER_SECOND = 2.5e7
CPU_EXPANDED_WEIGHTS_PER_SECOND = 2e8
CPU_GENERATED_LAYER_SECONDS = 6e-4  # per new token, in addition to reading all weights
