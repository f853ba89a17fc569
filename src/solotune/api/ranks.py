"""A run on several ranks, from its start to the first step: what they compare, and what rank 0 tells the others.

    start(world, config, resume)       meet; the same config, versions and cards? each rank takes its card
    require_same_run(world, facts)     later: the same rows and base?
    share_start(world, run, point)     the run directory and the checkpoint of rank 0, on every rank

Rank 0 decides: its plan's settings, its date, its run directory and its checkpoint are those of all. The others need no
shared folder: they get what they need over the network.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solotune.api.types import ConfigSource, Overrides
from solotune.config.run_config import Choice, RunConfig
from solotune.errors import InputError, InterruptedRunError, RankError, SolotuneError, resume_command
from solotune.runtime.heartbeat import Departure, RankLost, machine, rank_error
from solotune.runtime.signals import StopRequested
from solotune.runtime.world import World, joined
from solotune.units import first_line
from solotune.version import __version__

if TYPE_CHECKING:
    from solotune.dataset import Prepared
    from solotune.training.checkpoint import Checkpoint
    from solotune.training.resume import ResumePoint

TELL_SECONDS = 60.0  # to wait for the others with an error that they do not know
OWN = ("output_dir", "resume_from_checkpoint")
"""Keys that only rank 0 uses."""
SAME_START = "start all ranks with the same command, files and versions"
NAMES = {
    "base": "files of the base model",
    "train_rows": "training rows (sha256)",
    "validation_rows": "held-out rows (sha256)",
}
"""What a user calls the `fingerprints`."""


@contextlib.contextmanager
def failing_together(world: World) -> Iterator[None]:
    """An error in the block, which is before the ranks meet, ends all of them, and one says it."""
    try:
        yield
    except SolotuneError as error:
        if world.size > 1:
            with (
                contextlib.suppress(SolotuneError, StopRequested, ImportError),
                joined(world, departure_of, seconds=TELL_SECONDS),
            ):
                raise error
        raise


def alone_under_srun(environ: Mapping[str, str]) -> str | None:
    """What to say where srun has started copies of a run that do not know of each other; None elsewhere.

    It is no error: they may have a config each.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    if not tasks.isdecimal() or int(tasks) < 2 or environ.get("SLURM_PROCID") != "0" or "WORLD_SIZE" in environ:
        return None
    how = "srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES --nproc-per-node=GPUS ... -m solotune train CONFIG"
    return f"srun has started {tasks} processes, and each trains a run of its own. One run on all GPUs: {how}"


def local_size(world: World, environ: Mapping[str, str]) -> int:
    """The ranks that a launcher has started on this machine, before they meet; all, if it does not say."""
    text = environ.get("LOCAL_WORLD_SIZE", "")
    return min(int(text), world.size) if text.isdecimal() and int(text) else world.size


def torchrun_line(count: int, config: ConfigSource, overrides: Overrides = (), *more: str) -> str:
    """The command that trains on so many GPUs of one machine, with the config as the user has named it."""
    named = str(config) if isinstance(config, (str, os.PathLike)) else "CONFIG"
    pairs = [f"{key}={value}" for key, value in overrides.items()] if isinstance(overrides, Mapping) else overrides
    words = ["torchrun", "--standalone", f"--nproc-per-node={count}", "-m", "solotune", "train", named, *pairs, *more]
    return shlex.join(words)


def note_of_other_gpus(
    world: World, config: RunConfig, named: ConfigSource, overrides: Overrides, resume: bool
) -> str | None:
    """How to use all GPUs of this machine, for a run that uses one of several; None for other runs."""
    import torch

    if world.size > 1 or config.use_cpu or (count := torch.cuda.device_count()) < 2:
        return None
    line = torchrun_line(count, named, overrides, *["--resume"] * resume)
    return f"this machine has {count} GPUs, and this run uses one of them. On all of them: {line}"


