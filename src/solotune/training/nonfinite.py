"""NaN and infinity, found before the update that would spread them, and named.

    each step     loss, gradient norm, and the norms of the adapters and of the optimizer's moments, as part of the one
                  transfer from the device that a step has (`norms`): reading a vector of the adapters' size once
    each save     every value that is kept and every frozen weight (`nonfinite_tensors`)

The loss alone does not tell: PyTorch's attention on a CPU turns a row of NaN into finite numbers, so an adapter of NaN
gave finite logits, and a run went on with it. A norm is infinite or NaN where one of its values is; it also is where
values are beyond 1e19, whose squares float32 cannot hold, and no weight of a working model comes near that.

When something is found, the step's micro-batches are run once more from the same random state. The same fault again is
in the data or the weights, and will come back (`reproducible`); a step that is sound the second time was a fault of
hardware or driver (`transient`), and the run can be resumed.

What it does not do: look at moments in paged memory in each step (reading them from the host would bring gigabytes over
the bus); they are looked at when they are saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from solotune.dataset.collate import Batch, collate
from solotune.errors import NonFiniteError
from solotune.model import lora
from solotune.model.loading import TrainableModel
from solotune.training import checkpoint
from solotune.training.forward_backward import accumulate

LARGEST = 1e30  # a loss or a norm beyond it is an overflow on its way
NUM_NAMED = 3

Verdict = Literal["transient", "reproducible"]


@dataclass(frozen=True)
class Finding:
    """What was not finite in a step."""

    tensors: list[str]  # where it begins, as far as can be said
    rows: list[str]  # that show it by themselves
    verdict: Verdict
    is_of_state: bool = False  # weights or moments, and not what the rows make of them

    def in_words(self) -> str:
        again = {"transient": "sound when run again", "reproducible": "the same when run again"}[self.verdict]
        return f"{', '.join(self.tensors) or 'the loss'}; {again} ({self.verdict})"


def norms(model: TrainableModel, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Scalars on the device that are finite where the adapters and the moments are."""
    watched = [model.flat_params.detach(), *(moment for _, moment in _moments(optimizer, model.device))]
    return [torch.linalg.vector_norm(tensor) for tensor in watched]


def all_finite(figures: Sequence[float]) -> bool:
    return all(math.isfinite(figure) and abs(figure) < LARGEST for figure in figures)


def stopped(finding: Finding, seen: str) -> NonFiniteError:
    """The error of a step that is not made."""
    if finding.verdict == "transient":
        change = "continue with --resume; if it comes back, look at the card (nvidia-smi -q) and its driver"
    elif finding.rows:
        change = f"look at {', '.join(finding.rows)}"
    elif finding.is_of_state:
        change = "continue with --resume: they were sound when the last checkpoint was saved"
    else:
        change = "a smaller learning_rate, or bf16: false; no single row does it"
    return NonFiniteError(
        "the loss, its gradient or the weights are not finite; stopped before the update, the weights are as they were",
        seen=f"{seen}; {finding.in_words()}",
        change=change,
        facts={"seen": seen, "tensors": finding.tensors, "bad_rows": finding.rows, "verdict": finding.verdict},
    )


def examine(
    model: TrainableModel,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    dropout_seed: tuple[int, ...],
    random: dict[str, torch.Tensor],
) -> Finding:
    """What is not finite in a step that is not, and whether it is again; gradients are zero afterwards.

    Args:
        dropout_seed: of the step.
        random: the generators' state before it.
    """
    model.zero_gradients()
    if not any(batch.total_weight for batch in micro_batches):
        return Finding(["labels: no token of this step is learned, or all have weight 0"], [], "reproducible")
    broken = nonfinite_tensors(model, optimizer)
    is_sound, in_gradients = _run_again(model, micro_batches, dropout_seed, random)
    checkpoint.restore_random(random)
    first = None if is_sound or broken else _first_activation(model, micro_batches)
    rows = [] if is_sound else bad_rows(model, micro_batches)
    if len(rows) == sum(len(batch.rows) for batch in micro_batches) > 1:
        rows = []  # all of them: it is in none
    model.zero_gradients()
    checkpoint.restore_random(random)
    tensors = broken or ([first] if first else []) or in_gradients[:NUM_NAMED]
    return Finding(tensors, rows, "transient" if is_sound and not broken else "reproducible", bool(broken))


def nonfinite_tensors(model: TrainableModel, optimizer: torch.optim.Optimizer) -> list[str]:
    """What of a model and its optimizer is not finite; waits for the device."""
    return [*_broken_adapters(model), *_broken_moments(model, optimizer), *_broken_frozen(model)][:NUM_NAMED]


