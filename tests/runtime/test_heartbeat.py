"""What a rank makes of the states of the others."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from solotune.runtime import heartbeat
from solotune.runtime.heartbeat import Heartbeat, Peer, RankLost, process_space, rank_error


class Store(dict[str, str]):
    """The store of the ranks, in this process."""

    def set(self, key: str, text: str) -> None:
        self[key] = text

    def multi_get(self, keys: list[str]) -> list[str]:
        return [self[key] for key in keys]


class Gone(Store):
    def multi_get(self, keys: list[str]) -> list[str]:
        raise RuntimeError("Connection reset by peer")


def beating(store: Store, *peers: Peer) -> Heartbeat:
    for peer in peers:
        store[f"state/{peer.rank}"] = json.dumps({"beats": 1})
    return Heartbeat(store, 0, list(peers))


@pytest.fixture
def sleeper():
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def here(pid: int, rank: int = 1) -> Peer:
    return Peer(rank, pid, "node", process_space())


def test_a_rank_that_works_is_let_alone_however_long_it_is_silent(sleeper) -> None:
    """It is busy in a native call that holds Python's global lock; its own watchdog knows more."""
    beats = beating(Store(), here(sleeper.pid))
    assert [beats._look(1000.0) for _ in range(3)] == [None] * 3


def test_a_rank_that_died_is_named_at_once(sleeper) -> None:
    beats = beating(Store(), here(os.getpid(), 2), here(sleeper.pid))
    assert beats.look() is None
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # a zombie: torchrun has not looked yet
    stop = beats.look()
    assert isinstance(stop, RankLost)
    assert (stop.lost.rank, stop.lost.exit_code) == (1, 137)
    assert stop.lost.problem == f"rank 1 (process {sleeper.pid} on node) has died: it was killed, or crashed"


def test_a_rank_that_is_stopped_is_waited_for_a_while(sleeper) -> None:
    beats = beating(Store(), here(sleeper.pid))
    beats.look()
    sleeper.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
    assert beats._look(heartbeat.STOPPED_SECONDS) is None
    stop = beats._look(1.0)
    assert isinstance(stop, RankLost)
    assert stop.lost.exit_code == 9
    assert "has been stopped (SIGSTOP) for 21 s" in stop.lost.problem


def test_a_rank_on_another_machine_is_known_by_its_beats_only() -> None:
    store = Store()
    beats = beating(store, Peer(1, os.getpid(), "other", "other"))
    beats.look()
    assert beats._look(heartbeat.SILENT_SECONDS) is None
    store["state/1"] = json.dumps({"beats": 2})
    assert beats._look(heartbeat.SILENT_SECONDS) is None  # it has answered
    stop = beats._look(heartbeat.SILENT_SECONDS + 1)
    assert isinstance(stop, RankLost)
    assert "its machine or the network has failed" in stop.lost.problem


def test_a_failed_transfer_is_blamed_on_a_machine_that_is_silent() -> None:
    store = Store()
    beats = beating(store, Peer(1, os.getpid(), "near", "near"), Peer(2, 5, "far", "far"))
    beats.look()
    assert beats.transfer_failed("reset").problem == "a transfer between the ranks failed"
    store["state/1"] = json.dumps({"beats": 2})
    beats._look(4.0)
    lost = beats.transfer_failed("Connection reset by peer")
    assert (lost.rank, lost.seen) == (2, "Connection reset by peer")
    assert lost.problem.startswith("rank 2 (process 5 on far) has not answered since a transfer failed")


def left(**departure: Any) -> str:
    return json.dumps({"beats": 3, "left": departure})


FAILED = {"how": "failed", "exit_code": 7, "problem": "out of GPU memory", "seen": "80 GiB", "change": "max_length: 1"}


@pytest.mark.parametrize(
    ("states", "number", "problem"),
    [
        ([left(how="finished"), left(how="finished")], None, None),
        ([left(how="followed"), left(how="finished")], None, None),
        ([left(how="stopped", signal=2), left(how="followed")], signal.SIGINT, None),
        ([left(how="stopped", signal=15), left(**FAILED)], signal.SIGTERM, "rank 2: out of GPU memory"),
    ],
)
def test_why_a_rank_left(states: list[str], number: int | None, problem: str | None) -> None:
    store = Store()
    beats = beating(store, here(os.getpid(), 1), here(os.getpid(), 2))
    store["state/1"], store["state/2"] = states
    stop = beats.look()
    assert (stop and stop.number) == number
    assert problem or (stop.sender if stop else "") == ("rank 1 got SIGINT: " if number else "")
    assert (stop.lost.problem if isinstance(stop, RankLost) else None) == problem


def test_a_rank_of_another_machine_is_named_with_it() -> None:
    store = Store()
    beats = beating(store, Peer(1, os.getpid(), "node-7", "other"))
    store["state/1"] = left(**FAILED)
    stop = beats.look()
    assert isinstance(stop, RankLost)
    assert stop.lost.problem == "rank 1 on node-7: out of GPU memory"


