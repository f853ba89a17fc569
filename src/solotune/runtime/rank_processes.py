"""Look for the other ranks of a run in the process table, from the first moment of a process on.

    begin(os.environ)                  before anything is imported that takes long
    with taken(...) as processes:      until the ranks have met: see `early_ranks`
        processes.latest()             what was last seen of each rank

A process is a rank if it is of the same user, in the same network, runs the same program (interpreter, script, first
argument), and was started with another RANK and the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE. Its children have
these variables too, but are no ranks.

The first look is taken in `begin` itself: beside a main thread that imports, a thread gets few turns. Nothing is looked
for under torchrun, which ends all ranks itself if one dies, nor on a system without /proc. Only the standard library is
imported here, and little of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

TICK_SECONDS = 0.25
AGAIN_SECONDS = 2.0  # until a process that is no rank is read again: a shell may become one
SEEN_SECONDS = 3.0  # from the start of a rank until others have seen it, on a busy machine too
MAX_PASSED = 5.0  # seconds between two looks; more means that this process was stopped with all others (Ctrl-Z)
MAX_SHARE = 0.02  # of a core, for looking: with very many processes there is more time between two looks
MAX_BYTES = 4 << 20  # of variables or a command line
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankProcess:
    """A process of another rank.

    Args:
        started: clock ticks since the machine has started; ids of processes are used again.
        state: `running`, `stopped` or `gone`.
    """

    __slots__ = ("pid", "rank", "seconds", "started", "state")

    def __init__(self, rank: int, pid: int, started: int, state: str = "running", seconds: float = 0.0) -> None:
        self.rank, self.pid, self.started, self.state = rank, pid, started, state
        self.seconds = seconds  # in this state, as far as it was seen

    def look(self, passed: float) -> None:
        """Look again, so many seconds after the last time."""
        found = None if self.state == "gone" else _stat(self.pid)
        state = found[0] if found is not None and found[2] == self.started else "gone"
        self.seconds = self.seconds + passed if state == self.state else 0.0
        self.state = state


class RankProcesses:
    """The other ranks' processes, and the thread that looks for them."""

    def __init__(self, rank: int, size: int, address: tuple[str, int]) -> None:
        self.rank, self.size, self.address = rank, size, address
        self.after_look: Callable[[float], None] | None = None  # called in the thread with the seconds that have passed
        self._variables = {f"MASTER_ADDR={address[0]}", f"MASTER_PORT={address[1]}", f"WORLD_SIZE={size}"}
        self._program = _own_program()
        self._network = _network("self")
        self._ranks = list[RankProcess]()
        self._children = set[tuple[int, int]]()  # of ranks: process and its start
        self._others = dict[int, float]()  # processes that are no ranks: when they were read
        self._lock = threading.Lock()
        self._ends, self._begun_at = threading.Event(), time.monotonic()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look, and go on in a thread; nothing without a process table."""
        if self._thread is None and self._program:
            self.look(0.0)
            self._thread = threading.Thread(target=self._run, name="rank processes", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._ends.set()

    def latest(self) -> dict[int, RankProcess]:
        """Of each rank that was seen the process that decides: one that runs, else the last to have changed."""
        found: dict[int, RankProcess] = {}
        with self._lock:
            for one in sorted(self._ranks, key=lambda one: (one.state == "running", -one.seconds)):
                found[one.rank] = RankProcess(one.rank, one.pid, one.started, one.state, one.seconds)
        return found

    def look(self, passed: float) -> None:
        """Look at the ranks that are known, and for others.

        Args:
            passed: seconds since the last time.
        """
        now = time.monotonic()
        with self._lock, contextlib.suppress(OSError):
            for process in self._ranks:
                process.look(passed)
            known = {process.pid for process in self._ranks if process.state != "gone"}
            pids = {int(name) for name in os.listdir("/proc") if name.isdecimal()} - known
            self._others = {pid: read for pid, read in self._others.items() if pid in pids}
            for pid in sorted(pids):
                if now > self._others.get(pid, -AGAIN_SECONDS) + AGAIN_SECONDS:
                    if self._is_rank(pid, known):
                        known.add(pid)
                    else:
                        self._others[pid] = now

    def _is_rank(self, pid: int, known: set[int]) -> bool:
        """Whether a process is one of another rank, which is kept then."""
        try:
            if pid == os.getpid() or os.stat(f"/proc/{pid}").st_uid != os.geteuid():
                return False
            if _read(f"/proc/{pid}/cmdline").split(b"\0")[: len(self._program)] != self._program:
                return False
            variables = set(os.fsdecode(_read(f"/proc/{pid}/environ")).split("\0"))
            rank = next((int(one[5:]) for one in variables if one.startswith("RANK=")), self.rank)
        except (OSError, ValueError):
            return False  # it is gone, or not a rank of solotune
        if not self._variables <= variables or rank == self.rank or (stat := _stat(pid)) is None or stat[0] == "gone":
            return False
        state, parent, started = stat
        if parent in known:
            self._children.add((pid, started))
        if (pid, started) in self._children or _network(str(pid)) != self._network:
            return False
        self._ranks.append(RankProcess(rank, pid, started, state))
        return True

    def _run(self) -> None:
        # signals must reach the main thread and interrupt its waiting
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        last, pause = time.monotonic(), TICK_SECONDS
        while not self._ends.wait(pause):
            begun, used = time.monotonic(), time.thread_time()
            passed, last = min(begun - last, MAX_PASSED), begun
            self.look(passed)
            if self.after_look is not None:
                self.after_look(passed)
            pause = max(TICK_SECONDS, (time.thread_time() - used) / MAX_SHARE)


_begun: RankProcesses | None = None  # of this process, before it joins the others


def begin(environ: Mapping[str, str]) -> None:
    """Begin to look, if a launcher that is not torchrun has started several ranks; `World` checks what it has set."""
    global _begun
    rank, size, host, port = (environ.get(name, "") for name in VARIABLES)
    is_set = all(text.isdecimal() for text in (rank, size, port)) and bool(host) and int(size) > 1
    if _begun is None and is_set and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _begun = RankProcesses(int(rank), int(size), (host, int(port)))
        _begun.start()


def stay() -> None:
    """Let the others see a rank that ends soon after its start, before it has met them; nothing for other processes."""
    if _begun is not None:
        time.sleep(max(0.0, _begun._begun_at + SEEN_SECONDS - time.monotonic()))


@contextlib.contextmanager
def taken(rank: int, size: int, address: tuple[str, int], *, has_agent: bool) -> Iterator[RankProcesses]:
    """What has been seen since `begin`, and is seen until the end of the block.

    Args:
        has_agent: torchrun has started the ranks, so nothing is looked for.
    """
    global _begun
    found, _begun = _begun, None
    if found is not None and (found.rank, found.size, found.address) != (rank, size, address):
        found.stop()
        found = None
    processes = found or RankProcesses(rank, size, address)
    if not has_agent:
        processes.start()
    try:
        yield processes
    finally:
        processes.stop()


def _stat(pid: int) -> tuple[str, int, int] | None:
    """State, parent and start of a process; None if it is not in the process table."""
    try:
        fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
        state = {b"Z": "gone", b"X": "gone", b"T": "stopped", b"t": "stopped"}.get(fields[0], "running")
        return state, int(fields[1]), int(fields[19])
    except (OSError, IndexError):
        return None


def _own_program() -> list[bytes]:
    """How this process was started, up to its first argument; empty without a process table."""
    count = len(sys.orig_argv) - len(sys.argv[1:])  # interpreter, its options, script
    try:
        return _read("/proc/self/cmdline").rstrip(b"\0").split(b"\0")[: max(count, 1) + 1]
    except OSError:
        return []


def _network(process: str) -> str:
    """The network of a process: two containers may have the same addresses."""
    try:
        return os.readlink(f"/proc/{process}/ns/net")
    except OSError:
        return ""


def _read(path: str) -> bytes:
    """A file of /proc; a small one in one call, since another thread may take its time between two."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = piece = os.read(handle, 1 << 16)
        while piece and len(content) < MAX_BYTES:
            piece = os.read(handle, 1 << 16)
            content += piece
        return content
    finally:
        os.close(handle)
