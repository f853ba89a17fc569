"""Detect NaN and infinity before the update that would spread them, and find where they come from.

    each step     loss, gradient norm, and the norms of the adapters and of the optimizer's moments, as part of the one
                  transfer from the device in each step (`norms`): reads a vector of the adapters' size once
    each save     every value that is saved and every frozen weight (`nonfinite_tensors`)

Why norms
---------
The loss alone is not enough: PyTorch's attention on a CPU turns a row of NaN into finite numbers, so an adapter of NaN
gave finite logits and the run continued. A norm is infinite or NaN if one of its values is. It is also infinite if
values are beyond 1e19, whose squares float32 cannot hold; no weight of a working model comes near that.

Transient or reproducible
-------------------------
When something is found, the step's micro-batches are run once more from the same random state. If the fault is there
again, it is in the data or the weights and will come back (`reproducible`). If the second run is finite, it was a fault
of hardware or driver (`transient`), and the run can be resumed.

Moments in paged memory are not checked in each step (reading them from the host would bring gigabytes over the bus),
but when they are saved.
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
from solotune.model.loading import TrainableModel
from solotune.training import checkpoint
from solotune.training.forward_backward import accumulate
from solotune.training.step_share import StepShare

LARGEST = 1e30  # a loss or a norm beyond this will soon overflow
NUM_NAMED = 3

Verdict = Literal["transient", "reproducible"]


@dataclass(frozen=True)
class Finding:
    """What was not finite in a step, and why."""

    tensors: list[str]  # where it starts, as far as known
    rows: list[str]  # rows that show it alone
    verdict: Verdict
    is_of_state: bool = False  # weights or moments themselves are not finite

    def in_words(self) -> str:
        again = {"transient": "finite when run again", "reproducible": "not finite again when run again"}[self.verdict]
        return f"{', '.join(self.tensors) or 'the loss'}; {again} ({self.verdict})"


def norms(model: TrainableModel, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Scalars on the device that are finite if the adapters and the moments are."""
    watched = [model.flat_params.detach(), *(moment for _, moment in _moments(optimizer, model.device))]
    return [torch.linalg.vector_norm(tensor) for tensor in watched]


def all_finite(figures: Sequence[float]) -> bool:
    return all(math.isfinite(figure) and abs(figure) < LARGEST for figure in figures)


def stopped(finding: Finding, seen: str) -> NonFiniteError:
    """The error for a step that is not applied."""
    if finding.verdict == "transient":
        change = "continue with --resume; if it happens again, check the GPU (nvidia-smi -q) and its driver"
    elif finding.rows:
        change = f"check {', '.join(finding.rows)}"
    elif finding.is_of_state:
        change = "continue with --resume: they were finite when the last checkpoint was saved"
    else:
        change = "use a smaller learning_rate, or bf16: false; no single row causes it"
    return NonFiniteError(
        "the loss, the gradient or the weights are not finite; stopped before the update, so the weights are unchanged",
        seen=f"{seen}; {finding.in_words()}",
        change=change,
        facts={"seen": seen, "tensors": finding.tensors, "bad_rows": finding.rows, "verdict": finding.verdict},
    )


def examine(
    model: TrainableModel,
    optimizer: torch.optim.Optimizer,
    share: StepShare,
    dropout_seed: tuple[int, ...],
    random: dict[str, torch.Tensor],
) -> Finding:
    """Find what is not finite in a failed step, and whether it happens again; gradients are zero afterwards.

    Args:
        share: this rank's part of the step.
        dropout_seed: of the step.
        random: the random generators' state before the step.
    """
    model.zero_gradients()
    micro_batches = share.batches
    if not share.total_weight:
        return Finding(["labels: this step trains on no token, or all have weight 0"], [], "reproducible")
    broken = nonfinite_tensors(model, optimizer)
    is_sound, in_gradients = _run_again(model, share, dropout_seed, random)
    checkpoint.restore_random(random)
    first = None if is_sound or broken else _first_activation(model, micro_batches)
    rows = [] if is_sound else bad_rows(model, micro_batches)
    if share.world.size == 1:
        rows = _single(rows, share)
    model.zero_gradients()
    checkpoint.restore_random(random)
    tensors = broken or ([first] if first else []) or in_gradients[:NUM_NAMED]
    return Finding(tensors, rows, "transient" if is_sound and not broken else "reproducible", bool(broken))