@pytest.mark.parametrize(
    ("rank_0", "rank_1", "own", "is_said"),
    [
        (left(how="followed"), "", FAILED, True),  # rank 0 has read it
        (left(**FAILED), "", FAILED, True),  # the same mistake on all
        (left(**{**FAILED, "problem": "disk full"}), "", FAILED, False),
        (left(how="stopped", signal=15), "", FAILED, False),
        (left(**FAILED), "", {"how": "followed"}, True),
        ("", left(how="followed"), {"how": "followed"}, True),  # rank 0 is gone: the first of the others says it
        ("", "gone", {"how": "followed"}, False),
    ],
)
def test_one_rank_says_why_a_run_ends(rank_0: str, rank_1: str, own: Any, is_said: bool, sleeper) -> None:
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    store, me = Store(), Heartbeat(Store(), 2, [here(sleeper.pid, 0), here(sleeper.pid, 1)])
    me._store = store
    for rank, state in enumerate((rank_0, rank_1)):
        store[f"state/{rank}"] = state if state.startswith("{") else json.dumps({"beats": 1})
    me.wait_for_departures(0.0)
    assert me.is_said(own) is is_said
    assert json.loads(store["state/2"])["has_read"] is True


def test_rank_0_keeps_the_store_until_the_others_have_read() -> None:
    store = Store()
    beats = beating(store, here(os.getpid()))
    store["state/1"] = left(**FAILED)
    assert not beats.others_have_left()
    store["state/1"] = json.dumps({"beats": 4, "left": FAILED, "has_read": True})
    assert beats.others_have_left()


def test_the_error_of_a_lost_rank_says_what_is_saved_and_how_to_go_on() -> None:
    store = Store()
    beats = beating(store, here(os.getpid()))
    store["state/1"] = left(**FAILED)
    stop = beats.look()
    assert isinstance(stop, RankLost)
    error = rank_error(stop.lost, "checkpoint of step 3 saved", "continue with: solotune ...")
    assert (error.exit_code, error.rank) == (7, 1)
    assert str(error) == (
        "rank 1: out of GPU memory; checkpoint of step 3 saved\n  seen:    80 GiB\n"
        "  change:  max_length: 1; then continue with: solotune ..."
    )


def test_without_the_store_nobody_can_go_on_who_needs_another() -> None:
    store = Gone()
    beats = beating(store, here(os.getpid()))
    stop = beats.look()
    assert isinstance(stop, RankLost)
    assert stop.lost.rank is None
    assert stop.lost.seen == "Connection reset by peer"
    beats._peers[0].left = {"how": "finished"}
    assert beats.look() is None


@pytest.fixture
def mute(monkeypatch: pytest.MonkeyPatch):
    """A store in a rank that is stopped: it answers when that one goes on."""
    goes_on = threading.Event()
    monkeypatch.setattr(heartbeat, "ANSWER_SECONDS", 0.01)

    class Mute(Store):
        def multi_get(self, keys: list[str]) -> list[str]:
            goes_on.wait()
            return super().multi_get(keys)

    yield Mute()
    goes_on.set()


def test_a_rank_that_is_stopped_with_the_store_in_it_is_named(mute, sleeper) -> None:
    beats = beating(mute, here(sleeper.pid, 2))
    beats._asker.start()
    sleeper.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
    assert beats._look(heartbeat.STOPPED_SECONDS, 0.01) is None
    stop = beats._look(1.0, 0.01)
    assert isinstance(stop, RankLost)
    assert (stop.lost.rank, stop.lost.exit_code) == (2, 9)
    beats.leave({"how": "followed"})  # waits for nobody
    assert beats.others_have_left({2})
    beats.stop()


def test_a_store_on_another_machine_that_answers_no_more_ends_the_run(mute) -> None:
    """The other ranks may be well: nobody can tell."""
    beats = beating(mute, Peer(1, os.getpid(), "other", "other"))
    beats._asker.start()
    assert beats._look(heartbeat.SILENT_SECONDS, 0.01) is None
    stop = beats._look(1.0, 0.01)
    assert isinstance(stop, RankLost)
    assert (stop.lost.rank, stop.lost.seen) == (None, "no answer for 46 s")
    beats.stop()


def test_without_the_store_it_is_rank_0_that_is_lost(sleeper) -> None:
    """A rank that has ended for that reason is not the cause."""
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    for rank, problem in ((0, "rank 0 (process "), (2, "the connection to rank 0 is lost")):
        beats = Heartbeat(Gone(), 1, [here(sleeper.pid, rank)])
        stop = beats.look()
        assert isinstance(stop, RankLost)
        assert stop.lost.problem.startswith(problem)


def test_what_a_rank_says_when_it_leaves() -> None:
    store = Store()
    beats = beating(store, here(os.getpid()))
    beats.leave({"how": "finished"})
    assert json.loads(store["state/0"])["left"] == {"how": "finished"}
    assert not beats.others_have_left()
    store["state/1"] = left(how="finished")
    assert beats.others_have_left()


def test_a_thread_asks_the_run_to_stop(monkeypatch: pytest.MonkeyPatch, sleeper) -> None:
    asked: queue.Queue[Any] = queue.Queue()
    monkeypatch.setattr(heartbeat, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(heartbeat.signals, "request_stop", asked.put)
    beats = beating(Store(), here(sleeper.pid))
    beats.start()
    sleeper.kill()
    assert isinstance(asked.get(timeout=60), RankLost)
    beats.stop()
    beats._thread.join()
