"""Which processes of this machine are ranks of a run, and what became of them: all of them are real."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from solotune.runtime import rank_processes
from solotune.runtime.rank_processes import RankProcesses, begin, taken

CODE = "import time; time.sleep(60)"
PROGRAM = [sys.executable, "-S", "-c", CODE, "train"]
OURS = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a process as a rank, and wait until it is what it was started as."""
    processes: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(rank_processes, "_own_program", lambda: [os.fsencode(word) for word in PROGRAM])
    monkeypatch.setattr(rank_processes, "AGAIN_SECONDS", 0.0)

    def start(environ: dict[str, str] | None = None, command: list[str] = PROGRAM) -> subprocess.Popen[bytes]:
        processes.append(process := subprocess.Popen(command, env=environ or OURS))
        until = time.monotonic() + 60
        while not Path(f"/proc/{process.pid}/environ").read_bytes() and time.monotonic() < until:
            time.sleep(0.001)  # the kernel is still about to start it
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def of_run() -> RankProcesses:
    return RankProcesses(0, 3, ("127.0.0.1", 29511))


def seen(processes: RankProcesses) -> dict[int, tuple[int, str]]:
    processes.look(1.0)
    return {rank: (one.pid, one.state) for rank, one in processes.latest().items()}


def test_ranks_of_the_same_run_are_seen_and_nothing_else(start: Start) -> None:
    one, two = start(), start({**OURS, "RANK": "2"})
    for other in (
        {"MASTER_PORT": "29512"},  # another run
        {"MASTER_ADDR": "node-7"},
        {"WORLD_SIZE": "4"},
        {"RANK": "0"},  # this rank
        {"RANK": ""},
    ):
        start({**OURS, **other})
    start({**OURS, "RANK": "2"}, [*PROGRAM[:-1], "plan"])  # another command of the same run
    assert seen(of_run()) == {1: (one.pid, "running"), 2: (two.pid, "running")}


def test_another_network_has_other_ranks(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    monkeypatch.setattr(rank_processes, "_network", lambda process: f"net of {process}")
    assert seen(of_run()) == {}


def test_a_rank_is_stopped_goes_on_and_ends(start: Start) -> None:
    process, processes = start(), of_run()
    assert seen(processes) == {1: (process.pid, "running")}
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert seen(processes) == {1: (process.pid, "stopped")}
    assert seen(processes) == {1: (process.pid, "stopped")}
    assert processes.latest()[1].seconds == 1.0
    process.send_signal(signal.SIGCONT)
    os.waitid(os.P_PID, process.pid, os.WCONTINUED)
    assert seen(processes) == {1: (process.pid, "running")}
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # nobody has asked for its exit code
    assert seen(processes) == {1: (process.pid, "gone")}
    process.wait()
    assert seen(processes) == {1: (process.pid, "gone")}
    assert processes.latest()[1].seconds == 1.0


def test_a_rank_that_is_started_again_is_there(start: Start) -> None:
    processes, first = of_run(), start()
    seen(processes)
    first.kill()
    first.wait()
    seen(processes)
    again = start()
    assert seen(processes) == {1: (again.pid, "running")}


def test_a_process_id_that_is_used_again_is_another_process(start: Start) -> None:
    processes = of_run()
    start()
    seen(processes)
    processes._ranks[0].started -= 1
    assert [one.state for one in processes._ranks] == ["running"]
    seen(processes)
    assert processes._ranks[0].state == "gone"


def test_children_of_a_rank_are_no_ranks_even_when_it_is_gone(start: Start) -> None:
    forks = "import os, time; os.fork(); time.sleep(60)"
    command = [*PROGRAM[:3], forks, "train"]
    processes = of_run()
    processes._program = [os.fsencode(word) for word in command]
    process = start(command=command)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    until = time.monotonic() + 60
    while not (found := Path(children).read_text().split()) and time.monotonic() < until:
        time.sleep(0.01)
    try:
        assert seen(processes) == {1: (process.pid, "running")}
        process.kill()
        process.wait()
        assert seen(processes) == {1: (process.pid, "gone")}
    finally:
        os.kill(int(found[0]), signal.SIGKILL)


def test_a_shell_may_become_a_rank(start: Start) -> None:
    words = " ".join(f"'{word}'" for word in PROGRAM)
    processes = of_run()
    with subprocess.Popen(["/bin/sh", "-c", f"read line; exec {words}"], env=OURS, stdin=subprocess.PIPE) as shell:
        assert seen(processes) == {}
        assert shell.stdin is not None
        shell.stdin.write(b"go\n")
        shell.stdin.flush()
        until = time.monotonic() + 60
        while not (found := seen(processes)) and time.monotonic() < until:
            time.sleep(0.01)
        shell.kill()
        assert found == {1: (shell.pid, "running")}


def test_what_was_seen_from_the_start_is_there_when_the_ranks_meet(start: Start) -> None:
    process = start()
    begin({**OURS, "RANK": "0"})
    process.kill()
    process.wait()
    with taken(0, 3, ("127.0.0.1", 29511), has_agent=False) as processes:
        passed: queue.Queue[float] = queue.Queue()
        processes.after_look = passed.put
        assert 0 < passed.get(timeout=60) < 60
        assert processes.latest()[1].state == "gone"
        thread = processes._thread
    assert thread is not None
    thread.join(60)
    assert not thread.is_alive()


def test_a_rank_that_ends_at_once_stays_until_others_have_seen_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_processes, "SEEN_SECONDS", 0.5)
    begun = time.monotonic()
    rank_processes.stay()  # no rank
    assert time.monotonic() - begun < 0.4
    begin({**OURS, "RANK": "0"})
    rank_processes.stay()
    assert time.monotonic() - begun >= 0.5
    with taken(0, 3, ("127.0.0.1", 29511), has_agent=False):
        begun = time.monotonic()
        rank_processes.stay()  # it has begun to meet them
        assert time.monotonic() - begun < 0.4


@pytest.mark.parametrize(
    "changed",
    [
        {"TORCHELASTIC_USE_AGENT_STORE": "True"},
        {"WORLD_SIZE": "1"},
        {"RANK": ""},
        {"MASTER_PORT": "http"},
        {"MASTER_ADDR": ""},
    ],
)
def test_nothing_is_begun_for_one_rank_or_under_torchrun(changed: dict[str, str]) -> None:
    begin({**OURS, **changed})
    assert rank_processes._begun is None
    with taken(0, 3, ("127.0.0.1", 29511), has_agent=True) as processes:
        assert processes._thread is None


def test_another_run_in_the_same_process_looks_for_its_own_ranks(start: Start) -> None:
    begin({**OURS, "RANK": "0", "MASTER_PORT": "29599"})
    first = rank_processes._begun
    start()
    with taken(0, 3, ("127.0.0.1", 29511), has_agent=False) as processes:
        assert processes is not first
        assert list(processes.latest()) == [1]
    assert first is not None
    assert first._ends.is_set()


def test_without_a_process_table_nothing_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: str) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(rank_processes, "_read", read)
    with taken(0, 3, ("127.0.0.1", 29511), has_agent=False) as processes:
        assert processes._thread is None


def test_the_command_line_looks_before_it_imports_anything_else(start: Start) -> None:
    """And with as little as this: torch alone takes seconds."""
    code = (
        "import sys; sys.argv[1:] = ['train']; import solotune.runtime.rank_processes as p; p.begin = lambda env: "
        "print(*(name for name in ('dataclasses', 'pathlib', 'click', 'solotune.errors') if name in sys.modules)); "
        "import solotune.cli"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
