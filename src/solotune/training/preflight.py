"""Run the largest step once before training starts: forward, backward, optimizer, evaluation, save.

Why
---
An out-of-memory error at step 300 costs an afternoon. Memory depends on shapes alone, so the micro-batch with the most
positions (rows x longest row, padding included) needs as much as any other of the run. Compiling happens here too, so
it is not in the time of the run's own steps. And the gradient of the compiled layers is compared with that of the
uncompiled ones: a compiler error is silent, since the loss still falls, only less.

Nothing is different afterwards: the optimizer is a spare one with a learning rate of 0, gradients are set back to zero
and random generators to their state before.

What it does not do
-------------------
Try row lengths that only some steps have (the compiler may need seconds for one of those), or generate samples.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from solotune.config.run_config import RunConfig
from solotune.config.settings import BatchSettings, OptimizerSettings
from solotune.dataset import Example, sampler
from solotune.dataset.collate import Batch, collate_packs
from solotune.dataset.example import lengths_of
from solotune.errors import CheckError
from solotune.evaluation import scores
from solotune.hardware import device_memory
from solotune.hardware.gpu_errors import gpu_memory, smaller_settings
from solotune.model import layers, lora
from solotune.model.loading import TrainableModel
from solotune.run.atomic_io import PREFLIGHT, storage_errors
from solotune.runtime import signals
from solotune.training import checkpoint, loop
from solotune.training.forward_backward import MicroBatchRunner
from solotune.training.optimizer import make_optimizer
from solotune.units import first_line, format_bytes

# Relative to the gradient's norm. Rounding differs between the two and grows with depth: 2 fp8 layers have 0.08. A
# missing part of the gradient gives 0.9.
LARGEST_GRADIENT_ERROR = 0.5
LARGEST_GRADIENT_ERROR_FP8 = 0.8


@dataclass(frozen=True)
class Preflight:
    """Memory and time of the largest step."""

    rows: int
    places: int  # rows x longest row
    loaded_bytes: int  # weights, quantisation state, adapters and their gradients; 0 where torch does not count (CPU)
    optimizer_bytes: int
    peak_bytes: int
    first_step_seconds: float  # with compiling
    step_seconds: float
    evaluation_peak_bytes: int
    gradient_error: float | None  # compiled against uncompiled, relative to its norm; None: not compared
    free_bytes: int | None  # free on the card, without what this process has reserved

    def in_words(self, planned_bytes: int, planned_evaluation_bytes: int = 0) -> str:
        """What was measured, beside what the plan said of a step and of an evaluation."""
        text = f"preflight: the largest step ({self.rows} rows, {self.places:,} tokens with padding) needed "
        text += f"{format_bytes(self.peak_bytes)} ({format_bytes(planned_bytes)} planned)"
        text += f" and {self.step_seconds:.2f} s ({self.first_step_seconds:.0f} s the first time)"
        if self.evaluation_peak_bytes:
            planned = f" ({format_bytes(planned_evaluation_bytes)} planned)" if planned_evaluation_bytes else ""
            text += f"; an evaluation {format_bytes(self.evaluation_peak_bytes)}{planned}"
        if self.gradient_error is not None:
            text += f"; compiled and uncompiled gradients differ by {self.gradient_error:.1%}"
        return text + (
            f"; {format_bytes(self.free_bytes)} of GPU memory are free" if self.free_bytes is not None else ""
        )


@signals.defer_signals()  # an exception raised by a signal while compiling would end the process
def preflight(
    model: TrainableModel,
    train_rows: Sequence[Example],
    validation_rows: Sequence[Example],
    config: RunConfig,
    folder: Path | None,
) -> Preflight:
    """Run the largest step once; the model, its gradients and the random generators are unchanged afterwards.

    Args:
        folder: a test checkpoint is written there and removed again; None: it is not tried.

    Raises:
        CheckError: the step or an evaluation does not fit on the card, or compiled layers have a wrong gradient.
        StorageError: a checkpoint cannot be written there.
    """
    batch = largest_micro_batch(model, train_rows, config.batches)
    random = checkpoint.random_state()
    try:
        device_memory.reset_peak_bytes(model.device)
        loaded = device_memory.allocated_bytes(model.device)
        started = time.perf_counter()
        runner = MicroBatchRunner(model, config.takes_graphs)
        spare = _spare_optimizer(model, config.optimizer)
        optimizer_bytes = _step(runner, batch, spare, config.max_grad_norm, folder)
        first = time.perf_counter() - started
        peak = device_memory.peak_bytes(model.device)
        gradient_error = _check_compiler(model, batch, config.multiplies_in_fp8) if config.torch_compile else None
        if runner.can_record:
            _step(runner, batch, spare, config.max_grad_norm, None)
        started = time.perf_counter()
        _step(runner, batch, spare, config.max_grad_norm, None)
        second = time.perf_counter() - started
        runner.release()
        evaluation_peak = _evaluate(model, validation_rows, config)  # beside the optimizer's state, as in the run
    except torch.OutOfMemoryError as error:
        shape = (batch.input_ids_BT.shape[0], batch.input_ids_BT.shape[1])
        changes = smaller_settings(config.memory, "training", None)
        raise _does_not_fit(error, "the largest step", shape, changes) from error
    finally:
        model.zero_gradients()
        checkpoint.restore_random(random)
        device_memory.reset_peak_bytes(model.device)
    free = torch.cuda.mem_get_info(model.device)[0] if model.device.type == "cuda" else None
    return Preflight(
        rows=len(batch.rows),
        places=batch.input_ids_BT.numel(),
        loaded_bytes=loaded,
        optimizer_bytes=optimizer_bytes,
        peak_bytes=peak,
        first_step_seconds=first,
        step_seconds=second,
        evaluation_peak_bytes=evaluation_peak,
        gradient_error=gradient_error,
        free_bytes=free,
    )


def largest_micro_batch(model: TrainableModel, train_rows: Sequence[Example], batches: BatchSettings) -> Batch:
    """The micro-batch with the most positions that the run can have: its longest rows together, or any full packs."""
    packs, shape = sampler.pack_and_shape(batches, train_rows)
    lengths = np.asarray(lengths_of(train_rows))
    longest = np.argsort([-lengths[list(pack)].sum() for pack in packs], kind="stable")[: batches.batch_size]
    return collate_packs([[train_rows[row] for row in packs[i]] for i in longest], model.device, shape)


def _spare_optimizer(model: TrainableModel, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """An optimizer whose steps change nothing."""
    spare = make_optimizer(settings, [model.flat_params])
    for group in spare.param_groups:
        group["lr"] = 0.0  # and with it AdamW's weight decay
    return spare


def _step(
    runner: MicroBatchRunner, batch: Batch, spare: torch.optim.Optimizer, max_grad_norm: float, folder: Path | None
) -> int:
    """Run one optimizer step that changes nothing, and save a checkpoint of it; the bytes that it leaves allocated."""
    model = runner.model
    before = device_memory.allocated_bytes(model.device)
    model.module.train()
    loop.train_step(model, [batch], spare, max_grad_norm, runner=runner)
    left_bytes = device_memory.allocated_bytes(model.device) - before
    if folder is not None:
        with storage_errors(folder), tempfile.TemporaryDirectory(prefix=PREFLIGHT, dir=folder) as scratch:
            checkpoint.save(Path(scratch), 0, lora.state_dict(model.lora_layers), {}, spare, {})
    return left_bytes


def _evaluate(model: TrainableModel, validation_rows: Sequence[Example], config: RunConfig) -> int:
    """Evaluate the longest held-out rows together; the peak in bytes.

    Raises:
        CheckError: they do not fit on the card.
    """
    device_memory.reset_peak_bytes(model.device)
    order = np.argsort(-np.asarray(lengths_of(validation_rows)), kind="stable")
    longest = [validation_rows[row] for row in order[: config.per_device_eval_batch_size]]
    if longest:
        try:
            scores.score(model, longest, len(longest))
        except torch.OutOfMemoryError as error:
            changes = smaller_settings(config.memory, "evaluating", None)
            tokens = max(lengths_of(longest))
            raise _does_not_fit(error, "an evaluation", (len(longest), tokens), changes) from error
    return device_memory.peak_bytes(model.device)


def _check_compiler(model: TrainableModel, batch: Batch, in_fp8: bool) -> float | None:
    """Compare the gradient of the compiled layers with the uncompiled one; None if memory is too small to compare.

    Returns: the relative difference, which is rounding.
    Raises:
        CheckError: it is more. torch 2.11 gave an fp8 base's inputs a gradient of zeros, and the loss still fell.
    """
    gradients = []
    for context in (nullcontext, layers.eager_layers):
        lora.seed_dropout(model.lora_layers, 0)
        model.zero_gradients()
        try:
            with context():
                losses_N, _ = model.token_losses(batch)
                losses_N.mean().backward()
        except torch.OutOfMemoryError:
            if context is nullcontext:
                raise
            return None  # an uncompiled layer needs more memory
        assert model.flat_params.grad is not None
        gradients.append(model.flat_params.grad.clone())
    compiled, own = gradients
    error = ((compiled - own).norm() / own.norm().clamp(min=torch.finfo(own.dtype).tiny)).item()
    allowed = LARGEST_GRADIENT_ERROR_FP8 if in_fp8 else LARGEST_GRADIENT_ERROR
    if not error < allowed:
        raise CheckError(
            f"preflight: compiled and uncompiled gradients differ (torch {torch.__version__})",
            seen=f"a difference of {error:.0%}, relative to the gradient's norm",
            allowed=f"less than {allowed:.0%}, which is rounding",
            change="torch_compile: false, or another version of torch; please report it to solotune",
        )
    return error


def _does_not_fit(error: torch.OutOfMemoryError, what: str, shape: tuple[int, int], changes: list[str]) -> CheckError:
    memory = gpu_memory()
    held = f"; {format_bytes(memory.outside)} of the card are used outside this process" if memory else ""
    return CheckError(
        f"preflight: {what} of this run does not fit in GPU memory",
        seen=f"{shape[0]} x {shape[1]:,} tokens: {first_line(error)}{held}",
        change=" or ".join(changes[:2]),
    )
