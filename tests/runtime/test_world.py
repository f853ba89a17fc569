"""Who a process is among the ranks, from a launcher's variables; and a world of one."""

from __future__ import annotations

import socket
import sys
import threading

import pytest
from ranks import free_port

from solotune.errors import InputError
from solotune.runtime import world as worlds
from solotune.runtime.world import ALONE, World, rank_of

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500",
            "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip


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


def test_ranks_that_do_not_come_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "QUIET_SECONDS", 0.05)
    notes: list[str] = []
    with pytest.raises(InputError, match="rank 1, 2 did not start within 0 s"):
        World(0, 3, address=("127.0.0.1", free_port())).join(0.2, notes.append)
    assert notes == ["waiting for rank 1, 2 of 3 ranks ..."]


def test_two_ranks_tell_each_other_and_leave() -> None:
    """Both in this process: the store and the heartbeat are real."""
    address = ("127.0.0.1", free_port())
    ranks, found = [World(rank, 2, address=address) for rank in range(2)], {}

    def work(world: World) -> None:
        world.join()
        with world.one_after_another():
            found.setdefault("order", []).append(world.rank)
        told = world.broadcast(lambda: {"folder": world.rank})
        found[world.rank] = (world.all_gather(world.rank * 10), told, world.local_ranks)
        world.leave({"how": "finished"})

    other = threading.Thread(target=work, args=(ranks[1],))
    other.start()
    work(ranks[0])
    other.join()
    assert found == {"order": [0, 1], **dict.fromkeys((0, 1), ([0, 10], {"folder": 0}, [0, 1]))}