def examine_together(finding: Finding, share: StepShare) -> Finding:
    """What all ranks have found in the same failed step, on every rank."""
    if share.world.size == 1:
        return finding
    found = [Finding(*parts) for parts in share.world.all_gather(list(vars(finding).values()))]
    tensors = list(dict.fromkeys(name for one in found for name in one.tensors))
    rows = _single([row for one in found for row in one.rows], share)
    again = any(one.verdict == "reproducible" for one in found)
    is_of_state = any(one.is_of_state for one in found)
    return Finding(tensors[:NUM_NAMED], rows, "reproducible" if again else "transient", is_of_state)


def _single(rows: list[str], share: StepShare) -> list[str]:
    """The rows that show a fault alone; none if all rows of the step do: then no single row causes it."""
    return [] if len(rows) == len(share.rows) > 1 else rows


def nonfinite_tensors(model: TrainableModel, optimizer: torch.optim.Optimizer, reads_frozen: bool = True) -> list[str]:
    """The tensors of a model and its optimizer that are not finite; waits for the device.

    Args:
        reads_frozen: look at frozen weights too.
    """
    frozen = _broken_frozen(model) if reads_frozen else []
    return [*_broken_adapters(model), *_broken_moments(model, optimizer), *frozen][:NUM_NAMED]


def bad_rows(model: TrainableModel, micro_batches: Sequence[Batch]) -> list[str]:
    """The rows whose own loss or gradient is not finite, when each is run alone."""
    found = []
    for row in (row for batch in micro_batches for row in batch.rows):
        losses_N, _ = model.token_losses(collate([row], model.device))
        if not losses_N.requires_grad:
            continue  # no supervised token in it
        grads = torch.autograd.grad(losses_N.sum(), model.trainable, allow_unused=True)
        if not all(_is_sound(t) for t in (losses_N, *grads) if t is not None):
            found.append(row.where)
    return found


def _run_again(
    model: TrainableModel,
    share: StepShare,
    dropout_seed: tuple[int, ...],
    random: dict[str, torch.Tensor],
) -> tuple[bool, list[str]]:
    """Run the step again: whether it is finite this time, and the adapters whose gradients are not."""
    checkpoint.restore_random(random)
    loss_and_correct_2 = torch.zeros(2, device=model.device)
    for number, batch in zip(share.numbers, share.batches, strict=True):
        share.seed_dropout(model, dropout_seed, number)
        accumulate(model, batch, share.total_weight, loss_and_correct_2)
    assert model.flat_params.grad is not None
    in_gradients = [name for name, part in _adapters(model) if part.grad is not None and not _is_sound(part.grad)]
    figures = torch.stack(
        [loss_and_correct_2[0] / share.total_weight, torch.linalg.vector_norm(model.flat_params.grad)]
    ).tolist()
    return all_finite(figures), [f"gradient of {name}" for name in in_gradients]


@torch.no_grad()
def _first_activation(model: TrainableModel, micro_batches: Sequence[Batch]) -> str | None:
    """The first module whose output is not finite, in an uncompiled pass without gradients."""
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
                found.append("the losses, although the hidden states are finite")
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
    """The optimizer's floating-point state on the device; for 8-bit moments, their scales."""
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
    """Frozen weights, scales of quantized ones and computed tables that are not finite."""
    seen = {id(part) for _, part in _adapters(model)}

    def broken(part: nn.Module, prefix: str = "") -> Iterator[str]:
        for name, tensor in (*part.named_parameters(prefix), *part.named_buffers(prefix)):
            if id(tensor) not in seen and tensor.is_floating_point() and not _is_sound(tensor.detach()):
                yield f"frozen {name}"
            seen.add(id(tensor))

    names = {part: name for name, part in model.module.named_modules()}
    streamed = model.ring.visit() if model.ring is not None else ()
    found = [name for layer in streamed for name in broken(layer, names[layer])]
    return [*found, *broken(model.module)]


def _is_sound(tensor: torch.Tensor) -> bool:
    """Whether all values are finite: by the norm, without a copy; in fp8 (e4m3, no infinity) by a search for NaN."""
    if tensor.dtype == torch.float8_e4m3fn:
        codes = tensor.detach().flatten().view(torch.uint8)
        return not any(bool(((part & 0x7F) == 0x7F).any()) for part in codes.split(1 << 24))
    return all_finite([torch.linalg.vector_norm(tensor, dtype=torch.float32).item()])
