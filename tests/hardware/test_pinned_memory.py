"""Host memory that the system pins, refuses to pin, and gives back."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import pytest
import torch

from solotune.config.load import load_config
from solotune.errors import DeviceError
from solotune.hardware import pinned_memory
from solotune.hardware.gpu_errors import device_errors
from solotune.hardware.pinned_memory import pin, pinned_bytes
from solotune.hardware.ram import Ram

GIB = 1 << 30


@pytest.fixture
def driver(monkeypatch):
    """A runtime that answers with `driver.error`, and keeps what is pinned."""
    state = SimpleNamespace(error=0, pinned={})

    def register(pointer, size, flags):
        if not state.error:
            state.pinned[pointer] = size
        return state.error

    runtime = SimpleNamespace(
        cudaHostRegister=register,
        cudaHostUnregister=state.pinned.pop,
        cudaGetErrorString=lambda error: {719: "unspecified launch failure"}[error],
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(pinned_memory, "ram", lambda: Ram(16 * GIB, 2 * GIB))
    return state


def test_a_block_is_pinned_while_it_lives(driver):
    block = torch.zeros(3, 1000)
    pin(block)
    assert driver.pinned == {block.data_ptr(): 12_000}
    del block
    gc.collect()
    assert driver.pinned == {}


@pytest.mark.parametrize(
    ("error", "release", "problem", "change"),
    [
        (2, "6.8.0", "does not pin enough host memory", "raise the memory limit of the container, or stream fewer"),
        (304, "6.8.0", "does not pin enough host memory", "free host memory"),
        (2, "5.15-microsoft-standard-WSL2", "WSL does not pin enough", ".wslconfig"),
        (801, "6.8.0", "this system does not pin host memory", "base_offload: false"),
        (800, "5.15-microsoft-standard-WSL2", "this system does not pin host memory", "base_offload: false"),
        (1, "6.8.0", "host memory cannot be pinned", "base_offload: N"),
    ],
)
def test_a_refusal_names_its_cause_the_sizes_and_what_helps(error, release, problem, change, driver, monkeypatch):
    driver.error = error
    monkeypatch.setattr(pinned_memory.platform, "release", lambda: release)
    with pytest.raises(DeviceError) as caught:
        pin(torch.zeros(1 << 20, dtype=torch.uint8))
    text = str(caught.value)
    assert problem in text and change in text and f"({error})" in text
    assert "of 1 MiB" in text and "2.0 of 16.0 GiB of host memory are free" in text
    assert driver.pinned == {}


def test_a_card_that_was_lost_before_is_no_refusal(driver):
    driver.error = 719
    settings = load_config({"model_name_or_path": "m", "dataset": "d"}).memory
    with pytest.raises(DeviceError) as caught, device_errors(settings):
        pinned_bytes(1000, torch.device("cuda"))
    assert "the GPU failed" in str(caught.value) and "CUDA error: unspecified launch failure (719)" in str(caught.value)
    assert "base_offload" not in str(caught.value)


def test_bytes_for_a_gpu_are_pinned_and_others_are_not(driver):
    block = pinned_bytes(1000, torch.device("cuda"))
    assert driver.pinned == {block.data_ptr(): 1000}
    assert pinned_bytes(1000, torch.device("cpu")).numel() == 1000
    assert pinned_bytes(0, torch.device("cuda")).numel() == 0
    assert list(driver.pinned) == [block.data_ptr()]
