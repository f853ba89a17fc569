"""The training loop.

One optimizer step uses `per_device_train_batch_size * gradient_accumulation_steps` rows of each rank (one GPU is one
rank). Its loss is the weighted mean over *all* their supervised tokens n:

    loss = sum_n w_n l_n / sum_n w_n

where w_n is the answer's weight times the row's (`messages.py`), 1 unless the data says otherwise.

Why not the mean of means
-------------------------
Each micro-batch adds its part of the numerator, divided by the denominator of the whole step. So 1 x 8 rows and 8 x 1
rows are the same step, and a row of weight 2 equals that row given twice. The mean of the micro-batches' means, the
other common way, gives a token more weight if the other rows of its micro-batch are short.

Non-finite values, signals, resume
----------------------------------
Before the optimizer step, loss, gradient, adapters and moments must be finite (`nonfinite.py`). If not, the run stops
with its weights unchanged and reports what was not finite. A stop signal ends the run after the current micro-batch:
that step is dropped, and the steps before it are saved. The learning rate follows Hugging Face's schedule of the same
name, step for step. Row order is a permutation drawn from (seed, epoch), so a run can be resumed knowing only its step.

Several ranks
-------------
Every rank computes its part of a step (`step_share.py`), divided by the weight of the whole step. One all-reduce after
the last micro-batch sums gradients, losses and hits; then clipping, check and update are the same on all ranks, and so
are the adapters, bit for bit (compared at each save). Rank 0 records and saves; the others have no observer.

`train` is long because the loop is to be read in one place.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.utils import clip_grad_norm_

from solotune.config.run_config import RunConfig
from solotune.config.settings import EvaluationSettings
from solotune.dataset import Example
from solotune.dataset.collate import Batch
from solotune.dataset.sampler import BatchSampler, pack_and_shape
from solotune.display.observer import Observers, RunObserver
from solotune.errors import InterruptedRunError, NonFiniteError, SolotuneError, resume_command
from solotune.evaluation import scores
from solotune.hardware.device_memory import peak_bytes
from solotune.hardware.gpu_errors import stage
from solotune.model import lora
from solotune.model.loading import TrainableModel
from solotune.run.events import EvalEvent, NonFiniteEvent, SaveEvent, StepEvent
from solotune.run.record import RunRecord
from solotune.run.run_dir import RunDirectory
from solotune.run.run_log import RunLog
from solotune.runtime import signals
from solotune.runtime.heartbeat import RankLost, rank_error
from solotune.runtime.signals import StopRequested
from solotune.runtime.world import ALONE, World
from solotune.training import checkpoint, nonfinite
from solotune.training.best_model import BestModel
from solotune.training.forward_backward import MicroBatchRunner, accumulate
from solotune.training.optimizer import learning_rate_at, make_optimizer, set_learning_rate
from solotune.training.step_share import StepRows, StepShare, require_same_adapters


class StepResult(NamedTuple):
    """What one optimizer step measured; `loss` is nats per supervised token over the whole step, by weight."""

    loss: float
    token_accuracy: float  # share of the supervised tokens, not weighted
    grad_norm: float  # before clipping


def train_step(
    model: TrainableModel,
    micro_batches: Sequence[Batch],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    dropout_seed: tuple[int, ...] = (0,),
    runner: MicroBatchRunner | None = None,
    share: StepShare | None = None,
) -> StepResult:
    """One optimizer step over the whole accumulated batch.

    Args:
        dropout_seed: makes the dropout of this step differ from that of other steps.
        runner: of this model. Kept from step to step, it records CUDA graphs where shapes repeat.
        share: of this rank, whose micro-batches these are; None: they are the whole step.

    Raises:
        NonFiniteError: something is NaN or infinite; the weights are unchanged.
        StopRequested: a signal came between two micro-batches, or another rank has ended; the weights are unchanged.
    """
    random = checkpoint.random_state()
    share = share or StepShare.whole(micro_batches)
    runner = runner or MicroBatchRunner(model)
    runner.loss_and_correct_2.zero_()
    try:
        for number, batch in zip(share.numbers, micro_batches, strict=True):
            share.seed_dropout(model, dropout_seed, number)
            runner.run(accumulate, batch, share.total_weight)  # forward and backward, or the CUDA graph of both
            signals.check_stop()
    except StopRequested:
        model.zero_gradients()
        checkpoint.restore_random(random)
        raise
    assert model.flat_params.grad is not None
    # stopped while it waits, this rank leaves its part as it is: another one may still receive it, and make the update
    share.world.all_reduce(model.flat_params.grad, runner.loss_and_correct_2)
    loss_sum, hits = runner.loss_and_correct_2
    grad_norm = clip_grad_norm_(model.trainable, max_grad_norm)
    figures = [loss_sum / share.total_weight, hits / share.num_supervised, grad_norm]
    loss, accuracy, norm, *state = torch.stack([*figures, *nonfinite.norms(model, optimizer)]).tolist()
    if not nonfinite.all_finite([loss, norm, *state]):
        runner.release()
        finding = nonfinite.examine(model, optimizer, share, dropout_seed, random)
        if not nonfinite.all_finite([loss, norm]):  # of the whole step; adapters and moments are of this rank
            finding = nonfinite.examine_together(finding, share)
        raise nonfinite.stopped(finding, f"loss {loss}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # gradients are views of one vector
    return StepResult(loss, accuracy, norm)


@stage("training")
@signals.defer_signals()
def train(
    model: TrainableModel,
    train_rows: Sequence[Example],
    validation_rows: Sequence[Example],
    config: RunConfig,
    run: RunDirectory,
    observer: RunObserver,
    resume_from: checkpoint.Checkpoint | None = None,
    fingerprints: dict[str, Any] | None = None,
    world: World = ALONE,
) -> scores.Score | None:
    """Train the adapters of `model`; write metrics and checkpoints into `run`.

    Args:
        observer: gets each step, evaluation and checkpoint, after the run's own log has it.
        resume_from: continue after this checkpoint's step.
        fingerprints: of config and data, saved in each checkpoint.
        world: the ranks of the run; those other than 0 write nothing.

    Returns: the held-out score of the adapter that the model has at the end: that of the last step, or the best
        (`load_best_model_at_end`). None without validation rows.
    Raises:
        NonFiniteError: see `train_step`; raised with the step's number.
        InterruptedRunError: a stop signal came; the finished steps are saved.
        RankError: another rank failed, died or hangs; the finished steps are saved.
        StorageError: metrics or a checkpoint cannot be written.
    """
    observer = Observers(RunLog(run), observer) if world.is_owner else observer
    packs, shape = pack_and_shape(config.batches, train_rows)
    schedule = BatchSampler.of(config.batches, len(packs))
    optimizer = make_optimizer(config.optimizer, [model.flat_params])
    done = _set_up(model, optimizer, config.seed, resume_from)
    runner = MicroBatchRunner(model, config.takes_graphs)
    best = BestModel(model, validation_rows, config.evaluation) if config.evaluation.tracks_best else None
    if best is not None and resume_from is not None:
        best.restore(resume_from, fingerprints or {})
    evals = _Evaluations(runner, validation_rows, config.evaluation, schedule, observer, best, world)
    saves = _Saves(
        model=model,
        optimizer=optimizer,
        peft_config=lora.peft_config(
            config.lora,
            model.lora_layers,
            model.module,
            base=config.model_name_or_path,
            revision=config.model_revision,
        ),
        every=config.every("save", schedule.steps_per_epoch),
        limit=config.save_total_limit,
        total_steps=schedule.total_steps,
        run=run,
        observer=observer,
        fingerprints=fingerprints or {},
        newest=done,
        best=best,
        world=world,
    )
    step_rows = StepRows(train_rows, packs, schedule, shape, model.device, world)
    score = None
    is_over = resume_from is not None and bool(resume_from.state.get("is_over"))
    try:
        observer.begin(schedule.total_steps, done)
        # the run may have been stopped during this evaluation
        if evals.is_due(done) and world.broadcast(lambda: _lacks_evaluation(run, done)):
            score = evals.make(done)
        for step, micro_batches in enumerate(schedule.steps(done), start=done + 1):
            if is_over or (best is not None and best.is_out_of_patience):
                break
            started = time.perf_counter()
            share = step_rows.share(micro_batches)
            learning_rate = set_learning_rate(
                optimizer, learning_rate_at(config.schedule, step - 1, schedule.total_steps)
            )
            try:
                seeds = (config.seed, step)
                result = train_step(model, share.batches, optimizer, config.max_grad_norm, seeds, runner, share)
            except NonFiniteError as error:
                raise _not_finite(error, step, share, observer) from None
            done = step
            observer.step(_step_event(step, schedule, result, learning_rate, share, started, model.device))
            if evals.is_due(step):
                score = evals.make(step)
            if saves.is_due(step):
                saves.make(step)
        if saves.every and done > saves.newest:  # stopped early
            saves.make(done)
    except StopRequested as stop:
        if done > saves.newest and world.is_owner:
            saves.make(done, is_alone=True)
        observer.finish()
        raise _interrupted(world.why(stop), done, run, saves.newest) from None
    observer.finish()
    if runner.unsupported_reason:
        observer.note(
            f"CUDA graphs were not used (training is slower, the results are the same): {runner.unsupported_reason}"
        )
    return _end_with_best(best, done, schedule.total_steps, observer) or score


def _end_with_best(best: BestModel | None, done: int, total_steps: int, observer: RunObserver) -> scores.Score | None:
    """Say why the run ended early, and load the best adapter; its score, if it was not the last."""
    if best is None or best.score is None:
        return None
    found = best.put_back()
    if done < total_steps:
        observer.note(
            f"stopped early after step {done} of {total_steps}: {best.evaluations_since} evaluations in a row are not "
            f"better than step {best.step} beyond noise (early_stopping_patience)"
        )
    if found is not None:
        loss = f"held-out loss {found.loss:.4f}"
        observer.note(f"the adapter of step {best.step} is kept, {loss}: no later one is better beyond noise")
    return found


def _set_up(
    model: TrainableModel, optimizer: torch.optim.Optimizer, seed: int, point: checkpoint.Checkpoint | None
) -> int:
    """Seed the random generators, or restore them, adapters and moments; the number of finished steps."""
    model.module.train()
    torch.manual_seed(seed)
    if point is None:
        return 0
    lora.load_state_dict(model.lora_layers, point.adapter, f"step {point.step}")
    checkpoint.restore_optimizer(optimizer, point, [model.flat_params])
    checkpoint.restore_random(point.random)
    return point.step


def _not_finite(error: NonFiniteError, step: int, share: StepShare, observer: RunObserver) -> NonFiniteError:
    """Report the error to the observer; the error with its step."""
    observer.failed(NonFiniteEvent(step, [row.where for row in share.rows], **error.facts))
    return error.at(f"step {step}")


def _lacks_evaluation(run: RunDirectory, step: int) -> bool:
    """Whether the step was recorded without its evaluation."""
    record = RunRecord.read(run.path)
    return any(e.step == step for e in record.steps) and not any(e.step == step for e in record.evals)


def _step_event(
    step: int,
    schedule: BatchSampler,
    result: StepResult,
    learning_rate: float,
    share: StepShare,
    started: float,
    device: torch.device,
) -> StepEvent:
    """The record of a step that started at `started` (`time.perf_counter`) and ends now."""
    seconds = time.perf_counter() - started
    return StepEvent(
        step=step,
        total_steps=schedule.total_steps,
        epoch=schedule.epoch_at(step),
        loss=result.loss,
        token_accuracy=result.token_accuracy,
        learning_rate=learning_rate,
        grad_norm=result.grad_norm,
        num_tokens=share.num_tokens,
        num_supervised=share.num_supervised,
        total_weight=share.total_weight,
        step_seconds=seconds,
        tokens_per_second=share.num_tokens / seconds,
        peak_bytes=peak_bytes(device),
    )


def _interrupted(stop: StopRequested, done: int, run: RunDirectory, saved: int) -> SolotuneError:
    if isinstance(stop, RankLost):
        is_saved = f"checkpoint of step {saved} saved" if saved else "no checkpoint saved yet"
        return rank_error(stop.lost, is_saved, f"continue with: {resume_command(run.path)}")
    what = f"stopped after step {done}; checkpoint saved" if done else "stopped in the first step; no checkpoint saved"
    return InterruptedRunError(stop.number, stop.sender + what, f"continue with: {resume_command(run.path)}")


@dataclass
class _Evaluations:
    """Evaluations of the held-out rows during the run."""

    runner: MicroBatchRunner
    rows: Sequence[Example]
    settings: EvaluationSettings
    schedule: BatchSampler
    observer: RunObserver
    best: BestModel | None
    world: World = ALONE

    def is_due(self, step: int) -> bool:
        """Every `eval_steps`, and always after the last step."""
        every = self.settings.every(self.schedule.steps_per_epoch)
        last = step == self.schedule.total_steps
        return bool(self.rows) and (last or bool(every and step % every == 0))

    def make(self, step: int) -> scores.Score:
        self.runner.release()  # evaluation has other shapes and needs the memory of the graphs
        score = scores.score(self.runner.model, self.rows, self.settings.batch_size, self._progress, self.world)
        if self.best is not None:
            self.best.add(step, score)
        best_step = self.best.step if self.best else None
        self.observer.evaluated(EvalEvent(step, score.exact_match, **score.to_json(), best_step=best_step), score.rows)
        return score

    def _progress(self, done: int, total: int) -> None:
        self.observer.progress(done, total, "held-out rows")


@dataclass
class _Saves:
    """Checkpoints during the run."""

    model: TrainableModel
    optimizer: torch.optim.Optimizer
    peft_config: Mapping[str, Any]
    every: int | None  # steps between two saves; None: none are written
    limit: int | None  # checkpoints that are kept; None: all
    total_steps: int
    run: RunDirectory
    observer: RunObserver
    fingerprints: dict[str, Any]
    newest: int  # the last step that is saved
    best: BestModel | None
    world: World = ALONE

    def is_due(self, step: int) -> bool:
        """Every `save_steps` and after the last step; never with `save_strategy: no`."""
        return bool(self.every) and (step == self.total_steps or step % self.every == 0)

    def make(self, step: int, is_alone: bool = False) -> None:
        """Write the checkpoint of a step, on rank 0.

        Args:
            is_alone: other ranks are not asked whether they have the same adapters: they may be gone, and with them
                their parts of a shared base.

        Raises:
            NonFiniteError: what would be saved is not finite; no checkpoint is written.
            DeviceError: the adapters of another rank are not the same.
        """
        if not is_alone:
            require_same_adapters(self.model, self.world, step)
        if not self.world.is_owner:
            self.newest = step
            return
        reads_frozen = not is_alone or self.model.shared is None
        if problem := nonfinite.nonfinite_tensors(self.model, self.optimizer, reads_frozen):
            self.observer.failed(NonFiniteEvent(step, tensors=problem))
            raise NonFiniteError(
                f"step {step}: values are not finite after the update; no checkpoint was saved", seen=", ".join(problem)
            )
        adapter = lora.state_dict(self.model.lora_layers)
        state = {"fingerprints": self.fingerprints, "metrics": self.run.metrics_offset()}
        tensors = self.best.tensors() if self.best else None
        if self.best:
            state["best"] = self.best.state()
        path = checkpoint.save(self.run.checkpoints, step, adapter, self.peft_config, self.optimizer, state, tensors)
        checkpoint.keep_newest(self.run.checkpoints, self.limit, step)
        self.newest = step
        self.observer.saved(SaveEvent(step, path.name), path)
