"""Who a process is among the ranks, from a launcher's variables; and a world of one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.distributed
from ranks import Ranks, free_port

from solotune.errors import CheckError, InputError, RankError, is_said
from solotune.runtime import rendezvous, sessions, signals
from solotune.runtime import world as worlds
from solotune.runtime.early_ranks import EarlyRanks
from solotune.runtime.heartbeat import Heartbeat, Lost, Peer, RankLost
from solotune.runtime.rank_processes import RankProcess, RankProcesses
from solotune.runtime.rendezvous import Meeting, store_at
from solotune.runtime.world import ALONE, World, rank_of

NOBODY = EarlyRanks(RankProcesses(0, 2, ("127.0.0.1", 1)))
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500",
            "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip


@pytest.fixture(autouse=True)
def first_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "TRAININGS", [])


def test_what_torchrun_says() -> None:
    world = World.of_environment(TORCHRUN)
    found = (world.rank, world.size, world.local_rank, world.restarts, world.address, world.has_agent, world.is_owner)
    assert found == (3, 4, 1, 2, ("node-0", 29500), True, False)
    assert rank_of(TORCHRUN) == 3


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_without_other_ranks(environ: dict[str, str]) -> None:
    world = World.of_environment(environ)
    assert (world.rank, world.size, world.is_owner, rank_of(environ)) == (0, 1, True, None)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: not set"),
        ({"RANK": ""}, "RANK: not set"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "MASTER_ADDR, MASTER_PORT: not set"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK: not set"),
        ({"RANK": "4"}, "RANK: there are fewer ranks"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE: not a number"),
    ],
)
def test_variables_that_are_half_set_or_wrong(changed: dict[str, str], problem: str) -> None:
    with pytest.raises(InputError) as refused:
        World.of_environment({**TORCHRUN, **changed})
    assert refused.value.problem.startswith(problem)
    assert rank_of({**TORCHRUN, **changed}) is None


def test_rank_alone_is_half_of_it() -> None:
    with pytest.raises(InputError, match="WORLD_SIZE, LOCAL_RANK"):
        World.of_environment({"RANK": "0"})


def test_alone_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.distributed", None)  # an import of it would fail
    assert ALONE.all_gather({"rows": 1}) == [{"rows": 1}]
    assert ALONE.broadcast(lambda: "folder") == "folder"
    assert ALONE.broadcast_bytes(b"bytes") == b"bytes"
    ALONE.join()
    ALONE.all_reduce()
    ALONE.disconnect()
    with ALONE.one_after_another():
        ALONE.leave({"how": "finished"})


def test_the_machines_of_a_world() -> None:
    """Containers may have one name on two machines, or two names on one."""
    ranks = [Peer(rank, 1, "node", space) for rank, space in enumerate("abab")]
    world = World(1, 4, peers=[*ranks[2:], ranks[0]], _own=ranks[1])
    assert (world.machines, world.local_ranks) == ([[0, 2], [1, 3]], [1, 3])
    assert (ALONE.machines, ALONE.local_ranks) == ([[0]], [0])


def test_a_rank_that_is_lost_is_found_while_there_may_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "FIND_SECONDS", 0.2)
    assert ALONE.lost_rank() is None
    found = [None, RankLost(Lost("rank 1 has died", 137, 1))]
    beats = Heartbeat(SimpleNamespace(set=lambda *_: None), 0, [])
    monkeypatch.setattr(beats, "look", lambda: found.pop(0) if found else None)
    world = World(0, 2, _heartbeat=beats)
    assert world.lost_rank() == Lost("rank 1 has died", 137, 1)
    assert world.lost_rank() is None


def test_a_port_that_is_taken_says_what_to_change() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError) as refused:
            World(0, 2, address=("127.0.0.1", port)).join()
    assert refused.value.problem == f"MASTER_PORT: another process uses port {port} of 127.0.0.1"
    assert refused.value.change is not None
    assert "--master-port" in refused.value.change


def test_another_program_at_the_port_is_no_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the connection and says nothing: torch's client would wait for ever."""
    monkeypatch.setattr(rendezvous, "ANSWER_SECONDS", 0.3)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"what listens at 127.0.0.1:{port} is not rank 0"):
            World(1, 2, address=("127.0.0.1", port)).join(5.0)


def test_nobody_at_the_address() -> None:
    with pytest.raises(InputError, match="rank 0 does not answer at") as refused:
        World(1, 2, address=("127.0.0.1", free_port())).join(0.1)
    assert "Connection refused" in str(refused.value.seen)


