"""Whole runs on several ranks, on the CPU: the same numbers as on one, and one end for all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
import torch
from ranks import Ranks, environment, free_port
from tiny import metrics_of, random_rows, save_model, save_tokenizer

import solotune
from solotune.api import ranks
from solotune.api.ranks import alone_under_srun, require_rows, start
from solotune.cli import commands
from solotune.cli.main import main
from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.errors import InputError, IntegrityError, RankError
from solotune.model import layers
from solotune.model.layer_ring import LayerRing
from solotune.model.sharded_blocks import ShardedBlock, SharedBase
from solotune.run.run_dir import RunDirectory
from solotune.runtime import heartbeat
from solotune.runtime.world import ALONE, World


def rows(count: int) -> list[dict[str, Any]]:
    """Chats of many lengths; every third one weighs double."""
    rng = np.random.default_rng(0)
    return [
        {
            "messages": [
                {"role": "user", "content": "x" * int(rng.integers(1, 20))},
                {"role": "assistant", "content": "y" * int(rng.integers(1, 12)) + str(i), "weight": 1.0 + (i % 3 == 0)},
            ]
        }
        for i in range(count)
    ]


@pytest.fixture
def keys(chat_config, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(61)))
    return {**chat_config, "base_precision": "fp32", "lora_dropout": 0.0, "max_steps": 20, "save_steps": 10,
            "eval_steps": 10, "num_samples": 0}  # fmt: skip


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[int, int]]]:
    """The ranks that have shared a base to the end, and the bytes of each; its layers take turns in a ring of one."""
    close = SharedBase.close

    def noted(shared: SharedBase) -> None:
        close(shared)
        num_bytes = sum(block.num_bytes_on_device for block in shared._blocks)
        (tmp_path / f"part-{shared.world.rank}").write_text(str(num_bytes))

    monkeypatch.setattr(SharedBase, "close", noted)
    monkeypatch.setattr(layers, "LayerRing", partial(LayerRing, slots=1))
    return lambda: [(rank, int(path.read_text())) for rank, path in enumerate(sorted(tmp_path.glob("part-*")))]


def without_times(path: Path) -> dict[str, Any]:
    return {name: value for name, value in json.loads(path.read_text()).items() if "second" not in name}


def train_as(size: int, keys: dict[str, Any], folder: Path, *more: str) -> Ranks:
    lines = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}\n" for key, value in keys.items()]
    (folder / "run.yaml").write_text("".join(lines))
    return Ranks(size, lambda rank: main(["train", "run.yaml", *more]), folder)


def events_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in metrics_of(RunDirectory(folder)) if event["event"] == kind]


STEP = ("loss", "token_accuracy", "total_weight", "num_supervised", "num_tokens", "epoch", "learning_rate")


def test_two_ranks_are_one_with_twice_the_rows(keys, parts, tmp_path: Path) -> None:
    """Packing, weights, accumulation, short last steps of epochs, evaluations; then resumed, bit for bit.

    The resumed run has its base in parts on both ranks.
    """
    keys |= {"packing": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    solotune.train({**keys, "output_dir": "alone", "per_device_train_batch_size": 2})
    ranks = train_as(2, keys, tmp_path)
    assert ranks.ends() == [0, 0], ranks.said(0) + ranks.said(1)
    assert ranks.said(1) == ""
    for kind, names in {"step": STEP, "eval": ("loss", "stderr", "exact_match")}.items():
        found, wanted = (events_of(tmp_path / name, kind) for name in ("run", "alone"))
        assert len(found) == len(wanted) == {"step": 20, "eval": 2}[kind]
        for name in names:
            assert [one[name] for one in found] == pytest.approx([one[name] for one in wanted], rel=1e-6), name
    assert events_of(tmp_path / "run", "start")[0]["world_size"] == 2
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["world_size"] == 2

    whole = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert parts() == []
    compared = without_times(tmp_path / "run" / "evaluation.json")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000020")
    ranks = train_as(2, keys, tmp_path, "--resume", "base_sharding=true")
    assert ranks.ends() == [0, 0], ranks.said(0) + ranks.said(1)
    assert [rank for rank, _ in parts()] == [0, 1] and len({num_bytes for _, num_bytes in parts()}) == 1
    assert without_times(tmp_path / "run" / "evaluation.json") == compared
    assert [(one["step"], one["exact"]) for one in events_of(tmp_path / "run", "resume")] == [(10, True)]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == whole


def test_ranks_that_differ_end_before_the_first_step_and_one_says_it(keys, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(60)))
    solotune.plan(keys)  # the shape of the model is kept for both
    for more, seen in (
        (["dataset=other.jsonl"], "rank 1 differs from rank 0: training rows (sha256)"),
        (["learning_rate=0.02"], "rank 1 differs from rank 0: learning_rate\n  seen:    0.02\n  allowed: 0.01"),
        (["learning_rat=0.02"], "rank 1: command line, learning_rat: unknown key"),
    ):
        lines = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}\n" for key, value in keys.items()]
        (tmp_path / "run.yaml").write_text("".join(lines))
        ranks = Ranks(2, lambda rank, more=more: main(["train", "run.yaml", *(more * rank)]), tmp_path)
        assert ranks.ends() == [2, 2], ranks.said(0) + ranks.said(1)
        assert seen in ranks.said(0)
        assert ranks.said(0).count("error:") == 1
        assert ranks.said(1) == ""
        assert not (tmp_path / "run").exists()


class Cards:
    """GPUs that a process sees, for `ranks.start`; the other rank has `other`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: list[str], other: dict[str, Any]) -> None:
        self.current, self.connected = 0, []
        cuda = {"is_available": lambda: bool(names), "device_count": lambda: len(names), "set_device": self.set,
                "current_device": lambda: self.current,
                "get_device_properties": lambda i: SimpleNamespace(name="H200", uuid=names[i])}  # fmt: skip
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        own = {"card": "H200" if names else "no GPU"}

        def all_gather(_: World, value: Any) -> list[Any]:
            if isinstance(value, list):
                return [[value[0], other["uuid"]], value]
            assert value["card"] == own["card"]
            return [{**value, "card": other["card"]}, value]

        monkeypatch.setattr(World, "all_gather", all_gather)
        monkeypatch.setattr(World, "connect", lambda _, device: self.connected.append(str(device)))

    def set(self, index: int) -> None:
        self.current = index


