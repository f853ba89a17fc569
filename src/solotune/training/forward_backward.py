"""Forward and backward of one micro-batch, recorded as one CUDA graph if its shape repeats.

Why
---
A pass through a model of 30 layers is several thousand kernels, each launched from Python. A small model on a fast card
waits for the launches: 135M parameters at 4 x 2,048 tokens train at half the speed that their kernels allow. A CUDA
graph is the list of those launches, recorded once and replayed by the driver in one call.

How
---
A graph reads fixed addresses: before each replay, ids, label positions, row starts and weights are copied into the
graph's own tensors. Shapes must be equal, so labels are padded (with weight 0) to a multiple of a sixteenth of the
tokens, with one graph for each such number. Packed micro-batches of a run have one shape otherwise
(`collate.PaddedShape`). Rows padded to the longest of their batch do not, and mostly run without a graph.

A graph keeps the peak memory of its pass, and all graphs share it. A pass of another shape, and evaluation, need their
own memory, so the graphs are released first (`release`). Recording takes as long as launching one pass. Both ways
compute the same: the same kernels in the same order.

cuBLAS has a workspace for each thread and stream that it computes on, 32 MiB on Hopper, and PyTorch keeps them all.
Those of the other way are given back whenever it changes, which saves 64 MiB.

What it does not do
-------------------
Record passes that are not compiled: they read values from the device and draw random numbers from generators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from solotune.dataset.collate import Batch
from solotune.model.loading import TrainableModel
from solotune.units import first_line

LABEL_PARTS = (
    16  # label counts are rounded up to a multiple of this part of all tokens, which costs a third of that in the head
)
MAX_WARMUP_PASSES = 64  # at most so many passes of one shape in a row before one is recorded

ForwardBackward = Callable[[TrainableModel, Batch, torch.Tensor | float, torch.Tensor], None]  # as `accumulate`


def accumulate(
    model: TrainableModel, batch: Batch, total_weight: torch.Tensor | float, loss_and_correct_2: torch.Tensor
) -> None:
    """Add the micro-batch's gradients, and (sum of weighted losses, correct tokens) to `loss_and_correct_2`.

    Args:
        total_weight: the sum of the label weights of the whole step.
    """
    losses_N, correct_N = model.token_losses(batch)
    weighted_sum = batch.weighted(losses_N).sum()
    trainable = model.trainable
    # allow_unused: the adapter of an expert that no token was routed to
    gradients = torch.autograd.grad(weighted_sum / total_weight, trainable, allow_unused=True)
    found = [(p.grad, g) for p, g in zip(trainable, gradients, strict=True) if p.grad is not None and g is not None]
    torch._foreach_add_([total for total, _ in found], [gradient for _, gradient in found])
    if model.ring is not None:
        model.ring.finish_pass()  # what is recorded must end as it began
    loss_and_correct_2 += torch.stack([weighted_sum.detach(), batch.num_correct(correct_N).to(weighted_sum.dtype)])


class MicroBatchRunner:
    """Runs micro-batches on one model; `loss_and_correct_2` sums over them until it is set to zero."""

    def __init__(self, model: TrainableModel, takes_graphs: bool = False) -> None:
        """Args:
        takes_graphs: whether CUDA graphs may be recorded.
        """
        self.model = model
        self.loss_and_correct_2 = torch.zeros(2, device=model.device)
        self.unsupported_reason: str | None = None  # why recording graphs failed
        self.can_record = takes_graphs and model.device.type == "cuda"
        self._graphs: dict[int, _Graph] = {}  # by number of labels
        self._pool: Any = None
        self._shape: tuple[Any, ...] = ()  # of the last pass
        self._times_seen, self._patience = 0, 1

    def run(self, forward_backward: ForwardBackward, batch: Batch, total_weight: float) -> None:
        """Run `forward_backward` (usually `accumulate`) on one micro-batch, or replay the graph recorded from it."""
        if self.model.ring is not None:
            self.model.ring.finish_pass()  # an evaluation leaves other layers in it
        if not self.can_record:
            forward_backward(self.model, batch, total_weight, self.loss_and_correct_2)
            return
        shape = tuple(
            t is not None and t.shape for t in (batch.input_ids_BT, batch.position_ids_BT, batch.cu_seqlens_S)
        )
        if shape != self._shape:
            if self._graphs:  # the shape changed soon: wait longer before the next recording
                self._patience = min(2 * self._patience, MAX_WARMUP_PASSES)
            self.release()
            self._shape, self._times_seen = shape, 0
        self._times_seen += 1
        count = _rounded_up(len(batch.label_positions_N), math.ceil(batch.input_ids_BT.numel() / LABEL_PARTS))
        graph = self._graphs.get(count)
        if graph is None and self._times_seen > self._patience:
            graph = self._record(forward_backward, batch.padded(count), total_weight)
        if graph is None:
            forward_backward(self.model, batch, total_weight, self.loss_and_correct_2)
        else:
            graph.replay(batch.padded(count), total_weight)

    def release(self) -> None:
        """Drop the graphs and free their memory; later passes are recorded again."""
        if self._graphs:
            self._graphs.clear()
            self._pool = None
            torch._C._cuda_clearCublasWorkspaces()  # of the recorded stream
            torch.cuda.empty_cache()

    def _record(self, forward_backward: ForwardBackward, batch: Batch, total_weight: float) -> _Graph | None:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        if not self._graphs:
            torch._C._cuda_clearCublasWorkspaces()  # of passes that are not recorded; all graphs share theirs
        try:
            graph = _Graph(self, forward_backward, batch, total_weight, self._pool)
        except RuntimeError as error:  # the model reads values of its data, or memory is too small: run without a graph
            self.unsupported_reason, self.can_record = first_line(error), False
            if self.model.ring is not None:
                self.model.ring.forget()  # the copies in the recording did not run
            if self.model.offload is not None:
                self.model.offload.forget()
            self.release()
            return None
        self._graphs[len(batch.label_positions_N)] = graph
        return graph


class _Graph:
    """A recorded pass and the tensors it reads."""

    def __init__(
        self, runner: MicroBatchRunner, forward_backward: ForwardBackward, batch: Batch, total_weight: float, pool: Any
    ) -> None:
        self._batch = batch
        self._total_weight = torch.tensor(float(total_weight), device=runner.model.device)
        self._graph = torch.cuda.CUDAGraph()
        # NCCL has a thread that asks the card whether transfers are done; those calls do not spoil a recording
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        mode = "thread_local" if several else "global"
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode=mode):
            forward_backward(runner.model, batch, self._total_weight, runner.loss_and_correct_2)

    def replay(self, batch: Batch, total_weight: float) -> None:
        for static, given in zip(self._batch, batch, strict=True):
            if isinstance(static, torch.Tensor) and isinstance(given, torch.Tensor) and static is not given:
                static.copy_(given, non_blocking=True)
        self._total_weight.fill_(total_weight)
        self._graph.replay()


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
