"""Memory that other processes of this machine read in place, from their own cards.

    one    = ShareableBytes(num_bytes, device)
    handle = one.handle()                           JSON, for the other processes
    other  = opened(handle, device)                 there: the same bytes, as a tensor of that process's own card
    one.close_door()                                all have opened it

On GPUs
-------
CUDA's IPC, through torch. The memory is opened in the context of the reading card, not of the one that it is on: a
copy from there is done by the copy engine over NVLink or PCIe, can be recorded in a CUDA graph, and the other card gets
no second context (half a GiB). It works where each process sees one card only (CUDA_VISIBLE_DEVICES). The owner must
keep the memory until all have let go of it.

Expandable segments are switched off for it: to open those, a process takes a file descriptor out of another one
(pidfd_getfd), which Ubuntu allows only to root and to parents.

On CPUs
-------
A file in memory without a name (memfd), which others map through /proc while its door is open. It is gone with the last
process that has it, however that ends.
"""

from __future__ import annotations

import base64
import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

Handle = list[Any]


class ShareableBytes:
    """Bytes on a device that other processes can open; their values are not set."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        """Raises:
        OSError: no memory in files, on a CPU.
        """
        self._file: int | None = None
        if device.type == "cuda" or not num_bytes:
            with _segments_of_fixed_size():
                self.bytes = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            return
        if sys.platform != "linux":
            raise OSError("memory of a process can be mapped by others on Linux only")
        self._file = os.memfd_create("solotune-base")
        os.ftruncate(self._file, num_bytes)
        self.bytes = _mapped(f"/proc/self/fd/{self._file}", num_bytes)

    def handle(self) -> Handle:
        """What another process opens it with.

        Raises:
            RuntimeError: CUDA does not share it.
        """
        if not self.bytes.numel():
            return []
        if self._file is not None:
            return [f"/proc/{os.getpid()}/fd/{self._file}", self.bytes.numel()]
        parts = self.bytes.untyped_storage()._share_cuda_()
        return [base64.b64encode(part).decode() if isinstance(part, bytes) else part for part in parts]

    def close_door(self) -> None:
        """Let no more processes open it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def opened(handle: Handle, device: torch.device) -> torch.Tensor:
    """The bytes that another process has given the handle of.

    Raises:
        RuntimeError: they cannot be read from this card, or process.
    """
    if not handle:
        return torch.empty(0, dtype=torch.uint8, device=device)
    if device.type == "cpu":
        return _mapped(*handle)
    _, *parts = (base64.b64decode(part) if isinstance(part, str) else part for part in handle)
    own = torch.cuda.current_device() if device.index is None else device.index
    storage = torch.UntypedStorage._new_shared_cuda(own, *parts)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _mapped(path: str, num_bytes: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)


@contextlib.contextmanager
def _segments_of_fixed_size() -> Iterator[None]:
    """Allocate without expandable segments in the block."""
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    grow = "expandable_segments:True"
    if grow not in settings:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name for it, torch 2.11 has not
        torch.cuda.memory._set_allocator_settings(settings.replace(grow, "expandable_segments:False"))
        try:
            yield
        finally:
            torch.cuda.memory._set_allocator_settings(settings)
