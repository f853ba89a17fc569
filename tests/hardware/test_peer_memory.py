"""Memory of one process, read in place by another."""

from __future__ import annotations

import os

import pytest
import torch

from solotune.hardware import peer_memory
from solotune.hardware.peer_memory import ShareableBytes, opened

CPU = torch.device("cpu")


def test_another_process_reads_it_until_the_door_is_closed() -> None:
    one = ShareableBytes(1000, CPU)
    one.bytes.copy_(torch.arange(1000) % 251)
    handle = one.handle()
    if (pid := os.fork()) == 0:
        other = opened(handle, CPU)
        other[0] = 99  # the same memory, not a copy
        os._exit(0 if torch.equal(other[1:], (torch.arange(1000) % 251)[1:].byte()) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and one.bytes[0] == 99
    kept = opened(handle, CPU)
    one.close_door()
    assert kept[0] == 99
    with pytest.raises(RuntimeError, match="unable to open file"):
        opened(handle, CPU)


def test_an_empty_part_needs_no_memory_of_its_own() -> None:
    assert opened(ShareableBytes(0, CPU).handle(), CPU).numel() == 0


@pytest.mark.parametrize(
    ("name", "settings", "changed"),
    [
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", ["expandable_segments:False"]),
        ("PYTORCH_ALLOC_CONF", "a:1,expandable_segments:True", ["a:1,expandable_segments:False"]),
        ("PYTORCH_ALLOC_CONF", "max_split_size_mb:128", []),
    ],
)
def test_segments_do_not_grow_while_it_is_allocated(name, settings, changed, monkeypatch) -> None:
    """Memory of segments that grow can only be opened by a process that may trace this one."""
    for other in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, settings)
    given: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", given.append)
    with peer_memory._segments_of_fixed_size():
        assert given == changed
    assert given == [*changed, settings] if changed else given == []
