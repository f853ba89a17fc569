"""Many ranks on one machine's CPU: the numbers of one process, a slow rank, and links of a known speed.

    python -m bench.ranks_many --out FILE             as root: the links need network namespaces
    python -m bench.ranks_many --only equal slow_rank

Each rank is a process with a network namespace of its own: its only link is a virtual Ethernet pair to a bridge, and
the kernel's token bucket (tc tbf) lets through so many bytes a second of what it sends. gloo and the store of the ranks
go over these links. All of it lies in one more namespace, and is gone when the bench ends.

What is compared
----------------
    equal      losses, gradient norms and held-out losses of N ranks with one row, and of one process with N rows
    slow_rank  one rank sleeps in each micro-batch, and once holds Python's global lock for longer than a stopped rank
               is waited for: the others wait, and the numbers stay
    slow_link  seconds from the last rank's entry into the all-reduce of the gradient to the last one's exit, beside
               2 (N - 1) / N * bytes / (bytes per second); and of the whole step, beside the same plus what a step takes
               until that entry
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from bench.ranks_run import CONFIG, figures_of, load_all, prepare

CLONE_NEWNET = 0x40000000
STEPS, LAYERS = 8, 4
MTU = 9000
LINKS = ((8, 5e5), (8, 2e6), (4, 5e5), (2, 5e5))  # ranks, bytes a second
HOLD_SECONDS = 25  # more than heartbeat.STOPPED_SECONDS
SLOW_RANK, SLEEP_SECONDS, HOLD_STEP = 5, 0.3, 4


class Links:
    """A bridge, and for each rank a link to it with a speed."""

    def __init__(self, ranks: int, bytes_per_second: float | None) -> None:
        self.rate, self.pipes = bytes_per_second, [(os.pipe(), os.pipe()) for _ in range(ranks)]

    def connect(self, pids: Sequence[int]) -> None:
        """In the parent, once the ranks are forked."""
        for rank, ((ready, _), (_, goes_on)) in enumerate(self.pipes):
            os.read(ready, 1)
            ip(f"link add rank{rank} type veth peer name eth0 netns {pids[rank]}")
            ip(f"link set rank{rank} master bridge mtu {MTU} up")
            os.write(goes_on, b"1")

    def enter(self, rank: int) -> None:
        """In the rank: take a network of its own."""
        (_, ready), (goes_on, _) = self.pipes[rank]
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare")
        os.write(ready, b"1")
        os.read(goes_on, 1)
        ip("link set lo up")
        ip(f"addr add {address_of(rank)}/24 dev eth0")
        ip(f"link set eth0 mtu {MTU} up")
        if self.rate:
            limit = f"tbf rate {8 * self.rate:.0f}bit burst 16kb limit 4mb"
            subprocess.run(["tc", "qdisc", "add", "dev", "eth0", "root", *limit.split()], check=True)


def address_of(rank: int) -> str:
    return f"10.77.0.{rank + 1}"


def ip(line: str) -> None:
    subprocess.run(["ip", *line.split()], check=True)


def train(
    work: Path, ranks: int, name: str, keys: Mapping[str, Any], rate: float | None = None,
    before: Callable[[int], None] = lambda rank: None,
) -> dict[str, Any]:  # fmt: skip
    """Train as so many ranks; what the run has computed, its steps' seconds, and each rank's times in all-reduces."""
    from solotune.cli.main import main
    from solotune.run.record import RunRecord
    from tests.ranks import Ranks

    links = Links(ranks, rate) if ranks > 1 else None
    config = {key: json.dumps(value) for key, value in {**keys, "output_dir": name}.items()}

    def rank_works(rank: int) -> int:
        if links:
            links.enter(rank)
            time_all_reduces(work / f"{name}-{rank}.json")
        before(rank)
        sys.argv = ["solotune", "train", "run.yaml", *(f"{key}={value}" for key, value in config.items())]
        return main()

    forked = Ranks(
        ranks, rank_works, work, {"MASTER_ADDR": address_of(0), "GLOO_SOCKET_IFNAME": "eth0"} if links else {}
    )
    if links:
        links.connect(forked.pids)
    codes = forked.ends(600)
    if any(codes):
        raise SystemExit(f"{name}: {codes}\n" + "".join(forked.said(rank) for rank in range(ranks)))
    found = figures_of(work / name)
    found["seconds"] = [event.step_seconds for event in RunRecord.read(work / name).steps]
    found["sums"] = [json.loads((work / f"{name}-{rank}.json").read_text()) for rank in range(ranks)] if links else []
    print(f"{name}: {median(found['seconds']):.3f} s a step", flush=True)
    return found


def time_all_reduces(path: Path) -> None:
    """Record when this rank enters and leaves each all-reduce, and its bytes."""
    from solotune.runtime.world import World

    reduce, times = World.all_reduce, list[tuple[float, float, int]]()

    def timed(self: World, *tensors: Any) -> None:
        begun = time.monotonic()
        reduce(self, *tensors)
        times.append((begun, time.monotonic(), sum(t.numel() * t.element_size() for t in tensors)))
        path.write_text(json.dumps(times))

    World.all_reduce = timed


def largest_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> float:
    """The largest relative difference of all losses and gradient norms."""
    assert len(found["steps"]) == len(wanted["steps"]) == STEPS
    pairs = [(a[key], b[key]) for kind, keys in (("steps", ("loss", "grad_norm")), ("evaluations", ("loss",)))
             for a, b in zip(found[kind], wanted[kind], strict=True) for key in keys]  # fmt: skip
    return max(abs(a - b) / abs(b) for a, b in pairs)


def slow(rank: int) -> None:
    """Make one rank slow."""
    from solotune.training.forward_backward import MicroBatchRunner

    if rank != SLOW_RANK:
        return
    run, calls = MicroBatchRunner.run, [0]

    def slow_run(self: Any, forward_backward: Any, batch: Any, total_weight: float) -> None:
        calls[0] += 1
        time.sleep(SLEEP_SECONDS)
        if calls[0] == HOLD_STEP:
            ctypes.PyDLL(None).sleep(HOLD_SECONDS)  # with Python's lock: this rank's heartbeat is silent
        run(self, forward_backward, batch, total_weight)

    MicroBatchRunner.run = slow_run


def slow_link(work: Path, ranks: int, rate: float, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Steps over links of a speed, beside the formula."""
    found = train(work, ranks, f"link-{ranks}-{rate:.0f}", keys, rate)
    size = max(entry[2] for entry in found["sums"][0])
    gradients = [[entry for entry in sums if entry[2] == size] for sums in found["sums"]]
    assert {len(sums) for sums in gradients} == {STEPS}
    entered = [max(sums[step][0] for sums in gradients) for step in range(STEPS)]
    left = [max(sums[step][1] for sums in gradients) for step in range(STEPS)]
    transfers = [after - before for before, after in zip(entered, left, strict=True)]
    formula = 2 * (ranks - 1) / ranks * size / rate
    whole = [after - before for before, after in pairwise(left)]
    until = [after - before for before, after in zip(left, entered[1:], strict=False)]
    return {
        "ranks": ranks, "bytes_per_second": rate, "bytes": size, "formula_seconds": formula,
        "transfer_seconds": median(transfers), "fastest_transfer_seconds": min(transfers),
        "step_seconds": median(whole), "predicted_step_seconds": median(until) + formula,
    }  # fmt: skip


