"""What files say of the ranks of a run: adapters, logs and checkpoints of each, and none in ordinary folders."""

from __future__ import annotations

import json
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from solotune.diagnosis.run_facts import RankCheckpoint
from solotune.diagnosis.sources import hf_trainer, ranks, trainer_logs
from solotune.run.events import ResumeEvent, StartEvent, StepEvent, from_line, to_line
from solotune.run.record import RunRecord

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


def save_adapter(file, value: float = 1.0):
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({KEY: torch.full((8, 4), value)}, file)


def write_lines(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def checkpoint(folder, step: int, names, epoch: float, rows: int = 4):
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    for name in names:
        (place / name).write_bytes(b"")
    state = {"global_step": step, "epoch": epoch, "train_batch_size": rows, "log_history": []}
    (place / "trainer_state.json").write_text(json.dumps(state))
    return place


def rng(count: int):
    return [f"rng_state_{rank}.pth" for rank in range(count)] if count > 1 else ["rng_state.pth"]


def test_adapters_of_ranks_are_found_under_usual_names(tmp_path):
    for number, name in enumerate(("adapter_rank{}.safetensors", "rank_{}/adapter_model.safetensors",
                                   "out-rank{}/adapter_model.safetensors")):  # fmt: skip
        for rank in range(3):
            save_adapter(tmp_path / str(number) / name.format(rank), value=rank)
        found = ranks.of_folder(tmp_path / str(number))
        assert found is not None and found.world_size == 3
        assert [float(found.adapters[rank][KEY][0, 0]) for rank in range(3)] == [0, 1, 2]


def test_other_numbers_in_names_are_no_ranks(tmp_path):
    for rank in (8, 16):  # of LoRA
        save_adapter(tmp_path / f"lora_rank{rank}" / "adapter_model.safetensors")
    save_adapter(tmp_path / "rank0" / "adapter_model.safetensors")
    for number in (0, 1):
        save_adapter(tmp_path / f"frank{number}.safetensors")
        save_adapter(tmp_path / f"adapter_tp_rank_0{number}.safetensors", value=number)  # shards
        save_file({"weight": torch.ones(2)}, tmp_path / f"model_rank{number}.safetensors")
    assert ranks.of_folder(tmp_path) is None


def test_adapters_of_other_steps_are_not_compared(tmp_path):
    for rank in range(2):
        save_adapter(tmp_path / f"rank{rank}" / "adapter_model.safetensors")
        (tmp_path / f"rank{rank}" / "trainer_state.json").write_text(json.dumps({"global_step": 50 + rank}))
    assert ranks.of_folder(tmp_path) is None


def test_logs_of_ranks_in_files_and_in_lines(tmp_path):
    lines = {rank: [{"step": step, "loss": 2.0, "adapter_norm": rank} for step in (1, 2)] for rank in range(2)}
    for rank, own in lines.items():
        write_lines(tmp_path / "files" / f"log_rank{rank}.jsonl", own)
        write_lines(tmp_path / "folders" / f"rank{rank}" / "metrics.jsonl", own)
    together = [{**line, "rank": rank} for rank in (1, 0) for line in lines[rank]]
    write_lines(tmp_path / "lines" / "train_log.jsonl", together)
    for kind in ("files", "folders", "lines"):
        found = ranks.of_folder(tmp_path / kind)
        assert found is not None and found.adapters == {}
        assert [line["adapter_norm"] for rank in range(2) for line in found.logs[rank]] == [0, 0, 1, 1], kind
    steps = trainer_logs.of_jsonl(tmp_path / "lines" / "train_log.jsonl")
    assert steps is not None and [entry["step"] for entry in steps.entries] == [1, 2], "rank 0 alone"
    assert {"F79"} == named(hf_trainer.from_folder(tmp_path / "files"))


def test_a_log_that_tells_the_rank_of_lora_is_read_whole(tmp_path):
    write_lines(tmp_path / "log.jsonl", [{"step": step, "loss": 2.0, "rank": 16} for step in (1, 2, 3)])
    steps = trainer_logs.of_jsonl(tmp_path / "log.jsonl")
    assert steps is not None and steps.num_steps == 3 and ranks.of_folder(tmp_path) is None


def named(run_facts) -> set[str]:
    from solotune.diagnosis.rules import ask_all

    found, unasked = ask_all(run_facts)
    assert not [why for why in unasked.values() if "failed" in why]
    return {s.code for s in found if s.code in ("F79", "F80", "F81") and s.kind != "remark"}


def test_checkpoints_say_how_many_ranks_there_were(tmp_path):
    checkpoint(tmp_path, 50, rng(4), 1.0)
    checkpoint(tmp_path, 100, rng(4), 2.0)
    found = ranks.of_folder(tmp_path)
    assert found is not None and found.checkpoints == [RankCheckpoint(50, 4), RankCheckpoint(100, 4)]
    last = checkpoint(tmp_path, 150, rng(2), 1.5)
    for folder in (tmp_path, last):  # pointed at a checkpoint, its neighbours are looked at too
        found = ranks.of_folder(folder)
        assert found is not None
        assert [(c.step, c.world_size, c.epoch) for c in found.checkpoints] == [(50, 4, 1), (100, 4, 2), (150, 2, 1.5)]
    assert named(hf_trainer.from_folder(tmp_path)) == {"F81"}


def test_rows_of_a_step_are_those_of_all_ranks(tmp_path):
    from transformers import TrainingArguments

    for step, count, accumulation in ((50, 4, 2), (100, 2, 4)):
        place = checkpoint(tmp_path, step, rng(count), step / 50, rows=8)
        torch.save(TrainingArguments(str(tmp_path), gradient_accumulation_steps=accumulation, use_cpu=True),
                   place / "training_args.bin")  # fmt: skip
    found = ranks.of_folder(tmp_path)
    assert found is not None and [c.batch for c in found.checkpoints] == [64, 64]
    assert named(hf_trainer.from_folder(tmp_path)) == set()


def test_a_single_gpu_leaves_no_ranks(tmp_path):
    for step in (50, 100):
        checkpoint(tmp_path, step, rng(1), step / 50)
    assert ranks.of_folder(tmp_path) is None
    (tmp_path / "checkpoint-100" / "rng_state_7.pth").write_bytes(b"")  # one of eight nodes' files
    assert ranks.of_folder(tmp_path) is None


def start(world_size=None) -> StartEvent:
    return StartEvent(0, 20, 80, None, None, 8, 100, 1000, [], None, "cpu", None, world_size)


def step(number: int, epoch: float) -> StepEvent:
    return StepEvent(number, 20, epoch, 2.0, 0.5, 1e-4, 1.0, 10, 5, 5.0, 1.0, 10.0, 0)


def record(*events) -> RunRecord:
    lines = [SimpleNamespace(event=from_line(to_line(event).encode())) for event in events]
    return RunRecord(None, tuple(lines))  # type: ignore[arg-type]


def test_a_run_of_solotune_tells_its_ranks_in_its_events():
    resumed = ResumeEvent(10, False, ["2 ranks instead of 4"], [], 2)
    found = ranks.of_record(record(start(4), step(5, 1.0), step(10, 2.0), resumed, step(11, 1.1), step(20, 2.0)))
    assert found is not None and found.world_size == 4
    assert found.checkpoints == [RankCheckpoint(10, 4, None, 2.0), RankCheckpoint(20, 2, None, 2.0)]
    assert ranks.of_record(record(start(), step(5, 1.0))) is None
    assert "world_size" not in to_line(start())