def bad_rows(model: TrainableModel, micro_batches: Sequence[Batch]) -> list[str]:
    """The rows whose own loss or gradient is not finite, each run alone."""
    found = []
    for row in (row for batch in micro_batches for row in batch.rows):
        losses_N, _ = model.token_losses(collate([row], model.device))
        if not losses_N.requires_grad:
            continue  # nothing of it is learned
        grads = torch.autograd.grad(losses_N.sum(), model.trainable, allow_unused=True)
        if not all(_is_sound(t) for t in (losses_N, *grads) if t is not None):
            found.append(row.where)
    return found


def _run_again(
    model: TrainableModel,
    micro_batches: Sequence[Batch],
    dropout_seed: tuple[int, ...],
    random: dict[str, torch.Tensor],
) -> tuple[bool, list[str]]:
    """Whether the step is sound this time, and else the adapters whose gradients are not."""
    checkpoint.restore_random(random)
    total_weight = sum(batch.total_weight for batch in micro_batches)
    loss_and_correct_2 = torch.zeros(2, device=model.device)
    for number, batch in enumerate(micro_batches):
        lora.seed_dropout(model.lora_layers, *dropout_seed, number)
        accumulate(model, batch, total_weight, loss_and_correct_2)
    assert model.flat_params.grad is not None
    in_gradients = [name for name, part in _adapters(model) if part.grad is not None and not _is_sound(part.grad)]
    figures = torch.stack(
        [loss_and_correct_2[0] / total_weight, torch.linalg.vector_norm(model.flat_params.grad)]
    ).tolist()
    return all_finite(figures), [f"gradient of {name}" for name in in_gradients]


@torch.no_grad()
def _first_activation(model: TrainableModel, micro_batches: Sequence[Batch]) -> str | None:
    """The first module whose output is not finite, in a pass without gradients (which no compiler has seen)."""
    found: list[str] = []

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(first, torch.Tensor) and first.is_floating_point() and not _is_sound(first):
                found.append(f"output of {name}")

        return hook

    hooks = [module.register_forward_hook(hook_of(name)) for name, module in model.module.named_modules() if name]
    try:
        for batch in micro_batches:
            losses_N, _ = model.token_losses(batch)
            if not found and not _is_sound(losses_N):
                found.append("the losses, out of finite hidden states")
            if found:
                return found[0]
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _adapters(model: TrainableModel) -> Iterator[tuple[str, nn.Parameter]]:
    for name, layer in model.lora_layers.items():
        yield f"{name}.lora_A", layer.lora_A
        yield f"{name}.lora_B", layer.lora_B


def _moments(optimizer: torch.optim.Optimizer, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
    """The optimizer's floating-point state on the device; of 8-bit moments that is their scales."""
    for state in optimizer.state.values():
        for name, value in state.items():
            is_there = isinstance(value, torch.Tensor) and value.device.type == device.type
            if is_there and value.is_floating_point() and value.dim() and not getattr(value, "is_paged", False):
                yield name, value


def _broken_adapters(model: TrainableModel) -> list[str]:
    if _is_sound(model.flat_params.detach()):
        return []
    return [f"adapter {name}" for name, part in _adapters(model) if not _is_sound(part.detach())]


def _broken_moments(model: TrainableModel, optimizer: torch.optim.Optimizer) -> list[str]:
    if model.device.type == "cuda":
        torch.cuda.synchronize()  # paged moments are read from the host
    return [
        f"optimizer's {name}"
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not _is_sound(value)
    ]


def _broken_frozen(model: TrainableModel) -> list[str]:
    """Frozen weights, scales of quantised ones and computed tables."""
    adapters = {id(part) for _, part in _adapters(model)}
    return [
        f"frozen {name}"
        for name, tensor in (*model.module.named_parameters(), *model.module.named_buffers())
        if id(tensor) not in adapters and tensor.is_floating_point() and not _is_sound(tensor.detach())
    ]


def _is_sound(tensor: torch.Tensor) -> bool:
    """By one number, without a copy; fp8 (e4m3) has no infinity and no norm, and its NaNs are looked for."""
    if tensor.dtype == torch.float8_e4m3fn:
        codes = tensor.detach().flatten().view(torch.uint8)
        return not any(bool(((part & 0x7F) == 0x7F).any()) for part in codes.split(1 << 24))
    return all_finite([torch.linalg.vector_norm(tensor, dtype=torch.float32).item()])
