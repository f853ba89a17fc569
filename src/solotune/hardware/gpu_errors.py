"""A GPU that failed, in the user's words: its memory is full, or it is lost. Exit code 7 either way.

    out of memory   the allocator found no room. The card still answers, so it is asked who holds how much:
                        outside = total - free - what this process's allocator has reserved
                    which is other processes, and about half a GiB of driver state for this one.
    lost            an illegal access, an ECC error, a failed launch. CUDA then refuses every later call of the process,
                    so nothing more is asked of the card; what was saved before is whole, and a new process goes on.

Both are recognised along the chain of causes, for the compiler wraps what it did not raise itself. torch reports lost
cards under several types (`AcceleratorError`, plain `RuntimeError` from cuBLAS, cuDNN and Triton), so words decide.

What it does not do: retry, or shrink the batch by itself. A run must be the run that its config describes.
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
OTHERS_MATTER_BYTES = 1 << 30  # below this, what lies outside the run is the driver's own


class Cause(NamedTuple):
    """One way in which a card is lost."""

    words: str  # of CUDA
    problem: str
    first: str  # what to do
    goes_on: bool = True  # whether the same run can then be continued


UNKNOWN = Cause(
    "",
    "the GPU failed, and this process cannot use it any more",
    "see with nvidia-smi whether the card is well",
)
CAUSES = (
    Cause(
        "device-side assert",
        "a kernel on the GPU refused its input, an index out of range most often",
        "run the step with use_cpu: true, which names the place",
    ),
    Cause("no kernel image", "this build of torch has no kernels for this GPU", "solotune doctor", goes_on=False),
    Cause("busy or unavailable", "another process holds the GPU for itself", "end it (nvidia-smi lists it)"),
)
Stage = Literal["loading the model", "training", "evaluating"]
STAGE = "stage"  # the attribute of an exception that has come out of a stage


class DeviceMemory(NamedTuple):
    """Bytes of the card; `reserved` is this process's."""

    total: int
    free: int
    reserved: int

    @property
    def outside(self) -> int:
        return max(0, self.total - self.free - self.reserved)


@contextmanager
def stage(name: Stage) -> Iterator[None]:
    """What the run does within the block, or in the function that this decorates: said with errors that come out of it.

    By it a full card is advised: fewer rows in training do not help an evaluation. It is kept on the exception, since
    the block has been left when somebody answers it; of stages within one another the innermost counts.
    """
    try:
        yield
    except Exception as error:
        vars(error).setdefault(STAGE, name)
        raise


@contextmanager
def device_errors(settings: MemorySettings) -> Iterator[None]:
    """Turns a failure of the GPU inside the block into a `DeviceError`; for what leaves nothing to continue."""
    try:
        yield
    except Exception as error:
        if failure := device_failure(error, settings):
            raise failure from error
        raise


def device_failure(
    error: BaseException, settings: MemorySettings, run: Path | None = None, checkpoint: Path | None = None
) -> DeviceError | None:
    """What `error` says about the GPU, or None where it is about something else.

    Args:
        settings: of the resolved config; what to change is said in its terms.
        run: the directory of a run that can be resumed.
        checkpoint: the newest in it.
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
    """The error and what it was raised from."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _stage_of(error: BaseException) -> Stage | None:
    """The stage that the error, or what it was raised from, has come out of."""
    return next((vars(cause)[STAGE] for cause in _causes(error) if STAGE in vars(cause)), None)


def _lost(cause: BaseException, run: Path | None, checkpoint: Path | None) -> DeviceError:
    said = first_line(cause)
    known = next((cause for cause in CAUSES if cause.words in said), UNKNOWN)
    if run is None:
        return DeviceError(known.problem, seen=said, change=known.first + ", then start again" * known.goes_on)
    saved = f"the last checkpoint is {checkpoint}" if checkpoint else "nothing was saved yet"
    then = f", then continue with: {resume_command(run)}" * known.goes_on
    return DeviceError(f"{known.problem}; {saved}", seen=said, change=known.first + then)


def _out_of_memory(
    cause: BaseException, stage: Stage | None, settings: MemorySettings, run: Path | None
) -> DeviceError:
    wanted = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(cause))
    parts = [f"{wanted[1]} more wanted"] if wanted else []
    memory = gpu_memory()
    crowded = memory is not None and memory.outside > OTHERS_MATTER_BYTES
    if memory is not None:
        held = [f"{gib(memory.reserved)} GiB held by this run", f"{gib(memory.outside)} by other processes"]
        held[1] += " and the driver, which takes about 0.5"
        parts.append(f"of {gib(memory.total)} GiB on the card {', '.join(held)}; {gib(memory.free)} free")
    steps = [f"end the other processes on the card (nvidia-smi lists them){_then(run)}"] if crowded else []
    steps += smaller_settings(settings, stage, run)
    return DeviceError(
        "the GPU's memory is full" + (f" (while {stage})" if stage else ""),
        seen="; ".join(parts) or first_line(cause),
        change=", or ".join(steps) or "a GPU with more memory",
    )


def smaller_settings(settings: MemorySettings, stage: Stage | None, run: Path | None) -> list[str]:
    """What would make this run smaller at this stage, what costs least first; resuming allows only some of it."""
    changes: list[str] = []
    rows, passes = settings.batch_size, settings.accumulation
    if stage == "evaluating" and settings.eval_batch_size > 1:
        changes.append(f"per_device_eval_batch_size: {settings.eval_batch_size // 2}{_then(run)}")
    if stage == "training":
        if rows > 1:
            fewer = rows // 2 if rows % 2 == 0 else 1
            same = f"gradient_accumulation_steps: {passes * rows // fewer} (the same step)"
            changes.append(f"per_device_train_batch_size: {fewer} with {same}")
        if settings.gradient_checkpointing is not True:
            changes.append(f"gradient_checkpointing: true{_then(run)}")
    if settings.base_precision != "nf4" or settings.multiplies_in_fp8:
        changes.append("base_precision: nf4" + (" with matmul_precision: auto" if settings.multiplies_in_fp8 else ""))
    elif settings.base_residency != "quantized":
        changes.append("base_residency: quantized")
    if stage == "training" and len(changes) < 2:
        changes.append(f"max_length: {settings.max_length // 2}")
    return changes


def _then(run: Path | None) -> str:
    return f" and continue with: {resume_command(run)}" if run is not None else ""


def gpu_memory() -> DeviceMemory | None:
    """Of the current GPU; None where there is none, or it does not answer."""
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_initialized():
            return None
        free, total = torch.cuda.mem_get_info()
        return DeviceMemory(total, free, torch.cuda.memory_reserved())
    except Exception:  # whatever a failing driver raises, the message is made without these figures
        return None
