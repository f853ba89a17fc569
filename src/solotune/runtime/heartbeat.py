"""Know at once, on every rank, that another one has left, died or hangs.

Each rank writes its state under a key of its own in the store of the ranks, twice a second, from a thread. It reads the
states of all others there:

    {"beats": 71}                                          it works
    {"beats": 72, "left": {"how": "finished"}}             it has done its part
    {"beats": 72, "left": {"how": "stopped", "signal": 15}}
    {"beats": 72, "left": {"how": "failed", "exit_code": 2, "problem": ...}}
    {"beats": 73, "left": {...}, "has_read": true}         it knows why rank 0 leaves

What a rank that says nothing is
--------------------------------
A rank on the same machine is looked up in the process table. If it is gone, it has died (out of memory, kill -9). If it
is stopped (SIGSTOP), it is waited for a while (`STOPPED_SECONDS`). If it runs, it is busy in a native call that holds
Python's global lock: ending such a run would be worse than waiting, and its own watchdog ends a real hang. A rank on
another machine is lost after `SILENT_SECONDS`: that machine or the network between has failed.

Time is counted in ticks of this thread, so a job that is stopped as a whole (Ctrl-Z, a paused container) goes on later.

The store may be in a rank that is stopped, and then answers nobody. So a thread of its own asks it; those who want to
know wait for it for a limited time, and look at the process table all the same.

A rank that is lost becomes a stop request (`RankLost`) at the next stopping point of this process. The loop treats it
as SIGTERM: the steps that are done are saved.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from solotune.errors import RankError
from solotune.regular_files import read_bytes, read_text
from solotune.runtime import signals
from solotune.runtime.signals import StopRequested

TICK_SECONDS = 0.5
STOPPED_SECONDS = 20.0  # torchrun needs 30 more until it kills a worker that is stopped
SILENT_SECONDS = 45.0
SHORT_SECONDS = 3.0  # of silence after a transfer failed
BLOCKED_SECONDS = 10.0  # for a main thread that waits for a lost rank in native code
ANSWER_SECONDS = 2.0  # of the store, for a main thread that leaves, or looks for the reason of an error
KILLED, HUNG = 137, 9  # exit codes: see `errors`

Departure = dict[str, Any]


@dataclass(frozen=True)
class Lost:
    """Why a run has ended on all ranks; the parts of an error for people."""

    problem: str
    exit_code: int
    rank: int | None = None  # which is lost; None: the connection to all
    seen: str | None = None
    allowed: str | None = None
    change: str | None = None
    traceback: str | None = None  # of a bug on that rank


class RankLost(StopRequested):
    """Another rank has failed, died or hangs: stop as for SIGTERM, and say why."""

    def __init__(self, lost: Lost) -> None:
        super().__init__(signal.SIGTERM)
        self.lost = lost


def rank_error(lost: Lost, saved: str | None, change: str) -> RankError:
    """The error that a run ends with when another rank is lost.

    Args:
        saved: what is saved; None: nothing can be.
        change: how to go on; said before it: what to change according to the other rank.
    """
    what = f"{lost.problem}; {saved}" if saved else lost.problem
    how = f"{lost.change}; then {change}" if lost.change else change
    error = RankError(what, lost.exit_code, seen=lost.seen, allowed=lost.allowed, change=how)
    error.rank, error.traceback = lost.rank, lost.traceback
    return error


@dataclass
class Peer:
    """Another rank, and what was last seen of it."""

    rank: int
    pid: int
    host: str  # name of the machine, for messages
    space: str  # of processes: ranks with the same one see each other's process ids
    beats: int = -1
    silent: float = 0.0  # seconds without a new beat
    left: Departure | None = field(default=None)
    has_read: bool = False  # why rank 0 leaves, which may keep the store

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


def machine() -> str:
    """What two processes share if they run on one machine, in whichever containers; elsewhere than Linux, its name."""
    with contextlib.suppress(OSError):
        return read_text("/proc/sys/kernel/random/boot_id", 4096).strip()
    return platform.node()


def process_space() -> str:
    """What two processes share if they see each other's process ids: machine, its name, and namespace."""
    parts = [platform.node(), machine()]
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


