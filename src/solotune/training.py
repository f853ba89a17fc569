"""The training loop, whole and visible.

One optimizer step sees `per_device_train_batch_size * gradient_accumulation_steps` rows. Its loss is the weighted mean
over *all* their supervised tokens n:

    loss = sum_n w_n l_n / sum_n w_n

where w_n is the answer's weight times the row's (`dataset/messages.py`), 1 unless the data says otherwise. Each pass
adds its part of the upper sum divided by the lower sum of the whole step, so 1 x 8 rows and 8 x 1 rows are the same
step, and a row of weight 2 is the same as that row given twice. The mean of the passes' means, the other common way,
weights a token by how short its neighbours are.

Before the optimizer moves, loss, gradient, adapters and moments must be finite (`finite.py`); if not, the run stops,
its weights as they were, and says what was not. A stop signal ends the run after the micro-batch in hand: its step is
left out, and what was done before is saved. The learning rate is Hugging Face's schedule of the same name, step for
step; row order is a permutation drawn from (seed, epoch), so a run can be resumed knowing only its step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from solotune import checkpoint, evaluation, finite, lora, signals
from solotune.batch import Batch, PackShape, collate_packs
from solotune.config import RunConfig
from solotune.dataset import Example
from solotune.dataset.example import lengths_of
from solotune.dataset.pack import pack
from solotune.device_failure import stage
from solotune.errors import InterruptedRunError, NonFiniteError, resume_command
from solotune.events import EvalEvent, NonFiniteEvent, SaveEvent, StepEvent
from solotune.model import TrainableModel
from solotune.observer import Observers, RunObserver
from solotune.passes import Passes, accumulate
from solotune.record import RunDirectory
from solotune.run_log import RunLog
from solotune.run_record import RunRecord
from solotune.signals import StopRequested


class StepResult(NamedTuple):
    """What one optimizer step measured; `loss` is nats per supervised token over the whole step, by weight."""

    loss: float
    token_accuracy: float  # the plain share of the supervised tokens
    grad_norm: float  # before clipping


@dataclass(frozen=True)
class Schedule:
    """How many steps there are, and which rows (or packs of rows) each of them sees."""

    num_rows: int
    micro_batch_size: int
    accumulation: int
    total_steps: int
    seed: int

    @classmethod
    def of(cls, config: RunConfig, num_rows: int) -> Schedule:
        rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
        per_epoch = math.ceil(num_rows / rows_per_step)
        total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
        return cls(num_rows, config.per_device_train_batch_size, config.gradient_accumulation_steps, total, config.seed)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / (self.micro_batch_size * self.accumulation))

    def epoch_at(self, step: int) -> float:
        """Epochs done after `step` steps."""
        return step / self.steps_per_epoch

    def row_order(self, epoch: int) -> np.ndarray:
        """int64 (num_rows,): the permutation of rows in an epoch (counted from 0)."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)

    def steps(self, done: int) -> Iterator[list[list[int]]]:
        """The micro-batches (lists of row numbers) of each step after `done`; an epoch's last step may be shorter."""
        rows_per_step = self.micro_batch_size * self.accumulation
        order_epoch, order = -1, np.empty(0, np.int64)
        for step in range(done, self.total_steps):
            epoch, within = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order_epoch, order = epoch, self.row_order(epoch)
            rows = order[within * rows_per_step : (within + 1) * rows_per_step].tolist()
            yield [rows[i : i + self.micro_batch_size] for i in range(0, len(rows), self.micro_batch_size)]


def sequences(config: RunConfig, rows: Sequence[Example]) -> list[list[int]] | np.ndarray:
    """The row numbers of each training sequence: one row each, or packs of them."""
    if not config.packing:
        return np.arange(len(rows))[:, None]
    return pack(lengths_of(rows), config.max_length)


def packs_of(config: RunConfig, rows: Sequence[Example]) -> tuple[list[list[int]] | np.ndarray, PackShape | None]:
    """The training sequences, and what packs of them are padded to: compiled passes should have one shape."""
    packs = sequences(config, rows)
    if not (config.packing and config.torch_compile):
        return packs, None
    return packs, PackShape.of(packs, config.per_device_train_batch_size, config.max_length)


