"""Recognise failures of the GPU, out of memory or lost, and explain them. Exit code 7 either way.

Out of memory
-------------
The allocator found no room. The card still answers, so the message says who uses how much:
    outside = total - free - reserved by this process's allocator
which is other processes, and about half a GiB of driver state for this one.

Lost
----
An illegal access, an ECC error, a failed launch, in a kernel or a copy. CUDA reports it at whichever call comes next,
and then refuses every later call of the process, so the card is not queried: its name is what torch remembers. Files
that were saved before are complete, and a new process can resume.

How they are recognised
-----------------------
Along the chain of causes, because the compiler wraps exceptions; and by the text, because torch reports lost cards
under several types (`AcceleratorError`, plain `RuntimeError` from cuBLAS, cuDNN and Triton).

What it does not do: retry, or shrink the batch. A run must be the run that its config describes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from solotune.config.settings import MemorySettings
from solotune.errors import DeviceError, SolotuneError, resume_command
from solotune.units import first_line, gib

MEMORY_WORDS = re.compile(r"(CUDA|CUDA driver) error: out of memory|\[CUDA\]: out of memory|CUBLAS_STATUS_ALLOC_FAILED")
LOST_WORDS = re.compile(r"(CUDA|CUDA driver|cuDNN) error|Triton Error \[CUDA\]|CUBLAS_STATUS_|CUDNN_STATUS_")
OTHERS_MATTER_BYTES = 1 << 30  # less memory than this outside the run is the driver's own


class Cause(NamedTuple):
    """A known way to lose a card."""

    words: str  # in CUDA's message
    problem: str
    fix: str
    can_resume: bool = True  # whether the same run can be continued after the fix


UNKNOWN = Cause(
    "",
    "the GPU failed, and this process cannot use it any more",
    "check the card (nvidia-smi; Xid errors in dmesg)",
)
CAUSES = (
    Cause(
        "ECC error",
        "the memory of the GPU has an error that ECC cannot correct",
        "reset the card (nvidia-smi --gpu-reset, or restart the machine)",
    ),
    Cause(
        "device-side assert",
        "a GPU kernel got invalid input, most often an index out of range",
        "run it with use_cpu: true to see the exact error",
    ),
    Cause(
        "no kernel image", "this build of torch has no kernels for this GPU", "run: solotune doctor", can_resume=False
    ),
    Cause(
        "busy or unavailable", "another process has exclusive use of the GPU", "end that process (nvidia-smi lists it)"
    ),
)
Stage = Literal["loading the model", "training", "evaluating"]
STAGE = "stage"  # attribute of an exception: the stage that raised it


class DeviceMemory(NamedTuple):
    """Memory of the card in bytes; `reserved` is this process's share."""

    total: int
    free: int
    reserved: int

    @property
    def outside(self) -> int:
        return max(0, self.total - self.free - self.reserved)


@contextmanager
def stage(name: Stage) -> Iterator[None]:
    """Name what the run does in the block, or in the decorated function, for errors that leave it.

    Advice for a full card depends on it: fewer rows in training do not help an evaluation. The name is stored on the
    exception, which is handled after the block was left; the innermost of nested stages counts.
    """
    try:
        yield
    except Exception as error:
        vars(error).setdefault(STAGE, name)
        raise


@contextmanager
def device_errors(settings: MemorySettings) -> Iterator[None]:
    """Turn a GPU failure in the block into a `DeviceError`; for work that cannot be resumed."""
    try:
        yield
    except Exception as error:
        if failure := device_failure(error, settings):
            raise failure from error
        raise


def device_failure(
    error: BaseException, settings: MemorySettings, run: Path | None = None, checkpoint: Path | None = None
) -> DeviceError | None:
    """The `DeviceError` for a failure of the GPU; None for any other error.

    Args:
        settings: of the resolved config; the suggested change starts from them.
        run: directory of a run that can be resumed.
        checkpoint: the newest checkpoint in it.
    """
    if isinstance(error, SolotuneError):
        return None
    torch = sys.modules.get("torch")
    for cause in _causes(error):
        full = torch is not None and isinstance(cause, torch.OutOfMemoryError)
        if full or (isinstance(cause, RuntimeError) and MEMORY_WORDS.search(str(cause))):
            return _out_of_memory(cause, _stage_of(error), settings, run)
        lost = torch is not None and isinstance(cause, torch.AcceleratorError)
        if lost or (isinstance(cause, RuntimeError) and LOST_WORDS.search(str(cause))):
            return _lost(cause, run, checkpoint)
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and the chain of errors that it was raised from."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _stage_of(error: BaseException) -> Stage | None:
    """The stage of the error or of one of its causes."""
    return next((vars(cause)[STAGE] for cause in _causes(error) if STAGE in vars(cause)), None)