def in_namespace() -> None:
    """Start again in a network namespace of its own, with a bridge."""
    if os.environ.get("RANKS_MANY") != "1":
        os.environ["RANKS_MANY"] = "1"
        os.execvp("unshare", ["unshare", "-n", sys.executable, "-m", "bench.ranks_many", *sys.argv[1:]])
    ip("link set lo up")
    ip("link add bridge type bridge")
    ip("link set bridge up")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("equal", "slow_rank", "slow_link")
    parser.add_argument("--only", choices=parts, nargs="+", default=list(parts))
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    in_namespace()
    out = given.out.absolute() if given.out else None
    load_all()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="solotune-ranks-") as name:
        work = Path(name)
        os.chdir(work)
        prepare(work, LAYERS)
        (work / "run.yaml").write_text(CONFIG)
        keys = {"lora_dropout": 0.0, "lora_r": 32, "max_steps": STEPS, "save_steps": STEPS, "eval_steps": STEPS,
                "gradient_accumulation_steps": 1, "learning_rate": 1e-3}  # fmt: skip
        import solotune

        solotune.plan("run.yaml", overrides=keys)
        alone = train(work, 1, "alone", {**keys, "per_device_train_batch_size": given.ranks})
        if "equal" in given.only:
            found = train(work, given.ranks, "equal", keys)
            results["equal"] = {"ranks": given.ranks, "largest_difference": largest_difference(found, alone)}
        if "slow_rank" in given.only:
            found = train(work, given.ranks, "slow", keys, None, slow)
            results["slow_rank"] = {
                "ranks": given.ranks, "largest_difference": largest_difference(found, alone),
                "held_step_seconds": max(found["seconds"]), "other_steps_seconds": median(found["seconds"]),
            }  # fmt: skip
        if "slow_link" in given.only:
            results["slow_link"] = [slow_link(work, ranks, rate, keys) for ranks, rate in LINKS]
        shutil.rmtree(work / "run", ignore_errors=True)
    print(json.dumps(results, indent=1))
    if out:
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    worst = max([part["largest_difference"] for part in results.values() if isinstance(part, dict)], default=0.0)
    return 1 if worst > 1e-6 else 0


if __name__ == "__main__":
    raise SystemExit(main())