def test_without_nccl_several_gpus_cannot_work_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(CheckError, match="several GPUs need NCCL, and this torch has none"):
        World(0, 2).connect(torch.device("cuda"))


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "QUIET_SECONDS", 0.05)
    notes: list[str] = []
    with pytest.raises(InputError, match="rank 1, 2 did not start within 0 s"):
        World(0, 3, address=("127.0.0.1", free_port())).join(0.2, notes.append)
    assert notes == ["waiting for rank 1, 2 of 3 ranks ..."]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_with_nothing_to_save_may_end_where_it_waits_for_the_store(rank: int) -> None:
    """The store lies in rank 0, and may be stopped with it."""
    world = World(rank, 2)
    beats = world._heartbeat = Mock(may_end_process=False)
    with world._errors():
        assert beats.may_end_process == (rank == 1)
        with world._blocking():
            assert beats.may_end_process
        assert beats.may_end_process == (rank == 1)
    assert not beats.may_end_process


def test_a_rank_that_waits_for_others_says_that_rank_0_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(keys: list[str]) -> bool:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(worlds, "store_at", lambda *given, **keys: Mock(check=reset, add=lambda *_: 1))
    with pytest.raises(InputError, match="rank 0 has ended before all ranks were there") as ended:
        World(1, 3, address=("127.0.0.1", 1)).join()
    assert ended.value.seen == "Connection reset by peer"


def test_a_rank_that_dies_right_after_the_meeting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it has written a first state, for which the store would wait."""
    monkeypatch.setattr(worlds.heartbeat, "TICK_SECONDS", 0.05)
    address = ("127.0.0.1", free_port())
    dead = subprocess.Popen(["true"])
    dead.wait()
    hello = [1, dead.pid, "node", worlds.heartbeat.process_space(), 2]

    def meet() -> None:
        store = store_at(address, 2, 0, 10.0, NOBODY, is_server=False)
        store.set("hello/1", json.dumps(hello))
        is_over.wait()
        store.set("state/1", json.dumps({"beats": 1}))  # so that nobody waits for it any more

    is_over, world = threading.Event(), World(0, 2, address=address)
    other = threading.Thread(target=meet)
    other.start()
    with signals.handle_signals():
        world.join()
        with pytest.raises(RankLost) as lost:
            world.all_gather(None)
    is_over.set()
    other.join()
    assert lost.value.lost.problem.startswith(f"rank 1 (process {dead.pid} on node) has died")
    world.leave({"how": "followed"})


def test_a_rank_that_dies_when_all_have_done_their_part_ends_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 still compares and writes: it must not stop because another one is gone."""
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    address = ("127.0.0.1", free_port())
    ranks = [World(rank, 2, address=address, _device="cpu") for rank in range(2)]

    def work(world: World) -> None:
        world.join()
        world.disconnect()

    other = threading.Thread(target=work, args=(ranks[1],))
    other.start()
    work(ranks[0])
    other.join()
    assert [world._heartbeat for world in ranks] == [None, None]


def test_two_ranks_tell_each_other_and_leave() -> None:
    """Both in this process: the store and the heartbeat are real. A rank of another run comes to the same port."""
    address = ("127.0.0.1", free_port())
    ranks, found = [World(rank, 2, address=address) for rank in range(2)], {}
    refused: list[str] = []

    def work(world: World) -> None:
        world.join()
        with world.one_after_another():
            found.setdefault("order", []).append(world.rank)
        if world.rank == 0:
            sessions.TRAININGS.clear()  # as in the process of another run
            with pytest.raises(InputError) as other:
                World(1, 2, address=address).join()
            refused.append(other.value.problem)
        told = world.broadcast(lambda: {"folder": world.rank})
        found[world.rank] = (world.all_gather(world.rank * 10), told, world.local_ranks)
        world.leave({"how": "finished"})

    other = threading.Thread(target=work, args=(ranks[1],))
    other.start()
    work(ranks[0])
    other.join()
    assert found == {"order": [0, 1], **dict.fromkeys((0, 1), ([0, 10], {"folder": 0}, [0, 1]))}
    assert refused == [f"RANK, MASTER_PORT: rank 1 is there already at 127.0.0.1:{address[1]}"]


def test_a_rank_that_counts_other_ranks_is_refused_by_both() -> None:
    address, found = ("127.0.0.1", free_port()), {}

    def join(rank: int, size: int) -> None:
        with pytest.raises(InputError) as refused:
            World(rank, size, address=address).join()
        found[rank] = (refused.value.problem, refused.value.seen)

    other = threading.Thread(target=join, args=(1, 3))
    other.start()
    join(0, 2)
    other.join()
    problem = "WORLD_SIZE: rank {} has another number than rank {}"
    assert found == {0: (problem.format(1, 0), "3 and 2"), 1: (problem.format(0, 1), "2 and 3")}


