"""More runs on several ranks, killed, stopped and resumed, in minutes: sh scripts/test_ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from rank_runs import (
    EARLY,
    STEP,
    Commands,
    as_figures,
    distance,
    events_of,
    train_as,
    wait_for,
    without_times,
)
from tiny import save_model, save_tokenizer

import solotune
from solotune.errors import IntegrityError
from solotune.model import layers
from solotune.model.layer_ring import LayerRing
from solotune.model.sharded_blocks import ShardedBlock
from solotune.run.history import history_of
from solotune.run.record import RunRecord
from solotune.run.run_dir import RunDirectory
from solotune.runtime import heartbeat

pytestmark = pytest.mark.ranks


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


def test_an_early_stop_on_four_ranks(keys, tmp_path: Path) -> None:
    keys |= EARLY
    solotune.train({**keys, "output_dir": "alone", "per_device_train_batch_size": 4})
    one = as_figures(tmp_path / "alone")
    ranks = train_as(4, {**keys, "per_device_train_batch_size": 1}, tmp_path)
    assert ranks.ends() == [0] * 4, ranks.said(0)
    assert as_figures(tmp_path / "run") == pytest.approx(one, rel=1e-4)


def test_a_run_of_two_ranks_is_read_and_exported_as_one_of_one(keys, tmp_path: Path) -> None:
    """Every verb that reads a run; exports that hold the tensors of the same run on one rank."""
    keys |= {"learning_rate": 1e-3, "per_device_train_batch_size": 2}
    solotune.train({**keys, "output_dir": "alone", "per_device_train_batch_size": 4})
    ranks, run = train_as(2, keys, tmp_path), tmp_path / "run"
    assert ranks.ends() == [0, 0], ranks.said(0)
    assert distance(run / "adapter", tmp_path / "alone" / "adapter") < 1e-5
    found = [solotune.export(tmp_path / name, ["adapter", "merged"]) for name in ("run", "alone")]
    assert all(result.ok and len(result.artifacts) == 2 for result in found)
    assert distance(run / "export/adapter", tmp_path / "alone/export/adapter") < 1e-5
    merged, other = (result.folder / "merged/model.safetensors" for result in found)
    assert distance(merged, other) < 1e-4 < 1e-2 * distance(merged, Path(keys["model_name_or_path"]) / merged.name)
    assert solotune.verify(run).ok
    scored, of_one = (solotune.evaluate(tmp_path / name) for name in ("run", "alone"))
    assert scored.tuned.loss == pytest.approx(of_one.tuned.loss, rel=1e-6)
    assert solotune.diagnose(run, budget=0).to_json()["verdict"] == "healthy"
    assert list(history_of(RunRecord.read(run))["step"]) == list(range(1, 21))
    assert "20 steps on 2 ranks" in Path(solotune.report(run).path).read_text()


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


def test_a_rank_with_wrong_options_ends_the_others(keys, tmp_path: Path) -> None:
    with Commands(keys, tmp_path) as ranks:
        ranks.start(0)
        ranks.start(1, more=["--nope"])
        assert ranks.ends(0, 1) == [137, 2]
        assert "look at what rank 1 prints" in ranks.said(0)
        assert "No such option '--nope'" in ranks.said(1)


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
