"""The link from host memory to the GPU: measured where other work disturbs it, and compared with its lanes."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

import pytest

from solotune.hardware import doctor, link
from solotune.hardware.link import Lanes, best_seconds


@pytest.mark.parametrize(
    ("seconds", "best", "copies"),
    [
        ([1.0] * 99, 1.0, 10),  # a quiet link: the second round is no faster
        ([9.0] * 5 + [4.0] * 5 + [1.0, 3.0] * 50, 1.0, 20),  # busy at first, or asleep
        ([100.0 / 2**number for number in range(99) for _ in range(5)], 100 / 32, 30),  # it never ends: six rounds
    ],
)
def test_the_best_of_several_rounds(seconds, best, copies, monkeypatch):
    monkeypatch.setattr(link.time, "sleep", lambda _: None)
    left = iter(seconds)
    assert best_seconds(lambda: next(left)) == best
    assert len(seconds) - len(list(left)) == copies


@pytest.mark.parametrize(
    ("speed", "lanes", "status", "fix"),
    [
        (54.9e9, Lanes(5, 16, 5, 16), "ok", None),
        (24.7e9, Lanes(4, 16, 4, 16), "ok", None),
        (24.7e9, Lanes(1, 16, 4, 16), "ok", None),  # asleep again when it was asked
        (12.3e9, Lanes(4, 8, 4, 8), "ok", None),
        (6.2e9, Lanes(4, 4, 4, 16), "warn", "use a slot with 16 lanes, without a riser; only"),
        (12.3e9, Lanes(3, 16, 4, 16), "warn", "end what else copies"),
        (30e9, Lanes(5, 16, 5, 16), "warn", "end what else copies to the GPU, or run on the CPU socket"),
        (40e9, None, "ok", None),
        (6e9, None, "warn", "use a slot with 16 lanes, without a riser, or end what else"),
        (400e9, Lanes(7, 16, 7, 16), "ok", None),  # a generation that is not in the table
    ],
)
def test_a_link_below_what_its_lanes_give_is_a_warning(speed, lanes, status, fix, monkeypatch):
    monkeypatch.setattr(link, "host_to_device_bytes_per_second", lambda: speed)
    monkeypatch.setattr(link, "lanes", lambda: lanes)
    check = doctor._check_link()
    assert check.status == status
    assert check.fix is None if fix is None else check.fix.startswith(fix)
    assert check.found.startswith(f"{speed / 1e9:.1f} GB/s from host memory to the GPU")


def test_a_link_that_is_not_measured(monkeypatch):
    def no_room():
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(link, "host_to_device_bytes_per_second", no_room)
    check = doctor._check_link()
    assert (check.status, check.found) == ("warn", "not measured: CUDA error: out of memory")


@pytest.mark.parametrize(
    ("answer", "lanes"),
    [("4, 8, 4, 16\n1, 1, 1, 1\n", Lanes(4, 8, 4, 16)), ("[N/A], [N/A], [N/A], [N/A]\n", None), ("", None)],
)
def test_what_nvidia_smi_says_of_the_lanes(answer, lanes, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=answer))
    assert link.lanes() == lanes


def test_without_nvidia_smi_nothing_is_known_of_the_lanes(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert link.lanes() is None
