"""The processes of one training ("ranks"), and the few things that they do together.

    world = World.of_environment(os.environ)     what torchrun says of this process; one rank without torchrun
    with joined(world): ...                      meet the others; in the end, or after an error, tell them
        world.all_gather(value)                  one JSON value of each rank, on every rank
        world.broadcast(make)                    what rank 0 makes, on every rank
        world.broadcast_bytes(content)           bytes of rank 0, on every rank
        world.connect("cpu")
        world.all_reduce(gradient, figures)      their sums, in place

A world of one rank does none of this: its methods return at once, and torch.distributed is not loaded.

Why no time limit
-----------------
Ranks wait for each other for good reasons: one evaluates, another compiles. A time limit that fits them all would keep
seven cards waiting for a dead one. So every wait here is a short loop of asking and sleeping, which sees stop signals,
and what the heartbeat has found out about the others (`heartbeat.py`). It also tells the watchdog that this rank is
alive: the watchdog of a rank that hangs ends that one.

Rank 0 has the complete state after each step, since every rank makes the same update of the same adapters. So the ranks
need not agree on where they stop: rank 0 saves the steps that it has done.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from solotune.errors import SAID_BY_ANOTHER_RANK, CheckError, InputError
from solotune.runtime import early_ranks, heartbeat, sessions, signals
from solotune.runtime.exchange import Exchange, wait_until
from solotune.runtime.heartbeat import Departure, Heartbeat, Lost, Peer, RankLost
from solotune.runtime.rendezvous import Meeting, store_at
from solotune.runtime.signals import StopRequested
from solotune.units import first_line

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
JOIN_SECONDS = 300.0  # from the first rank that is there to the last
JOIN_AGAIN_SECONDS = 86400.0  # in a process that has trained already
LEAVE_SECONDS = 40.0  # how long a rank that leaves waits until rank 0 has saved
FIND_SECONDS = 5.0  # after a failed transfer, until the reason is known
READ_SECONDS = 5.0  # how long rank 0 stays for the others to read why it leaves
ABORT_SECONDS = 10.0
PIECE_BYTES = 256 << 20  # of `share`


@dataclass(eq=False)
class World:
    """Who this process is among the ranks of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    restarts: int = 0  # how often the ranks were started again; under torchrun, how often they have met before
    address: tuple[str, int] = ("", 0)
    has_agent: bool = False  # torchrun keeps the store
    peers: list[Peer] = field(default_factory=list)
    _store: Any = None
    _heartbeat: Heartbeat | None = None
    _device: Any = None
    _exchange: Exchange = field(init=False)
    _own: Peer | None = None

    @classmethod
    def of_environment(cls, environ: Mapping[str, str]) -> World:
        """The world that a launcher has set up; one rank if there is none.

        Raises:
            InputError: only some of the variables are set, or they contradict each other.
        """
        given = {name: environ[name] for name in VARIABLES if environ.get(name)}
        size = given.get("WORLD_SIZE")
        count = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        restarts = int(count) if count.isdecimal() else 0
        if (size in (None, "1") and given.get("RANK") in (None, "0")) and ("RANK" in given) <= ("WORLD_SIZE" in given):
            return cls(restarts=restarts)
        if missing := [name for name in VARIABLES if name not in given]:
            raise InputError(
                f"{', '.join(missing)}: not set, so this rank cannot meet the others",
                seen=", ".join(f"{name}={value}" for name, value in given.items()),
                allowed=f"all of {', '.join(VARIABLES)}, as torchrun sets them, or none of RANK and WORLD_SIZE",
                change="start it with torchrun --nproc-per-node=N -m solotune train CONFIG, or unset RANK WORLD_SIZE",
            )
        numbers = {}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            if not given[name].isdecimal():
                raise InputError(f"{name}: not a number", seen=given[name])
            numbers[name] = int(given[name])
        rank, ranks = numbers["RANK"], numbers["WORLD_SIZE"]
        if not rank < ranks:
            seen = f"RANK={rank}, WORLD_SIZE={ranks}"
            raise InputError("RANK: there are fewer ranks", seen=seen, allowed=f"0 to {ranks - 1}")
        return cls(
            rank,
            ranks,
            numbers["LOCAL_RANK"],
            restarts,
            (given["MASTER_ADDR"], numbers["MASTER_PORT"]),
            environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )

    @property
    def is_owner(self) -> bool:
        """Whether this rank writes the run directory, and talks to the user."""
        return self.rank == 0

    @property
    def machines(self) -> list[list[int]]:
        """The ranks of each machine, in order: those that see each other's processes, since names may be equal."""
        spaces = {peer.rank: peer.space for peer in self.peers} | {self.rank: self._own.space if self._own else ""}
        return [[rank for rank in sorted(spaces) if spaces[rank] == one] for one in dict.fromkeys(spaces.values())]

    @property
    def local_ranks(self) -> list[int]:
        """The ranks on this machine, in order."""
        return next(ranks for ranks in self.machines if self.rank in ranks)

    # --- meeting and leaving

    def join(self, seconds: float = JOIN_SECONDS, note: Callable[[str], None] | None = None) -> None:
        """Meet the other ranks at the store and begin the heartbeat.

        Args:
            seconds: to wait for the last one.
            note: told once for whom this rank waits, if that takes long.

        Raises:
            InputError: MASTER_PORT is taken, nobody answers there, some ranks do not come, or two have one number.
            RankError: a rank has ended, or is stopped.
        """
        if self.size == 1:
            return
        training, until = len(sessions.TRAININGS), time.monotonic() + seconds
        is_server = self.is_owner and not self.has_agent
        with early_ranks.watched(self.rank, self.size, self.address, has_agent=self.has_agent) as early:
            at = self.address, self.size, training, seconds, early
            self._store = store_at(*at, is_server=is_server)
            beats = store_at(*at, is_server=False)
            sessions.SERVERS.extend([self._store] * is_server)
            self._own = own = Peer(self.rank, os.getpid(), platform.node(), heartbeat.process_space())
            meeting = Meeting(self._store, self.rank, self.size, until, early, note)
            with meeting.errors(is_first_here=self.local_rank == 0):
                hello = [own.rank, own.pid, own.host, own.space]
                if self.has_agent:
                    place, found = sessions.meet(meeting, hello, self.address)
                    self._store, beats, self.restarts = place.of(self._store), place.of(beats), place.number - 1
                else:
                    found = meeting.meet(hello, self.address)
                self.peers = [Peer(*one) for one in found if one[0] != self.rank]
                sessions.TRAININGS.append(training)
                self._exchange = Exchange(self._store, self.rank, self.size)
                with early.asking():
                    self._heartbeat = Heartbeat(beats, self.rank, self.peers)
        self._heartbeat.start()

    def leave(self, departure: Departure) -> bool:
        """Tell the others why this rank leaves; a rank that failed waits until rank 0 has saved.

        Rank 0 waits for the others if the store is in it: they may still read there.

        Returns:
            Whether another rank tells the user why the run has ended.
        """
        if self._heartbeat is None:
            return False
        beats = self._heartbeat
        beats.leave(departure)
        if departure["how"] != "finished" or (self.is_owner and not self.has_agent):
            beats.wait_for_departures(READ_SECONDS if self.is_owner else LEAVE_SECONDS)
        beats.stop()
        self._heartbeat = None
        return beats.is_said(departure)

    def lost_rank(self) -> Lost | None:
        """The rank whose loss may be behind an error of the device; waits until the heartbeat can know of it."""
        stop = self._heartbeat.look_for(FIND_SECONDS) if self._heartbeat else None
        return stop.lost if isinstance(stop, RankLost) else None

    def why(self, stop: StopRequested) -> StopRequested:
        """The reason behind a stop: torchrun sends SIGTERM to all ranks when one has died or failed."""
        if self._heartbeat is None or isinstance(stop, RankLost):
            return stop
        found = self._heartbeat.look()
        return found if isinstance(found, RankLost) else stop

    # --- small things, through the store

    def all_gather(self, value: Any) -> list[Any]:
        """A JSON value of each rank, in their order, on every rank."""
        if self.size == 1:
            return [value]
        with self._errors():
            return self._exchange.all_gather(value)

    def broadcast(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank; it has to be JSON."""
        if self.size == 1:
            return make()
        if not self.is_owner:
            with self._errors():
                return self._exchange.hear()
        value = make()
        with self._errors():
            self._exchange.tell(value)
        return value

    @contextlib.contextmanager
    def one_after_another(self) -> Iterator[None]:
        """The first rank of each machine does what is in the block before the others, who find its cache."""
        if self.size == 1:
            yield
            return
        first = self.local_ranks[0]
        if self.rank != first:
            with self._errors():
                self._exchange.wait_for(first)
        yield
        if self.rank == first:
            with self._errors():
                self._exchange.let_pass(first)

    # --- tensors, through NCCL or gloo

    def connect(self, device: torch.device) -> None:
        """Make the process group; all ranks have passed their checks.

        Raises:
            CheckError: this torch has no NCCL.
        """
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        on_gpu = device.type == "cuda"
        if on_gpu and not (dist.is_available() and dist.is_nccl_available()):
            raise CheckError(
                "several GPUs need NCCL, and this torch has none",
                seen=f"torch {torch.__version__}",
                change="install torch for CUDA on Linux (https://pytorch.org), or train on one GPU without torchrun",
            )
        # ours is the decision what happens when a rank is lost; NCCL's own would end this process before it can save
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        self.all_gather(None)
        with self._errors(), self._blocking():
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=dist.PrefixStore("group", self._store),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(days=1),
                device_id=device if on_gpu else None,
            )
        self._device = device

    def disconnect(self) -> None:
        """End the process group when all ranks have done their part: nobody needs another one from then on."""
        if self._device is not None:
            import torch.distributed as dist

            self.all_gather(None)  # nobody leaves while another one still receives
            self._device = None
            dist.destroy_process_group()
            self.leave({"how": "finished"})

    def all_reduce(self, *tensors: torch.Tensor) -> None:
        """Replace each tensor by its sum over all ranks."""
        if self.size == 1:
            return
        import torch.distributed as dist

        with self._errors():
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                self._finish(work)

    def broadcast_bytes(self, content: bytes) -> bytes:
        """Bytes of rank 0 on every rank; what others give is not read."""
        if self.size == 1:
            return content
        import numpy as np
        import torch
        import torch.distributed as dist

        size = self.broadcast(lambda: len(content))
        whole = np.frombuffer(content, np.uint8).copy() if self.is_owner else np.empty(size, np.uint8)
        with self._errors():
            for start in range(0, size, PIECE_BYTES):
                piece = torch.from_numpy(whole[start : start + PIECE_BYTES])
                moved = piece.to(self._device)
                self._finish(dist.broadcast(moved, 0, async_op=True))
                piece.copy_(moved)
        return whole.tobytes()

    def _finish(self, work: Any) -> None:
        """Wait for a transfer between tensors."""
        try:
            wait_until(work.is_completed, lambda: 0.0001)
        except StopRequested:
            self._abort()
            raise
        work.wait()

    def _abort(self) -> None:
        """End NCCL's kernels, which wait for a rank that is gone: everything else on the card would wait for them."""
        if self._device.type == "cuda":
            import torch.distributed as dist

            assert dist.group.WORLD is not None
            thread = threading.Thread(target=dist.group.WORLD.abort, daemon=True)
            thread.start()
            thread.join(ABORT_SECONDS)

    @contextlib.contextmanager
    def _blocking(self) -> Iterator[None]:
        """A call in the block waits for the others in native code; if one is lost, only the heartbeat can act."""
        beats, before = self._heartbeat, False
        if beats is not None:
            before, beats.may_end_process = beats.may_end_process, True
        try:
            yield
        finally:
            if beats is not None:
                beats.may_end_process = before

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn an error of a transfer into its reason: the rank that is lost. An error of this rank's GPU stays one.

        A store in a stopped rank 0 answers in no time. The others have nothing to save, and may end where they wait.
        """
        try:
            with contextlib.nullcontext() if self.is_owner else self._blocking():
                yield
        except RuntimeError as error:
            stop = self._heartbeat.look_for(FIND_SECONDS) if self._heartbeat else None
            if stop is None:
                if _is_of_device(error):  # the GPU tells of it at the first call that waits for it
                    raise
                assert self._heartbeat is not None
                stop = RankLost(self._heartbeat.transfer_failed(first_line(error)))
            signals.request_stop(stop)
            signals.check_stop()
            raise stop from error  # nothing handles signals here


def _is_of_device(error: RuntimeError) -> bool:
    """Whether a GPU has failed, or is full, and not a transfer."""
    import torch
    import torch.distributed as dist

    return isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)) and not isinstance(error, dist.DistError)


ALONE = World()


@contextlib.contextmanager
def joined(
    world: World,
    departure_of: Callable[[BaseException], Departure],
    note: Callable[[str], None] | None = None,
    seconds: float | None = None,
) -> Iterator[None]:
    """Meet the other ranks; in the end, or after an error, tell them.

    Args:
        departure_of: what the others get to know about an error.
        note, seconds: see `World.join`; in a second training rank 0 may still work on the end of the first, for long.
    """
    if world.size == 1:
        yield
        return
    world.join(seconds or (JOIN_AGAIN_SECONDS if sessions.TRAININGS else JOIN_SECONDS), note)
    try:
        yield
    except BaseException as error:
        if world.leave(departure_of(error)):
            error.add_note(SAID_BY_ANOTHER_RANK)
        raise
    world.leave({"how": "finished"})


def rank_of(environ: Mapping[str, str]) -> int | None:
    """The rank of this process if a launcher has started several; None otherwise, or if its variables are no use."""
    with contextlib.suppress(InputError):
        world = World.of_environment(environ)
        return world.rank if world.size > 1 else None
    return None