class Heartbeat:
    """The thread of one rank that says that it lives, and looks at the others."""

    def __init__(self, store: Any, rank: int, peers: list[Peer]) -> None:
        """Args:
        store: a connection to the store that nothing else uses: a waiting call would keep others from it.
        """
        self._store, self._rank, self._peers = store, rank, peers
        self._space = process_space()
        self._lock = threading.Lock()
        self._beats, self._left, self._has_read = 0, dict[str, Any](), False
        self._ends = threading.Event()
        self.may_end_process = False  # the main thread is in a native call that no signal interrupts
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._asker = threading.Thread(target=self._ask_again, name="heartbeat store", daemon=True)
        self._asked = threading.Condition()
        self._rounds = [0, 0]  # of asking the store: begun and done
        self._is_wanted = False
        self._error: RuntimeError | None = None  # of the store: it answers no more
        self._texts: list[str] = []  # the others' states, as last read
        self._unanswered = 0.0  # seconds for which the store has been asked
        self._write()

    def start(self) -> None:
        """Begin; some ranks may still have to write their first state."""
        self._asker.start()
        self._thread.start()

    def leave(self, departure: Departure) -> None:
        """Tell the others why this rank leaves."""
        self._left = departure
        with contextlib.suppress(RuntimeError):
            self._ask_store(ANSWER_SECONDS)

    def wait_for_departures(self, seconds: float) -> None:
        """Wait until this rank has read why rank 0 leaves; on rank 0, until all others have."""
        until = time.monotonic() + seconds
        while not self.others_have_left(None if self._rank == 0 else {0}) and time.monotonic() < until:
            time.sleep(0.05)
        if self._rank:
            self._has_read = True
            with contextlib.suppress(RuntimeError):
                self._ask_store(ANSWER_SECONDS)

    def stop(self) -> None:
        self._ends.set()
        with self._asked:
            self._asked.notify_all()

    def look(self) -> StopRequested | None:
        """Read the others' states now; why this rank has to stop, None if it may go on."""
        return self._look(0.0, ANSWER_SECONDS)

    def look_for(self, seconds: float) -> StopRequested | None:
        """The same, looking until there is a reason, or for so long."""
        stop, until = None, time.monotonic() + seconds
        while stop is None and time.monotonic() < until:
            time.sleep(0.05)
            stop = self.look()
        return stop

    def transfer_failed(self, seen: str) -> Lost:
        """Why a transfer has failed, if no rank has said or shown that it is gone: one on another machine is silent."""
        silent = max(self._peers, key=lambda peer: peer.silent)
        if self._state_of(silent) != "unknown" or silent.silent < SHORT_SECONDS:
            problem = "a transfer between the ranks failed"
            return Lost(problem, KILLED, seen=seen, change="check the network between them")
        problem = f"{silent} has not answered since a transfer failed: it, its machine or the network has"
        return Lost(problem, KILLED, silent.rank, seen=seen, change=f"look at what rank {silent.rank} prints")

    def others_have_left(self, ranks: set[int] | None = None) -> bool:
        """Whether the other ranks, or some of them, have said that they leave, or will never say so."""
        never = ("gone", "stopped")
        try:
            self._read(0.0, ANSWER_SECONDS)
        except RuntimeError:
            never = ("gone", "stopped", "unknown")  # from another machine, nothing can be heard any more
        watched = [peer for peer in self._peers if ranks is None or peer.rank in ranks]
        return all(self._is_through(peer) or self._state_of(peer) in never for peer in watched)

    def _is_through(self, peer: Peer) -> bool:
        if self._rank == 0:
            return peer.has_read or peer.left == {"how": "finished"}
        return peer.left is not None

    def is_said(self, departure: Departure) -> bool:
        """Whether another rank tells the user why this one ends: rank 0, or the first of this machine without it."""
        if self._rank == 0:
            return False
        follows = departure["how"] == "followed"
        first = next(peer for peer in self._peers if peer.rank == 0).left or {"how": "nothing"}
        if first["how"] in ("followed", "failed", "stopped"):
            return follows or first["how"] == "followed" or first.get("problem") == departure.get("problem")
        before = [peer for peer in self._peers if peer.rank < self._rank and peer.space == self._space]
        return follows and any(peer.left or self._state_of(peer) == "running" for peer in before)

    def _run(self) -> None:
        # signals must reach the main thread and interrupt its waiting
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        last, asked_for = time.monotonic(), 0.0
        while not self._ends.wait(TICK_SECONDS):
            now = time.monotonic()
            passed, last = min(now - last, 2 * TICK_SECONDS), now
            if (stop := self._look(passed)) is not None:
                signals.request_stop(stop)
                asked_for += passed
                if self.may_end_process and asked_for > BLOCKED_SECONDS:
                    self._end_process(stop)

    def _end_process(self, stop: StopRequested) -> None:
        """End this process from the thread, before the run has anything to save."""
        code = 128 + stop.number
        if isinstance(stop, RankLost):
            code = stop.lost.exit_code
            if not self.is_said({"how": "followed"}):
                with contextlib.suppress(OSError):
                    os.write(2, f"error: {stop.lost.problem}\n".encode())
        os._exit(code)

    def _write(self) -> None:
        self._beats += 1
        state: dict[str, Any] = {"beats": self._beats}
        if self._left:
            state["left"] = self._left
        if self._has_read:
            state["has_read"] = True
        self._store.set(_key(self._rank), json.dumps(state))

    def _ask(self) -> None:
        """Write this rank's state, read those of the others."""
        self._write()
        self._texts = self._store.multi_get([_key(peer.rank) for peer in self._peers])

    def _ask_again(self) -> None:
        """The thread that asks the store each time it is wanted, until it fails."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            with self._asked:
                self._asked.wait_for(lambda: self._is_wanted or self._ends.is_set())
                if not self._is_wanted:
                    return
                self._is_wanted = False
                self._rounds[0] += 1
            try:
                self._ask()
            except RuntimeError as error:
                self._error = error
            with self._asked:
                self._rounds[1] = self._rounds[0]
                self._asked.notify_all()
            if self._error is not None:
                return

    def _ask_store(self, seconds: float) -> bool:
        """Exchange the states now; False if the store does not answer in this time.

        Raises:
            RuntimeError: the store is gone.
        """
        if not self._asker.is_alive() and self._error is None:
            self._ask()  # before `start`
            return True
        with self._asked:
            number, self._is_wanted = self._rounds[0] + 1, True
            self._asked.notify_all()
            is_done = self._asked.wait_for(lambda: self._rounds[1] >= number or self._error is not None, seconds)
        if self._error is not None:
            raise self._error
        return is_done

    def _read(self, passed: float, seconds: float) -> None:
        """Ask the store, and take note of what each rank says or does not say.

        Args:
            passed: since the last time.
            seconds: how long to wait for the answer.
        """
        has_answered = self._ask_store(seconds)
        with self._lock:
            self._unanswered = 0.0 if has_answered else self._unanswered + passed
            states = [json.loads(text) for text in self._texts] or [{"beats": peer.beats} for peer in self._peers]
            for peer, state in zip(self._peers, states, strict=True):
                peer.left, peer.has_read = state.get("left"), "has_read" in state
                peer.silent = 0.0 if state["beats"] != peer.beats else peer.silent + passed
                peer.beats = state["beats"]

    def _look(self, passed: float, seconds: float = TICK_SECONDS) -> StopRequested | None:
        try:
            self._read(passed, seconds)
        except RuntimeError as error:
            if all(peer.left == {"how": "finished"} for peer in self._peers):
                return None  # this rank needs no other any more
            return RankLost(self._without_store(str(error)))
        found = [one for peer in self._peers if (one := self._stop_for(peer)) is not None]
        if not found and self._unanswered > SILENT_SECONDS:
            return RankLost(self._without_store(f"no answer for {self._unanswered:.0f} s"))
        # an error that a rank could tell is the reason; that others are gone follows from it
        return min(found, key=lambda one: one.order).stop if found else None

    def _stop_for(self, peer: Peer) -> _Found | None:
        left = peer.left
        if left is not None:
            if left["how"] == "failed":
                parts = {name: left.get(name) for name in ("seen", "allowed", "change", "traceback")}
                where = f"rank {peer.rank}" if peer.space == self._space else f"rank {peer.rank} on {peer.host}"
                return _Found(0, RankLost(Lost(f"{where}: {left['problem']}", left["exit_code"], peer.rank, **parts)))
            return _Found(2, StopRequested(left["signal"], peer.rank)) if left["how"] == "stopped" else None
        state = self._state_of(peer)
        if state == "gone":
            return _Found(1, RankLost(Lost(f"{peer} has died: it was killed, or crashed", KILLED, peer.rank)))
        if state == "stopped" and peer.silent > STOPPED_SECONDS:
            what = f"{peer} has been stopped (SIGSTOP) for {peer.silent:.0f} s"
            return _Found(1, RankLost(Lost(what, HUNG, peer.rank)))
        if state == "unknown" and peer.silent > SILENT_SECONDS and not self._unanswered:
            what = f"{peer} has not answered for {peer.silent:.0f} s: its machine or the network has failed"
            return _Found(1, RankLost(Lost(what, HUNG, peer.rank)))
        return None

    def _state_of(self, peer: Peer) -> str:
        """`gone`, `stopped` or `running` by the process table; `unknown` on another machine."""
        if peer.space != self._space:
            return "unknown"
        try:
            state = read_bytes(f"/proc/{peer.pid}/stat", 65536).rpartition(b")")[2].split()[0]
        except FileNotFoundError:
            if not os.path.isdir("/proc/self"):
                return "unknown"
            return "gone"
        except (OSError, IndexError):
            return "gone"
        return {b"Z": "gone", b"X": "gone", b"T": "stopped", b"t": "stopped"}.get(state, "running")

    def _without_store(self, seen: str) -> Lost:
        for peer in self._peers:  # others that are gone have ended for the same reason
            if peer.rank == 0 and self._state_of(peer) == "gone":
                return Lost(f"{peer} has died: it was killed, or crashed", KILLED, 0)
        problem = "the connection to rank 0 is lost: its machine, torchrun there, or the network has failed"
        return Lost(problem, KILLED, seen=seen.splitlines()[0][:200] if seen else None)


@dataclass(frozen=True)
class _Found:
    order: int
    stop: StopRequested


def _key(rank: int) -> str:
    return f"state/{rank}"