def start(world: World, config: RunConfig, resume: bool) -> None:
    """Take this rank's card, and compare what has to be equal before anything takes long.

    Raises:
        InputError: the ranks differ, a rank has no card of its own, or two have the same one.
    """
    if world.size == 1:
        return
    import torch

    from solotune.hardware.machine import installed_version
    from solotune.training.resume import COMPARED_BY_CONTENT

    on_gpu = torch.cuda.is_available() and not config.use_cpu
    card, uuid = _take_card(world) if on_gpu else ("no GPU", None)
    values = {key: value for key, value in config.model_dump().items() if key not in (*COMPARED_BY_CONTENT, *OWN)}
    versions = {name: installed_version(name) for name in ("torch", "transformers", "bitsandbytes")}
    facts = {**values, "--resume": resume, "solotune": __version__, **versions, "card": card}
    require_same(world, facts)
    cards = world.all_gather([platform.node(), machine(), uuid])
    for rank, found in enumerate(cards):
        if uuid and (first := next(i for i, one in enumerate(cards) if one[1:] == found[1:])) != rank:
            raise InputError(
                f"rank {first} and rank {rank} use the same GPU",
                seen=f"{found[2]} on {found[0]}",
                allowed="a GPU of its own for each rank",
                change="start at most as many ranks as GPUs are visible (--nproc-per-node, CUDA_VISIBLE_DEVICES)",
            )
    world.connect(torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu"))


def _take_card(world: World) -> tuple[str, str]:
    """Make the rank's card the current one of this process; its name and unique number.

    Raises:
        InputError: fewer cards are visible than ranks were started here.
    """
    import torch

    visible = torch.cuda.device_count()
    if world.local_rank >= visible > 1:  # where one is visible, it may be another one for each rank
        raise InputError(
            f"no GPU is left for process {world.local_rank} on {platform.node()} (RANK={world.rank})",
            seen=f"{visible} visible, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '(not set)')}",
            allowed=f"torchrun --nproc-per-node={visible}",
            change="start fewer ranks, or make more GPUs visible",
        )
    torch.cuda.set_device(world.local_rank if visible > 1 else 0)
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.name, str(getattr(properties, "uuid", world.rank))


def require_same(world: World, facts: Mapping[str, Any], change: str = SAME_START) -> None:
    """Compare facts of all ranks, which are named as a user does; every rank raises the same error.

    Raises:
        InputError: a rank has another value than rank 0.
    """
    all_facts = world.all_gather(dict(facts))
    for rank, found in enumerate(all_facts):
        for key, value in all_facts[0].items():
            if found.get(key) != value:
                name, other, own = _first_difference(key, found.get(key), value)
                raise InputError(
                    f"rank {rank} differs from rank 0: {name}",
                    seen=f"{other}"[:200],
                    allowed=f"{own}"[:200],
                    change=change,
                )


def require_same_run(world: World, fingerprints: Mapping[str, Any]) -> None:
    """The same for the `fingerprints` of the run; another driver with the same card computes the same.

    Before the base is loaded: with `base_sharding` each rank reads parts of it from the others.
    """
    facts = {**fingerprints, "device": fingerprints["device"].partition(", driver")[0]}
    named = {NAMES.get(key, key): value for key, value in facts.items()}
    require_same(world, named, "give all machines the same data files, base model, versions and cards")


def run_to_continue(world: World, config: RunConfig) -> RunConfig:
    """The config with the `output_dir` of the run that rank 0 continues: see `resume.run_to_continue`."""
    from solotune.training import resume

    if world.size == 1:
        return resume.run_to_continue(config)
    folder = world.broadcast(lambda: resume.run_to_continue(config).output_dir)
    return config.replaced("newest run of this config", output_dir=folder) if folder else config


def keep_micro_batch(world: World, config: RunConfig, resume: bool) -> tuple[RunConfig, list[Choice]]:
    """`resume.keep_micro_batch` by the run on rank 0's disk: other ranks may not have it, or another one there."""
    from solotune.training import resume as resuming

    previous = resuming.continued(config.output_dir) if resume else None
    if world.size == 1:
        return resuming.keep_micro_batch(config, previous)
    found = world.broadcast(lambda: [list(choice) for choice in resuming.keep_micro_batch(config, previous)[1]])
    choices = [Choice(str(key), value, str(because)) for key, value, because in found]
    return config.replaced("plan", **{one.key: one.value for one in choices}) if choices else config, choices


def _first_difference(key: str, other: Any, own: Any) -> tuple[str, Any, Any]:
    """The name and the two values of the innermost thing that differs."""
    if isinstance(other, dict) and isinstance(own, dict):
        name = next(name for name in [*own, *other] if own.get(name) != other.get(name))
        return _first_difference(f"{key}, {name}", other.get(name), own.get(name))
    return key, other, own


def require_rows(world: World, config: RunConfig, prepared: Prepared) -> None:
    """Raises:
    InputError: there are fewer rows, or packs of rows, than ranks.
    """
    if world.size == 1:
        return
    from solotune.dataset.sampler import pack_sequences

    count = len(pack_sequences(config.batches, prepared.train))
    if count < world.size:
        what = "packs of training rows" if config.packing else "training rows"
        raise InputError(
            f"{world.size} ranks, but only {count} {what}: some ranks would never get one",
            allowed=f"at most {count} ranks",
            change="start fewer ranks" + (", or packing: false" if config.packing else ""),
        )


def with_plan_of_rank_0(world: World, config: RunConfig, planned: RunConfig) -> RunConfig:
    """The config with the settings that rank 0's plan chose: cards may have different free memory."""
    if world.size == 1:
        return planned
    before, after = config.model_dump(), planned.model_dump()
    values = world.broadcast(lambda: {key: value for key, value in after.items() if before[key] != value})
    return planned if world.is_owner else config.replaced("plan of rank 0", **values)


def share_start(world: World, run: Path, resume_point: ResumePoint | None) -> tuple[Path, Checkpoint | None]:
    """The run directory and the checkpoint of rank 0, on every rank; what the others give is not read."""
    if world.size == 1:
        return run, resume_point.point if resume_point else None
    path = Path(world.broadcast(lambda: str(run)))
    return path, _share_point(world, resume_point.point if resume_point else None)


def _share_point(world: World, point: Checkpoint | None) -> Checkpoint | None:
    """Rank 0's checkpoint on every rank; None for a new run."""
    from safetensors.torch import load, save

    from solotune.training.checkpoint import Checkpoint

    if not world.broadcast(lambda: point is not None):
        return None
    parts = ("adapter", "optimizer", "random", "best")
    found = {f"{part}:{name}": t for part in parts for name, t in (getattr(point, part) if point else {}).items()}
    state = world.broadcast(lambda: point.state if point else {})
    step = world.broadcast(lambda: point.step if point else 0)
    tensors = load(world.broadcast_bytes(save({name: t.contiguous() for name, t in found.items()}) if point else b""))
    of = {part: {name.partition(":")[2]: t for name, t in tensors.items() if name.startswith(part)} for part in parts}
    return point or Checkpoint(step, of["adapter"], of["optimizer"], of["random"], state, of["best"])


def raise_if_lost(world: World, config: RunConfig, run: Path | None = None, checkpoint: Path | None = None) -> None:
    """After an error of the GPU: with a shared base it may come from the memory of a rank that has died.

    Args:
        run: directory of a run that can be resumed.
        checkpoint: the newest in it.

    Raises:
        RankError: a rank is lost.
    """
    if config.base_sharding is not False and (lost := world.lost_rank()) is not None:
        saved = f"the last checkpoint is {checkpoint}" if checkpoint else None
        raise rank_error(lost, saved, f"continue with: {resume_command(run)}" if run else "start all ranks again")


def departure_of(error: BaseException) -> Departure:
    """What a rank tells the others about the error that ends it."""
    if isinstance(error, (RankError, RankLost)):
        return {"how": "followed"}  # the rank that failed first says why
    if isinstance(error, InterruptedRunError):
        return {"how": "stopped", "signal": error.exit_code - 128}
    if isinstance(error, StopRequested):
        return {"how": "stopped", "signal": error.number}
    if isinstance(error, SolotuneError):
        parts = {"seen": error.seen, "allowed": error.allowed, "change": error.change}
        texts = {name: None if part is None else str(part) for name, part in parts.items()}
        return {"how": "failed", "exit_code": error.exit_code, "problem": error.problem, **texts}
    text = "".join(traceback.format_exception(error))
    problem = f"this is a bug of solotune: {first_line(error, with_type=True)}" if isinstance(error, Exception) else ""
    return {"how": "failed", "exit_code": 1, "problem": problem or repr(error), "traceback": text[-20_000:]}