def knows(rank: int, *gone: int, size: int = 3) -> EarlyRanks:
    processes = RankProcesses(rank, size, ("127.0.0.1", 1))
    processes._ranks = [RankProcess(one, 7, 0, "gone", 30.0) for one in gone]
    return EarlyRanks(processes)


def test_a_rank_that_knows_who_is_lost_lets_the_others_know_and_rank_0_says_it() -> None:
    """Here rank 2, on the machine of rank 1; rank 3 comes later."""
    address, errors = ("127.0.0.1", free_port()), dict[int, RankError]()
    until = time.monotonic() + 60

    def meet(rank: int, early: EarlyRanks) -> None:
        store = store_at(address, 4, 0, 30.0, early, is_server=rank == 0)
        with pytest.raises(RankError) as lost:
            Meeting(store, rank, 4, until, early).meet([rank], address)
        errors[rank] = lost.value

    threads = [
        threading.Thread(target=meet, args=(rank, knows(rank, *[1] * (rank == 2), size=4))) for rank in (0, 2, 3)
    ]
    for thread in threads[:2]:
        thread.start()
    threads[1].join()
    threads[2].start()
    for thread in threads:
        thread.join()
    assert {rank: (error.rank, error.exit_code, is_said(error)) for rank, error in errors.items()} == {
        0: (1, 137, False),
        2: (1, 137, True),
        3: (1, 137, True),
    }
    assert "rank 1 (process 7 on " in errors[3].problem
    assert time.monotonic() < until - 45, "nobody waits longer than the last one needs to read it"


def test_in_place_of_a_rank_0_that_is_lost_its_neighbour_lets_other_machines_know() -> None:
    address = ("127.0.0.1", free_port())

    def neighbour() -> None:
        with pytest.raises(RankError, match=r"rank 0 .* has ended before the ranks met") as lost:
            store_at(address, 3, 0, 60.0, knows(1, 0), is_server=False)
        assert not is_said(lost.value)
        over.append(time.monotonic())

    over, begun = list[float](), time.monotonic()
    thread = threading.Thread(target=neighbour)
    thread.start()
    with pytest.raises(RankError, match=r"rank 0 .process 7 on .* has ended before the ranks met") as lost:
        World(2, 3, address=address).join()
    assert not is_said(lost.value), "on its machine it is the first"
    thread.join()
    assert over[0] < begun + rendezvous.STAY_SECONDS


def test_a_rank_0_that_is_lost_ends_its_neighbours_while_they_look_for_it() -> None:
    with pytest.raises(RankError, match=r"rank 0 .* has ended before the ranks met"):
        store_at(("127.0.0.1", free_port()), 2, 0, 60.0, knows(1, 0, size=2), is_server=False)


def test_the_kernel_ends_a_connection_to_the_store_that_is_cut() -> None:
    address = ("127.0.0.1", free_port())
    store = store_at(address, 2, 0, 5.0, NOBODY, is_server=True)
    kept = []
    for path in Path("/proc/self/fd").iterdir():
        if path.exists() and os.readlink(path).startswith("socket:"):
            with socket.socket(fileno=os.dup(int(path.name))) as one, contextlib.suppress(OSError):
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.getpeername()[1] == address[1]:
                    kept.append(one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
    assert kept == [45_000]
    assert store.add("key", 1) == 1


def test_an_error_of_the_gpu_is_no_broken_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows at the first call that waits for the GPU: that of an all-reduce."""
    monkeypatch.setattr(worlds, "FIND_SECONDS", 0.1)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error: misaligned", 716)):
        world = World(1, 2, _heartbeat=Mock(look_for=lambda seconds: None))
        with pytest.raises(type(error)) as raised, world._errors():
            raise error
        assert raised.value is error


def test_in_a_thread_the_loss_of_a_rank_ends_the_waiting(tmp_path: Path) -> None:
    """No handler can be installed there, so nothing but the request itself may be asked for."""

    def work(rank: int) -> int:
        ends: list[BaseException] = []

        def train() -> None:
            world = World.of_environment(os.environ)
            try:
                with signals.handle_signals():
                    world.join(20)
                    world.all_gather(None)
                    if rank == 1:
                        os._exit(5)
                    world.all_gather(None)
            except BaseException as error:
                ends.append(error)

        thread = threading.Thread(target=train, daemon=True)
        thread.start()
        thread.join(10)
        print(ends, flush=True)
        return 0

    ranks = Ranks(2, work, tmp_path)
    assert ranks.ends(60) == [0, 5]
    assert "RankLost" in ranks.said(0)