def _lost(cause: BaseException, run: Path | None, checkpoint: Path | None) -> DeviceError:
    message, card = first_line(cause), current_card()
    known = next((cause for cause in CAUSES if cause.words in message), UNKNOWN)
    seen = f"{message} ({card})" if card else message
    if run is None:
        return DeviceError(known.problem, seen=seen, change=known.fix + ", then start again" * known.can_resume)
    saved = f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved yet"
    then = f", then continue with: {resume_command(run)}" * known.can_resume
    return DeviceError(f"{known.problem}; {saved}", seen=seen, change=known.fix + then)


def _out_of_memory(
    cause: BaseException, stage: Stage | None, settings: MemorySettings, run: Path | None
) -> DeviceError:
    request = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(cause))
    parts = [f"tried to allocate {request[1]}"] if request else []
    memory = gpu_memory()
    has_others = memory is not None and memory.outside > OTHERS_MATTER_BYTES
    if memory is not None:
        used = f"{gib(memory.reserved)} used by this run, {gib(memory.outside)} by other processes"
        used += f" and the driver (about 0.5), {gib(memory.free)} free"
        parts.append(f"the card has {gib(memory.total)} GiB: {used}")
    steps = [f"end the other processes on the card (nvidia-smi lists them){_then(run)}"] if has_others else []
    steps += smaller_settings(settings, stage, run)
    return DeviceError(
        "out of GPU memory" + (f" (while {stage})" if stage else ""),
        seen="; ".join(parts) or first_line(cause),
        change=", or ".join(steps) or "use a GPU with more memory",
    )


def smaller_settings(settings: MemorySettings, stage: Stage | None, run: Path | None) -> list[str]:
    """Changes that lower memory at this stage, the cheapest first; only some of them are allowed for a resumed run."""
    changes: list[str] = []
    rows, micro_batches = settings.batch_size, settings.accumulation
    if stage == "evaluating" and settings.eval_batch_size > 1:
        changes.append(f"per_device_eval_batch_size: {settings.eval_batch_size // 2}{_then(run)}")
    if stage == "training":
        if rows > 1:
            fewer = rows // 2 if rows % 2 == 0 else 1
            same = f"gradient_accumulation_steps: {micro_batches * rows // fewer} (same rows per step)"
            changes.append(f"per_device_train_batch_size: {fewer} with {same}")
        if settings.gradient_checkpointing is not True:
            changes.append(f"gradient_checkpointing: true{_then(run)}")
    is_resident = settings.base_offload not in ("auto", True) and settings.base_sharding is not True
    if is_resident and settings.base_residency != "dequantized":
        changes.append(f"base_offload: true (frozen layers in host memory){_then(run)}")
    if settings.base_precision != "nf4" or settings.multiplies_in_fp8:
        changes.append("base_precision: nf4" + (" with matmul_precision: auto" if settings.multiplies_in_fp8 else ""))
    elif settings.base_residency != "quantized":
        changes.append("base_residency: quantized")
    if stage == "training" and len(changes) < 2:
        changes.append(f"max_length: {settings.max_length // 2}")
    return changes


def _then(run: Path | None) -> str:
    return f" and continue with: {resume_command(run)}" if run is not None else ""


def current_card() -> str | None:
    """`NVIDIA H200, cuda:1`, as torch remembers it; None if there is none."""
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_initialized():
            return None
        index = torch.cuda.current_device()
        return f"{torch.cuda.get_device_properties(index).name}, cuda:{index}"
    except Exception:  # as in `gpu_memory`
        return None


def gpu_memory() -> DeviceMemory | None:
    """Memory of the current GPU; None if there is none, or if it does not answer."""
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_initialized():
            return None
        free, total = torch.cuda.mem_get_info()
        return DeviceMemory(total, free, torch.cuda.memory_reserved())
    except Exception:  # a failing driver can raise any class; the message then has no figures
        return None
