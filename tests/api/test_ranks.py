"""Whole runs on several ranks, on the CPU: the same numbers as on one, and one end for all."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_runs import (
    EARLY,
    STEP,
    WITH_SHORT_LIMITS,
    Commands,
    as_figures,
    distance,
    events_of,
    rows,
    train_as,
    wait_for,
    without_times,
)
from ranks import Ranks, environment
from tiny import random_rows

import solotune
from solotune.api import ranks
from solotune.api.ranks import alone_under_srun, require_rows, start
from solotune.api.setup import rendering_day
from solotune.cli import commands
from solotune.cli.main import main
from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.config.settings import MICRO_BATCH
from solotune.errors import InputError, RankError, program, resume_command
from solotune.runtime.world import ALONE, World


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


def test_an_early_stop_is_that_of_one_rank(keys, tmp_path: Path) -> None:
    """The best adapter is that of an earlier step, and is what stays."""
    keys |= EARLY
    solotune.train({**keys, "output_dir": "alone", "per_device_train_batch_size": 4})
    one = as_figures(tmp_path / "alone")
    assert one["stopped"] < 200 and one["best"] < one["stopped"]
    ranks = train_as(2, {**keys, "per_device_train_batch_size": 2}, tmp_path)
    assert ranks.ends() == [0, 0], ranks.said(0) + ranks.said(1)
    assert as_figures(tmp_path / "run") == pytest.approx(one, rel=1e-4)
    assert f"stopped early after step {one['stopped']} of 200" in ranks.said(0)
    assert f"the adapter of step {one['best']} is kept" in ranks.said(0)
    assert distance(*(tmp_path / name / "adapter" for name in ("run", "alone"))) < 1e-3


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
                return [["another name", value[1], other["uuid"]], value]
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
        (["GPU-a", "GPU-b"], 2, "no GPU is left for process 2 on "),
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


def test_the_line_to_resume_starts_as_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for size, here, how in (
        ("2", "2", "torchrun --standalone --nproc-per-node=2 -m solotune"),
        ("16", "8", "torchrun --nnodes=2 [...] --nproc-per-node=8 -m solotune"),
        ("1", "1", program()),
    ):
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        assert resume_command("runs/a") == f"{how} train runs/a/config.yaml output_dir=runs/a --resume"


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
    keys |= {"base_sharding": True, "dataset": "not read.jsonl"}
    with pytest.raises(InputError, match="base_sharding: a base is split over the GPUs of one machine") as refused:
        solotune.train(keys)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError) as not_planned:
        solotune.plan(keys)
    assert str(not_planned.value) == str(refused.value)


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


def test_what_the_plan_chose_is_read_from_the_disk_of_rank_0(keys, tmp_path: Path, monkeypatch) -> None:
    """Another machine has no run there, or one of earlier."""
    config = load_config({key: value for key, value in keys.items() if key not in MICRO_BATCH})
    rows_a_step = math.prod(getattr(config, key) for key in MICRO_BATCH)
    (tmp_path / "run").mkdir()
    choices = [
        {"key": key, "value": value, "because": "it fits"}
        for key, value in zip(MICRO_BATCH, (1, rows_a_step), strict=True)
    ]
    (tmp_path / "run" / "environment.json").write_text(json.dumps({"choices": choices}))
    told: list[Any] = []
    monkeypatch.setattr(World, "broadcast", lambda self, make: told.append(make()) or told[0])
    led, chosen = ranks.keep_micro_batch(World(0, 2), config, True)
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(World, "broadcast", lambda self, make: told[0])
    followed, _ = ranks.keep_micro_batch(World(1, 2), config, True)
    assert [getattr(led, key) for key in MICRO_BATCH] == [getattr(followed, key) for key in MICRO_BATCH]
    assert [one.value for one in chosen] == [1, rows_a_step]


def test_the_date_of_a_new_run_is_one_that_ranks_can_share(keys) -> None:
    assert rendering_day(load_config(keys), False) == date.today().isoformat()


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
