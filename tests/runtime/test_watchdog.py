"""A process that hangs, watched: its stacks, its message, its exit code; and the two programs that are run as files."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from solotune.dataset.chat import template_process
from solotune.runtime import watchdog, watchdog_process

WATCHED = """
import ctypes, os, time
from solotune.runtime import watchdog
watchdog.LIMIT_SECONDS, watchdog.TIMES_LONGEST = 0.5, 0

def hang_here():
    {hang}

with watchdog.watched():
    watchdog.set_stage("testing")
    hang_here()
"""
HANGS = {
    "sleeps": "time.sleep(60)",
    "runs Python for ever": "while True: pass",
    "native, without Python's lock": "while True: ctypes.CDLL(None).sleep(60)",
}
HOLDS_THE_LOCK = "while True: ctypes.PyDLL(None).sleep(60)"  # a loop, since a signal ends a sleep


def watched(hang: str, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    program = WATCHED.format(hang=hang)
    return subprocess.run([sys.executable, "-c", program], stderr=stderr, text=True, timeout=30)


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS.keys())
def test_a_process_that_hangs_ends_with_9_after_its_stacks_and_a_message(hang: str) -> None:
    done = watched(hang)
    assert done.returncode == watchdog.EXIT_CODE == 9, done.stderr
    assert "in hang_here" in done.stderr
    assert "error: no progress for " in done.stderr and " while testing\n" in done.stderr
    assert "137" not in done.stderr


def test_one_that_holds_pythons_lock_is_killed_and_that_is_said() -> None:
    done = watched(HOLDS_THE_LOCK)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "in hang_here" in done.stderr and "error: no progress for " in done.stderr
    assert done.stderr.endswith("the process is killed (SIGKILL, exit code 137)\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that takes nothing")
def test_a_message_that_cannot_be_written_does_not_keep_the_process_alive() -> None:
    with open("/dev/full", "w") as full:
        assert watched("time.sleep(60)", full.fileno()).returncode == 9


def test_one_that_does_not_hang_leaves_neither_process_nor_thread() -> None:
    program = WATCHED.format(hang="time.sleep(0.1)") + (
        "import threading\nassert threading.enumerate() == [threading.main_thread()]\n"
        "try: os.wait()\nexcept ChildProcessError: print('alone')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "alone\n", "")


def test_signals_interrupt_the_main_thread_not_the_one_that_waits_to_exit() -> None:
    with watchdog.watched():
        mine = watchdog._watcher
        assert mine is not None and mine.exit_thread.is_alive()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
        status = Path(f"/proc/self/task/{mine.exit_thread.native_id}/status")
        if status.exists():
            blocked = int(next(line.split()[1] for line in status.read_text().splitlines() if "SigBlk" in line), 16)
            assert all(blocked >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))


@pytest.mark.parametrize("module", [watchdog_process, template_process], ids=lambda module: module.__name__)
def test_a_program_that_is_run_as_a_file_is_there_and_needs_the_standard_library_alone(module: object) -> None:
    """`python -I -S` sees neither solotune nor what is installed; without arguments each ends at its `sys.argv`."""
    path = Path(str(module.__file__))  # type: ignore[attr-defined]
    assert path.is_file(), f"{path}: the program that a second process runs is not there"
    done = subprocess.run([sys.executable, "-I", "-S", str(path)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1, done.stderr
    assert "sys.argv" in done.stderr and "ModuleNotFoundError" not in done.stderr