def make_optimizer(config: RunConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW as `optim` names it; bitsandbytes' keeps its moments in 8 bits and, paged, lets them spill to the host."""
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optim == "adamw_torch":
        return torch.optim.AdamW(parameters, **options)
    import bitsandbytes as bnb

    kinds = {
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    return kinds[config.optim](parameters, **options)


def learning_rate_at(config: RunConfig, step: int, total_steps: int) -> float:
    """The rate of step `step` (counted from 0): transformers' schedule of the same name, so a warm-up starts at 0.

    A plain function and no scheduler object: resuming needs no state, and a plan or a diagnosis can ask for any step.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    if step < warmup and config.lr_scheduler_type != "constant":
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    shape = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
        "constant_with_warmup": 1.0,
    }
    return config.learning_rate * max(0.0, shape[config.lr_scheduler_type])


def train_step(
    model: TrainableModel,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    dropout_seed: tuple[int, ...] = (0,),
    passes: Passes | None = None,
) -> StepResult:
    """One optimizer step over the whole accumulated batch.

    Args:
        dropout_seed: tells this step's dropout from that of others.
        passes: of this model; kept from step to step, they become CUDA graphs where shapes repeat.

    Raises:
        NonFiniteError: something is NaN or infinite; nothing has been changed.
        StopRequested: by a signal, between two micro-batches; nothing has been changed.
    """
    random = checkpoint.random_state()
    num_supervised = sum(batch.num_supervised for batch in micro_batches)
    total_weight = sum(batch.total_weight for batch in micro_batches)
    passes = passes or Passes(model)
    passes.sums_2.zero_()
    for number, batch in enumerate(micro_batches):
        lora.seed_dropout(model.adapted, *dropout_seed, number)
        passes.run(accumulate, batch, total_weight)  # forward and backward, or the CUDA graph of both
        try:
            signals.poll()
        except StopRequested:
            model.zero_gradients()
            checkpoint.restore_random(random)
            raise
    loss_sum, hits = passes.sums_2
    grad_norm = clip_grad_norm_(model.trainable, max_grad_norm)
    figures = [loss_sum / total_weight, hits / num_supervised, grad_norm, *finite.norms(model, optimizer)]
    loss, accuracy, norm, *state = torch.stack(figures).tolist()
    if not finite.all_sound([loss, norm, *state]):
        passes.release()
        raise finite.stopped(
            finite.examine(model, optimizer, micro_batches, dropout_seed, random), f"loss {loss}, gradient norm {norm}"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # gradients are views of one vector
    return StepResult(loss, accuracy, norm)


@stage("training")
@signals.held_back()
def train(
    model: TrainableModel,
    train_rows: Sequence[Example],
    validation_rows: Sequence[Example],
    config: RunConfig,
    run: RunDirectory,
    observer: RunObserver,
    resume_from: checkpoint.Checkpoint | None = None,
    fingerprints: dict[str, Any] | None = None,
) -> evaluation.Score | None:
    """Trains the adapters of `model` and writes metrics and checkpoints into `run`.

    Args:
        observer: told of each step, evaluation and checkpoint, after the run's own log has it.
        resume_from: go on after this checkpoint's step.
        fingerprints: of config and data, kept in each checkpoint.

    Returns: the held-out score after the last step, where there are validation rows.
    Raises:
        NonFiniteError: see `train_step`; raised with the step's number.
        InterruptedRunError: a stop signal came; what was done is saved.
        StorageError: metrics or a checkpoint cannot be written.
    """
    observer = Observers(RunLog(run), observer)
    packs, shape = packs_of(config, train_rows)
    schedule = Schedule.of(config, len(packs))
    optimizer = make_optimizer(config, [model.joined])
    done = _set_up(model, optimizer, config.seed, resume_from)
    passes = Passes(model, config)
    evals = _Evaluations(passes, validation_rows, config, schedule, observer)
    saves = _Saves(model, optimizer, config, schedule, run, observer, fingerprints or {}, done)
    score = None
    try:
        observer.begin(schedule.total_steps, done)
        if evals.is_due(done) and _lacks_evaluation(run, done):  # the run was stopped in it
            score = evals.make(done)
        for step, micro_batches in enumerate(schedule.steps(done), start=done + 1):
            started = time.perf_counter()
            chosen = [[[train_rows[row] for row in packs[i]] for i in numbers] for numbers in micro_batches]
            batches = [collate_packs(part, model.device, shape) for part in chosen]
            learning_rate = _set_learning_rate(optimizer, learning_rate_at(config, step - 1, schedule.total_steps))
            try:
                result = train_step(model, batches, optimizer, config.max_grad_norm, (config.seed, step), passes)
            except NonFiniteError as error:
                raise _not_finite(error, step, batches, observer) from None
            done = step
            observer.step(_step_event(step, schedule, result, learning_rate, batches, started, model.device))
            if evals.is_due(step):
                score = evals.make(step)
            if saves.is_due(step):
                saves.make(step)
    except StopRequested as stop:
        if done > saves.newest:
            saves.make(done)
        observer.finish()
        raise _interrupted(stop, done, run) from None
    observer.finish()
    if passes.why_not:
        observer.note(f"passes were launched one kernel after the other, without a CUDA graph: {passes.why_not}")
    return score


def _set_up(
    model: TrainableModel, optimizer: torch.optim.Optimizer, seed: int, point: checkpoint.Checkpoint | None
) -> int:
    """Seeds the random generators, or puts them, adapters and moments to where they were; the step that is done."""
    model.module.train()
    torch.manual_seed(seed)
    if point is None:
        return 0
    lora.load_state_dict(model.adapted, point.adapter, f"step {point.step}")
    checkpoint.restore_optimizer(optimizer, point, [model.joined])
    checkpoint.restore_random(point.random)
    return point.step


def _set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> float:
    """The rate, which the optimizer has now."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    return learning_rate


def _not_finite(error: NonFiniteError, step: int, batches: Sequence[Batch], observer: RunObserver) -> NonFiniteError:
    """The error with its step, which the observer has been told."""
    observer.failed(NonFiniteEvent(step, [row.where for batch in batches for row in batch.rows], **error.facts))
    return error.at(f"step {step}")


def _lacks_evaluation(run: RunDirectory, step: int) -> bool:
    """Whether the step was recorded, and no evaluation after it."""
    record = RunRecord.read(run.path)
    return any(e.step == step for e in record.steps) and not any(e.step == step for e in record.evals)


def _step_event(
    step: int,
    schedule: Schedule,
    result: StepResult,
    learning_rate: float,
    batches: Sequence[Batch],
    started: float,
    device: torch.device,
) -> StepEvent:
    """What is recorded of a step that began at `started` (of `time.perf_counter`) and ends now."""
    seconds = time.perf_counter() - started
    tokens = sum(batch.num_tokens for batch in batches)
    return StepEvent(
        step=step,
        total_steps=schedule.total_steps,
        epoch=schedule.epoch_at(step),
        loss=result.loss,
        token_accuracy=result.token_accuracy,
        learning_rate=learning_rate,
        grad_norm=result.grad_norm,
        num_tokens=tokens,
        num_supervised=sum(batch.num_supervised for batch in batches),
        total_weight=sum(batch.total_weight for batch in batches),
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        peak_bytes=peak_bytes(device),
    )


def _interrupted(stop: StopRequested, done: int, run: RunDirectory) -> InterruptedRunError:
    what = f"stopped after step {done}; checkpoint saved" if done else "stopped in the first step; nothing to save yet"
    return InterruptedRunError(stop.number, what, f"continue with: {resume_command(run.path)}")


@dataclass
class _Evaluations:
    """When the held-out rows are evaluated, and how."""

    passes: Passes
    rows: Sequence[Example]
    config: RunConfig
    schedule: Schedule
    observer: RunObserver

    def is_due(self, step: int) -> bool:
        """Every `eval_steps`, and after the last step in any case."""
        every = self.config.every("eval", self.schedule.steps_per_epoch)
        last = step == self.schedule.total_steps
        return bool(self.rows) and (last or bool(every and step % every == 0))

    def make(self, step: int) -> evaluation.Score:
        self.passes.release()  # its batches have other shapes and need the graphs' memory
        score = evaluation.score(self.passes.model, self.rows, self.config.per_device_eval_batch_size)
        self.observer.evaluated(EvalEvent(step, score.exact_match, **score.to_json()), score.rows)
        return score


@dataclass
class _Saves:
    """When checkpoints are written, and how."""

    model: TrainableModel
    optimizer: torch.optim.Optimizer
    config: RunConfig
    schedule: Schedule
    run: RunDirectory
    observer: RunObserver
    fingerprints: dict[str, Any]
    newest: int  # step that is saved

    def is_due(self, step: int) -> bool:
        """Every `save_steps` and after the last step; never with `save_strategy: no`."""
        every = self.config.every("save", self.schedule.steps_per_epoch)
        return bool(every) and (step == self.schedule.total_steps or step % every == 0)

    def make(self, step: int) -> None:
        """Raises NonFiniteError where what would be saved is not finite."""
        if problem := finite.why_not_to_save(self.model, self.optimizer):
            self.observer.failed(NonFiniteEvent(step, tensors=problem))
            raise NonFiniteError(f"step {step}: not finite after the update, and not saved", seen=", ".join(problem))
        adapter = lora.state_dict(self.model.adapted)
        peft_config = lora.peft_config(self.config, self.model.adapted, self.model.module)
        state = {"fingerprints": self.fingerprints, "metrics": self.run.mark()}
        path = checkpoint.save(self.run.checkpoints, step, adapter, peft_config, self.optimizer, state)
        checkpoint.keep_newest(self.run.checkpoints, self.config.save_total_limit, step)
        self.newest = step
        self.observer.saved(SaveEvent(step, path.name), path)


def reset_peak_bytes(device: torch.device) -> None:
    """Begins to look for the largest memory anew, where the device can (CUDA)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def allocated_bytes(device: torch.device) -> int:
    """What tensors take now, where the device can say (CUDA); else 0."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_bytes(device: torch.device) -> int:
    """The largest memory so far: the allocator's on CUDA, the process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
