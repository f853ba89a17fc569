"""The forward and backward of one micro-batch, and where its shape comes again, both as one CUDA graph.

A pass through a model of 30 layers is several thousand kernels, each launched from Python. On a small model, or beside
a fast card, the card waits for them: 135M parameters at 4 x 2,048 tokens train at half the speed that their kernels
allow. A CUDA graph is the list of those launches, recorded once and replayed by the driver in one call.

What a graph reads has to lie where it lay: ids, places of labels, where rows begin and weights are copied into tensors
of the graph's own before each replay. Shapes have to be the same, so labels are padded with such of weight 0 to a
multiple of a sixteenth of the tokens, one graph for each such number. Packed passes of a run have one shape otherwise
(`batch.PaddedShape`); rows padded to the longest of their batch have not, and mostly stay without.

A graph keeps the memory that its pass takes at its peak, and all graphs share it. A pass of another shape, and
evaluation, need memory beside it, so the graphs are given up first (`release`); recording takes as long as one pass
takes to launch. What is computed is the same either way, with the same kernels in the same order.

What it does not do: graphs of passes that no compiler has seen (they ask the device questions, and draw random numbers
from generators) or that move activations to the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from solotune.dataset.collate import Batch
from solotune.model.loading import TrainableModel
from solotune.units import first_line

LABEL_PARTS = 16  # label numbers are rounded up to such a part of all tokens, which costs a third of that in the head
MAX_WARMUP_PASSES = 64  # passes of one shape in a row, before one is recorded

ForwardBackward = Callable[[TrainableModel, Batch, torch.Tensor | float, torch.Tensor], None]  # as `accumulate`


def accumulate(
    model: TrainableModel, batch: Batch, total_weight: torch.Tensor | float, loss_and_correct_2: torch.Tensor
) -> None:
    """Adds the micro-batch's part to the gradients, and (sum of weighted losses, hits) to `loss_and_correct_2`.

    Args:
        total_weight: of the labels of the whole step.
    """
    losses_N, correct_N = model.token_losses(batch)
    weighted_sum = batch.weighted(losses_N).sum()
    trainable = model.trainable
    # allow_unused: an adapter of a mixture's expert that no token chose
    gradients = torch.autograd.grad(weighted_sum / total_weight, trainable, allow_unused=True)
    found = [(p.grad, g) for p, g in zip(trainable, gradients, strict=True) if p.grad is not None and g is not None]
    torch._foreach_add_([total for total, _ in found], [gradient for _, gradient in found])
    loss_and_correct_2 += torch.stack([weighted_sum.detach(), batch.num_correct(correct_N).to(weighted_sum.dtype)])


class MicroBatchRunner:
    """Runs the micro-batches of one model; `loss_and_correct_2` sums over them until it is zeroed."""

    def __init__(self, model: TrainableModel, takes_graphs: bool = False) -> None:
        """Args:
        takes_graphs: whether CUDA graphs may be recorded.
        """
        self.model = model
        self.loss_and_correct_2 = torch.zeros(2, device=model.device)
        self.unsupported_reason: str | None = None  # why graphs are not recorded any more
        self.can_record = takes_graphs and model.device.type == "cuda"
        self._graphs: dict[int, _Graph] = {}  # by number of labels
        self._pool: Any = None
        self._shape: tuple[Any, ...] = ()  # of the last pass
        self._times_seen, self._patience = 0, 1

    def run(self, forward_backward: ForwardBackward, batch: Batch, total_weight: float) -> None:
        """One micro-batch through `accumulate`, or through the graph that was recorded of it."""
        if not self.can_record:
            forward_backward(self.model, batch, total_weight, self.loss_and_correct_2)
            return
        shape = tuple(
            t is not None and t.shape for t in (batch.input_ids_BT, batch.position_ids_BT, batch.cu_seqlens_S)
        )
        if shape != self._shape:
            if self._graphs:  # a shape that did not last; the next one may have to last longer
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
        """Gives up the graphs and their memory; the next pass is recorded anew."""
        if self._graphs:
            self._graphs.clear()
            self._pool = None
            torch.cuda.empty_cache()

    def _record(self, forward_backward: ForwardBackward, batch: Batch, total_weight: float) -> _Graph | None:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            graph = _Graph(self, forward_backward, batch, total_weight, self._pool)
        except RuntimeError as error:  # a model that looks into its data, or no memory for it: launched as before
            self.unsupported_reason, self.can_record = first_line(error), False
            self.release()
            return None
        self._graphs[len(batch.label_positions_N)] = graph
        return graph


class _Graph:
    """A recorded pass and the tensors that it reads."""

    def __init__(
        self, runner: MicroBatchRunner, forward_backward: ForwardBackward, batch: Batch, total_weight: float, pool: Any
    ) -> None:
        self._batch = batch
        self._total_weight = torch.tensor(float(total_weight), device=runner.model.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            forward_backward(runner.model, batch, self._total_weight, runner.loss_and_correct_2)

    def replay(self, batch: Batch, total_weight: float) -> None:
        for mine, given in zip(self._batch, batch, strict=True):
            if isinstance(mine, torch.Tensor) and isinstance(given, torch.Tensor) and mine is not given:
                mine.copy_(given, non_blocking=True)
        self._total_weight.fill_(total_weight)
        self._graph.replay()


def _rounded_up(number: int, step: int) -> int:
    return -(-number // step) * step