def test_each_rank_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever CUDA_VISIBLE_DEVICES makes of the GPUs: two, one for each rank, the same one, none."""
    config = RunConfig(model_name_or_path="model", dataset="rows.jsonl")
    other = {"card": "H200", "uuid": "GPU-a"}
    rank = World(1, 2, local_rank=1)
    for visible, found in ((["GPU-a", "GPU-b"], "cuda:1"), (["GPU-b"], "cuda:0")):
        cards = Cards(monkeypatch, visible, other)
        start(rank, config, False)
        assert cards.connected == [found]
    for visible, local_rank, problem in (
        (["GPU-a"], 1, "rank 0 and rank 1 use the same GPU"),
        (["GPU-a", "GPU-b"], 2, "rank 1 is the process 2 of "),
        ([], 1, "rank 1 differs from rank 0: card"),
    ):
        cards = Cards(monkeypatch, visible, other)
        with pytest.raises(InputError, match=problem):
            start(World(1, 2, local_rank=local_rank), config, False)
        assert cards.connected == []


def test_each_rank_needs_a_row(keys) -> None:
    config = RunConfig(**keys | {"packing": False}).on_ranks(4)
    prepared: Any = SimpleNamespace(train=random_rows(3))
    require_rows(World(0, 3), config, prepared)
    with pytest.raises(InputError, match="4 ranks, but only 3 training rows: some ranks would never get one"):
        require_rows(World(0, 4), config, prepared)


def test_copies_that_srun_starts_say_that_they_are_no_ranks() -> None:
    srun = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "0"}
    assert (alone_under_srun(srun) or "").startswith("srun has started 8 processes, and each trains a run of its own.")
    for other in ({"SLURM_PROCID": "3"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"WORLD_SIZE": "8"}):
        assert alone_under_srun({**srun, **other}) is None


def test_torchrun_gives_wrong_options_to_all_and_one_says_it(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name, value in {**environment(1, 2, 29500), "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--nope"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first one of its machine
    assert main(["train", "--nope"]) == 2
    assert "No such option '--nope'" in capsys.readouterr().err


def test_a_bug_on_another_rank_is_kept_with_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    error = RankError("rank 1: this is a bug of solotune: ZeroDivisionError", 1)
    error.traceback = "Traceback of rank 1"
    monkeypatch.setattr(commands, "shown", lambda: (_ for _ in ()).throw(error))
    assert main(["train", "run.yaml"]) == 1
    said = capsys.readouterr().err
    assert "Traceback of rank 1" in Path(said.rpartition("log: ")[2].strip()).read_text()


def test_a_rank_that_is_killed_ends_the_run_and_what_is_done_is_saved(keys, tmp_path: Path) -> None:
    solotune.plan(keys)
    ranks = train_as(2, {**keys, "max_steps": 3000, "save_steps": 3000, "eval_steps": 3000}, tmp_path)
    wait_for(lambda: len(events_of(tmp_path / "run", "step")) > 3)
    killed = time.monotonic()
    os.kill(ranks.pids[1], signal.SIGKILL)
    assert ranks.ends(60) == [137, -9], ranks.said(0)
    assert time.monotonic() - killed < 60
    done = events_of(tmp_path / "run", "step")[-1]["step"]
    assert f"rank 1 (process {ranks.pids[1]} on " in ranks.said(0)
    assert f"has died: it was killed, or crashed; checkpoint of step {done} saved" in ranks.said(0)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{done:06d}"]


def test_one_rank_has_nobody_to_share_a_base_with(keys, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="base_sharding: a base is split over the GPUs of one machine"):
        solotune.train({**keys, "base_sharding": True, "dataset": "not read.jsonl"})
    assert not (tmp_path / "run").exists()


WITH_SHORT_LIMITS = """\
import sys
from solotune.runtime import early_ranks, heartbeat
early_ranks.GONE_SECONDS = early_ranks.REACH_SECONDS = heartbeat.STOPPED_SECONDS = heartbeat.BLOCKED_SECONDS = 1.0
from solotune.cli import main
sys.exit(main())
"""


class Commands:
    """Ranks as commands of their own, which load libraries first: `python -m solotune`, or another program."""

    def __init__(self, keys: dict[str, Any], folder: Path, size: int = 2, program: Sequence[str] = ("-m", "solotune")):
        lines = [f"{key}: {value if isinstance(value, str) else json.dumps(value)}\n" for key, value in keys.items()]
        (folder / "run.yaml").write_text("".join(lines))
        self.folder, self.size, self.port = folder, size, free_port()
        self.command = [sys.executable, *program, "train", "run.yaml"]
        self.processes = dict[int, subprocess.Popen[bytes]]()

    def start(self, *ranks: int, more: Sequence[str] = ()) -> None:
        for rank in ranks:
            variables = os.environ | environment(rank, self.size, self.port)
            with open(self.folder / f"command-{rank}.txt", "wb") as file:
                command = [*self.command, *more]
                self.processes[rank] = subprocess.Popen(command, env=variables, stdout=file, stderr=file)

    def said(self, rank: int) -> str:
        return (self.folder / f"command-{rank}.txt").read_text()

    def wait_for_imports(self, *ranks: int) -> None:
        """Until these have looked for the others, and load torch."""
        wait_for(lambda: all("/torch/" in Path(f"/proc/{self.processes[rank].pid}/maps").read_text() for rank in ranks))

    def ends(self, *ranks: int, seconds: float = 100.0) -> list[int]:
        until = time.monotonic() + seconds
        return [self.processes[rank].wait(max(0.1, until - time.monotonic())) for rank in ranks]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()


def test_a_rank_that_is_killed_while_it_loads_libraries_ends_the_others(keys, tmp_path: Path) -> None:
    (tmp_path / "short.py").write_text(WITH_SHORT_LIMITS)
    with Commands(keys, tmp_path, 2, ["short.py"]) as ranks:
        ranks.start(0, 1)
        ranks.wait_for_imports(0, 1)
        ranks.processes[1].kill()
        assert ranks.ends(0) == [137], ranks.said(0)
        assert f"error: rank 1 (process {ranks.processes[1].pid} on " in ranks.said(0)
        assert "has ended before the ranks met" in ranks.said(0)
        assert not (tmp_path / "run").exists()


def wait_for(is_true: Callable[[], bool], seconds: float = 100) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.02)


# --- more of it, in minutes: sh scripts/test_ranks


@pytest.mark.ranks
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi", "gpt2", "mixtral"])
def test_two_and_four_ranks_in_six_families(keys, family: str, model_folder, tmp_path: Path, record_property) -> None:
    """Packing, weights, accumulation, short last steps of epochs. At a rate of 1e-2 roundings grow beyond 1e-6."""
    folder = tmp_path / "base"
    shutil.copytree(model_folder(family), folder)
    save_tokenizer(folder)
    keys |= {"model_name_or_path": str(folder), "packing": True, "learning_rate": 1e-3, "save_steps": 20}
    micro = ("per_device_train_batch_size", "gradient_accumulation_steps")
    solotune.train({**keys, "output_dir": "alone", **dict(zip(micro, (4, 2), strict=True))})
    for ranks_and_micro in ((2, 2, 2), (4, 1, 2), (2, 1, 4)):
        size, *sizes = ranks_and_micro
        name = "-".join(map(str, ranks_and_micro))
        ranks = train_as(size, {**keys, "output_dir": name, **dict(zip(micro, sizes, strict=True))}, tmp_path)
        assert ranks.ends() == [0] * size, ranks.said(0)
        worst = 0.0
        for kind, names in {"step": ("loss", "grad_norm"), "eval": ("loss",)}.items():
            found, wanted = ([one[key] for one in events_of(tmp_path / run, kind) for key in names]
                             for run in (name, "alone"))  # fmt: skip
            assert len(found) == {"step": 40, "eval": 2}[kind]
            worst = max(worst, *(abs(a / b - 1) for a, b in zip(found, wanted, strict=True)))
        record_property(f"{family} {name}", worst)
        assert worst < 1e-6, f"{name}: {worst}"


@pytest.mark.ranks
@pytest.mark.parametrize(("size", "precision"), [(2, "nf4"), (3, "nf4"), (3, "fp8"), (5, "bf16")])
def test_a_base_in_parts_gives_the_same_bits(keys, parts, size: int, precision: str, tmp_path: Path) -> None:
    """Blocks that do not divide; layers checkpointed, with dropout, answers and the best adapter kept."""
    save_tokenizer(tmp_path / "deep")
    base = save_model(tmp_path / "deep", num_hidden_layers=4, intermediate_size=104)
    keys |= {"model_name_or_path": base, "base_precision": precision, "max_steps": 6, "eval_steps": 2, "save_steps": 2,
             "num_samples": 2, "max_new_tokens": 4, "lora_dropout": 0.1, "gradient_checkpointing": 2,
             "load_best_model_at_end": True, "bf16": True, "per_device_train_batch_size": 1}  # fmt: skip
    found = []
    for name, more in (("whole", []), ("parts", ["base_sharding=true"])):
        ranks = train_as(size, keys, tmp_path, f"output_dir={name}", *more)
        assert ranks.ends() == [0] * size, ranks.said(0) + ranks.said(1)
        steps = [[event[key] for key in (*STEP, "grad_norm")] for event in events_of(tmp_path / name, "step")]
        adapter = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        found.append((steps, adapter, without_times(tmp_path / name / "evaluation.json")))
    assert found[0] == found[1] and len(found[0][0]) == 6
    assert [rank for rank, _ in parts()] == list(range(size))


@pytest.mark.ranks
@pytest.mark.parametrize("when", ["a step", "the end"])
def test_a_rank_that_is_killed_with_a_base_in_parts_is_named(keys, when: str, tmp_path: Path, monkeypatch) -> None:
    """Its memory is gone with it, which the card of the other one calls an error of its own."""
    copy_into = ShardedBlock.copy_into

    def copies(block: ShardedBlock, slot: torch.Tensor) -> None:
        if Path("killed").exists():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        copy_into(block, slot)

    monkeypatch.setattr(ShardedBlock, "copy_into", copies)
    monkeypatch.setattr(layers, "LayerRing", partial(LayerRing, slots=1))
    keys |= {"max_steps": 6 if when == "the end" else 3000, "save_steps": 3000, "eval_steps": 3000, "num_samples": 8,
             "max_new_tokens": 90, "base_sharding": True}  # fmt: skip
    ranks, run = train_as(2, keys, tmp_path), RunDirectory(tmp_path / "run")
    wait_for(lambda: run.adapter.is_dir() if when == "the end" else len(events_of(run.path, "step")) > 3)
    (tmp_path / "killed").touch()
    os.kill(ranks.pids[1], signal.SIGKILL)
    assert ranks.ends(60) == [137, -9], ranks.said(0)
    assert f"rank 1 (process {ranks.pids[1]} on " in ranks.said(0) and "has died" in ranks.said(0)
    assert not (run.path / "evaluation.json").exists()


@pytest.mark.ranks
def test_on_one_rank_a_run_of_two_goes_on_with_the_same_rows_in_a_step(keys, tmp_path: Path) -> None:
    ranks = train_as(2, keys, tmp_path)
    assert ranks.ends() == [0, 0], ranks.said(0)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000020")
    with pytest.raises(IntegrityError) as refused:
        solotune.train({**keys, "output_dir": "run"}, resume=True)
    assert refused.value.change == "gradient_accumulation_steps: 2, or continue on 2 ranks"
    solotune.train({**keys, "output_dir": "run", "gradient_accumulation_steps": 2}, resume=True)
    (resumed,) = events_of(tmp_path / "run", "resume")
    assert resumed["inexact"] == [
        "gradient_accumulation_steps was 1, is 2",
        "the number of ranks was 2, is 1: sums are rounded in another order",
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_rank_ends_all_and_the_run_goes_on(
    keys, number: int, victim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank 0 that is stopped has the store in it."""
    monkeypatch.setattr(heartbeat, "STOPPED_SECONDS", 2.0)
    keys |= {"max_steps": 60, "save_steps": 60, "eval_steps": 60}
    ranks = train_as(2, keys, tmp_path)
    wait_for(lambda: len(events_of(tmp_path / "run", "step")) > 3)
    os.kill(ranks.pids[victim], number)
    sent = time.monotonic()
    if number == signal.SIGSTOP:
        other = 1 - victim
        wait_for(lambda: os.waitid(os.P_PID, ranks.pids[other], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None)
        os.kill(ranks.pids[victim], signal.SIGKILL)
        assert ("; no checkpoint saved yet" in ranks.said(other)) == (victim == 0), "only rank 0 can save"
    codes = ranks.ends(60)
    assert time.monotonic() - sent < 60
    assert codes == ([128 + number] * 2 if number != signal.SIGSTOP else [-9, 9] if victim == 0 else [9, -9])
    assert f"rank {victim}" in ranks.said(1 - victim) or number != signal.SIGSTOP
    assert (f"Rank 1 got {signal.Signals(number).name}: stopped after step" in ranks.said(0)) == (
        victim == 1 and number != signal.SIGSTOP
    )
    ranks = train_as(2, keys, tmp_path, "--resume")
    assert ranks.ends() == [0, 0], ranks.said(0)
    assert [one["step"] for one in events_of(tmp_path / "run", "step")] == list(range(1, 61))


@pytest.mark.ranks
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP])
def test_a_signal_before_the_ranks_have_met_ends_all(keys, number: int, victim: int, tmp_path: Path) -> None:
    others = [rank for rank in range(3) if rank != victim]
    with Commands(keys, tmp_path, 3) as ranks:
        ranks.start(0, 1, 2)
        ranks.wait_for_imports(0, 1, 2)
        ranks.processes[victim].send_signal(number)
        sent = time.monotonic()
        assert ranks.ends(*others) == [9 if number == signal.SIGSTOP else 137] * 2
        assert time.monotonic() - sent < 60
        speaker, silent = others
        what = "has been stopped (SIGSTOP) for" if number == signal.SIGSTOP else "has ended before the ranks met"
        assert f"rank {victim} (process {ranks.processes[victim].pid} on " in ranks.said(speaker)
        assert what in ranks.said(speaker)
        assert ranks.said(silent) == ""


@pytest.mark.ranks
def test_a_rank_with_wrong_options_ends_the_others(keys, tmp_path: Path) -> None:
    with Commands(keys, tmp_path) as ranks:
        ranks.start(0)
        ranks.start(1, more=["--nope"])
        assert ranks.ends(0, 1) == [137, 2]
        assert "look at what rank 1 prints" in ranks.said(0)
        assert "No such option '--nope'" in ranks.said(1)


@pytest.mark.ranks
def test_a_rank_that_comes_late_is_waited_for_whatever_happens_to_another_run(keys, tmp_path: Path) -> None:
    """They meet: only then they can know that they differ."""
    (tmp_path / "other").mkdir()
    with Commands(keys, tmp_path) as ranks, Commands(keys, tmp_path / "other") as other:
        ranks.start(0)
        other.start(1)
        other.wait_for_imports(1)
        other.processes[1].kill()
        time.sleep(20)
        ranks.start(1, more=["learning_rate=0.02"])
        assert ranks.ends(0, 1) == [2, 2]
        assert "rank 1 differs from rank 0: learning_rate" in ranks.said(0)


@pytest.mark.ranks
def test_torchrun_starts_a_killed_run_again_from_its_checkpoint(keys, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()))
    more = ["max_steps=80", "save_steps=5", "eval_steps=80"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    with subprocess.Popen([*command, "-m", "solotune", "train", "run.yaml", *more]) as agent:
        wait_for(lambda: len(events_of(tmp_path / "run", "step")) > 7)
        workers = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        environ = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in workers]
        killed = next(pid for pid, one in zip(workers, environ, strict=True) if b"RANK=1" in one)
        os.kill(int(killed), signal.SIGKILL)
        assert agent.wait(200) == 0
    assert len(events_of(tmp_path / "run", "resume")) == 1
    assert [one["step"] for one in events_of(tmp_path / "run", "step")] == list(range(1, 81))


def test_a_run_on_one_of_several_gpus_is_told_the_line_for_all(monkeypatch) -> None:
    found = load_config({"model_name_or_path": "m", "dataset": "d"})
    given = Path("my runs/run.yaml"), ["learning_rate=1e-4"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert ranks.note_of_other_gpus(ALONE, found, *given, True) == (
        "this machine has 4 GPUs, and this run uses one of them. On all of them: torchrun --standalone "
        "--nproc-per-node=4 -m solotune train 'my runs/run.yaml' learning_rate=1e-4 --resume"
    )
    assert "-m solotune train CONFIG" in str(ranks.note_of_other_gpus(ALONE, found, {}, {}, False))
    assert ranks.note_of_other_gpus(World(size=4), found, *given, False) is None
    assert ranks.note_of_other_gpus(ALONE, found.replaced("test", use_cpu=True), *given, False) is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert ranks.note_of_other_gpus(ALONE, found, *given, False) is None
