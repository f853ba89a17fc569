"""`solotune plan` and what `solotune train` makes of it, on a tiny model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from inline_snapshot import snapshot
from ruamel.yaml import YAML
from tiny import FAMILIES, chat_rows, metrics_of, save_tokenizer

import solotune
from solotune import cli
from solotune.config.load import load_config
from solotune.dataset.sampler import BatchSampler
from solotune.errors import CheckError
from solotune.hardware import machine as environment
from solotune.hardware.machine import Machine, probe
from solotune.hardware.ram import Ram
from solotune.planning import plan_inputs, planner
from solotune.planning.micro_batch import MicroBatch
from solotune.run.run_dir import RunDirectory
from tests.messages import error_in

GIB = 1 << 30


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    """A config file; its model is config.json and a tokenizer, without weights."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(60)))
    model = tmp_path / "model"
    FAMILIES["llama"]().save_pretrained(model)
    save_tokenizer(model)
    keys = {
        "model_name_or_path": str(model),
        "dataset": "chats.jsonl",
        "validation_size": 10,
        "max_length": 64,
        "max_steps": 6,
        "lora_r": 4,
    }
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return path


def plan_as_json(capsys, *arguments: str) -> tuple[int, dict]:
    code = cli.main(["plan", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_object_of_the_design_without_weights_or_a_gpu(config, capsys):
    code, found = plan_as_json(capsys, str(config), "--gpu", "h100")
    assert code == 0
    assert found["fits"] is True
    categories = (
        "weights quantization_state adapters gradients optimizer activations logits workspace".split()
    )  # design §4
    assert list(found["by_category"]) == categories
    assert found["peak_bytes"] <= sum(found["by_category"].values())
    assert found["budget_bytes"] > found["peak_bytes"]
    assert found["seconds"].keys() == {"load", "first_step", "step", "total"}
    assert all(seconds > 0 for seconds in found["seconds"].values())
    assert found["tokens_per_second"] > 0
    assert all(choice.keys() == {"key", "value", "because"} for choice in found["choices"])
    assert {"gradient_checkpointing", "base_residency"} <= {choice["key"] for choice in found["choices"]}


def test_the_rows_are_counted_where_they_can_be_read_and_else_assumed(config, capsys):
    _, known = plan_as_json(capsys, str(config), "--gpu", "h100")
    assert known["notes"] == []
    (config.parent / "chats.jsonl").unlink()
    code, unknown = plan_as_json(capsys, str(config), "--gpu", "h100")
    assert code == 0
    assert unknown["notes"][0].startswith("the data cannot be read: ")
    assert "the data is not known; 4 rows of 64 tokens are assumed in each micro-batch" in unknown["notes"]
    assert unknown["peak_bytes"] > known["peak_bytes"]


def test_the_work_is_that_of_the_micro_batches_that_will_be_drawn(config):
    from solotune import dataset

    checked = load_config(config, ["gradient_accumulation_steps=2", "per_device_train_batch_size=3"])
    prepared = dataset.prepare(checked, dataset.load_tokenizer(checked))
    lengths = [len(row.input_ids) for row in prepared.train]
    drawn = [m for step in BatchSampler.of(checked.batches, len(lengths)).steps(0) for m in step]
    work = plan_inputs.work_of(checked.batches, checked.evaluation, prepared)
    assert (work.rows, work.accumulation, work.steps) == (3, 2, 6)
    assert work.tokens == max(lengths[row] for micro in drawn for row in micro)
    assert work.tokens_per_step == pytest.approx(2 * sum(lengths[r] for m in drawn for r in m) / len(drawn))
    assert work.eval_tokens == sum(len(row.input_ids) for row in prepared.validation)
    assert work.is_measured


def test_people_read_it_on_eighty_columns(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["plan", str(config), "--gpu", "4090"]) == 0
    out = capsys.readouterr().out
    assert "peak memory on 4090" in out and "quantization state" in out and "tokens/s" in out
    assert "gradient_checkpointing: false" in out
    assert out.rstrip().endswith("fits")
    assert max(len(line) for line in out.splitlines() if "because" not in line) <= 80


def test_what_does_not_fit_exits_3_and_names_a_change_that_works(config, capsys):
    long = ["--gpu", "l4", "memory_budget=300MiB", "per_device_train_batch_size=4096", "dataset=none.jsonl"]
    assert cli.main(["plan", str(config), *long]) == 3
    out = " ".join(capsys.readouterr().out.split())
    assert "does not fit: change per_device_train_batch_size: " in out
    code, found = plan_as_json(capsys, str(config), *long)
    assert (code, found["fits"]) == (3, False)
    changes = [f"{change['key']}={change['value']}" for change in found["changes"]]
    code, found = plan_as_json(capsys, str(config), *long, *changes)
    assert (code, found["fits"]) == (0, True)


def test_a_budget_that_nothing_fits_into(config, capsys):
    code, found = plan_as_json(capsys, str(config), "--gpu", "l4", "memory_budget=1MiB")
    assert (code, found["changes"]) == (3, [])
    assert cli.main(["plan", str(config), "--gpu", "l4", "memory_budget=1MiB"]) == 3
    assert "a smaller model, or a card with" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--gpu", "h10"],
            snapshot("""\
command line, --gpu: this card is not in the table
  seen:    h10
  allowed: t4, v100-16, v100-32, a100-40, a100-80, a10g, a10, a6000, 3060, 3070, 3090, 4060ti-16, 4060-laptop, 4060, 4070, 4080, 4090, l4, l40s, 6000-ada, 5090, h100-pcie, h100, h200, b200
  change:  --gpu h100\
"""),
        ),
        (
            ["--gpu", "l4", "memory_budget=24GiB"],
            snapshot("""\
command line, memory_budget: more than the memory of the card
  seen:    memory_budget: 24GiB
  allowed: at most 22.0 GiB, the memory of l4
  change:  memory_budget: auto\
"""),
        ),
        (
            ["--gpu", "a100", "base_precision=fp8"],
            snapshot("""\
command line, base_precision: fp8 needs a GPU that can multiply 8-bit floats
  seen:    a100-80, compute capability 8.0
  allowed: compute capability 8.9 or more: Ada (L4, 40-series), Hopper (H100) and newer
  change:  base_precision: bf16 (same size, closer to the original weights) or nf4 (a quarter of the size)\
"""),
        ),
        (
            ["memory_budget=24"],
            snapshot(
                "command line, memory_budget: 24 (int) is not allowed; allowed: auto, a fraction of the GPU's memory between 0 and 1 (0.9), or a size (24GiB, 9.5 GiB, 24GB)"
            ),
        ),
        (
            ["lora_target_modules=[nothing]"],
            snapshot("""\
command line, lora_target_modules: nothing matches no linear layer of this model
  seen:    nothing
  allowed: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, or all-linear
  change:  lora_target_modules: [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]\
"""),
        ),
    ],
)
def test_mistakes_exit_2_with_what_is_allowed(config, capsys, arguments, message):
    assert cli.main(["plan", str(config), *arguments]) == 2
    assert error_in(capsys.readouterr().err) == message


STREAMED = ("base_offload=true", "gradient_checkpointing=true", "activation_offload=true")


@pytest.mark.parametrize("columns", ["60", "100"])
def test_what_streams_is_shown_with_the_host_memory_that_it_pins(config, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    code, found = plan_as_json(capsys, str(config), "--gpu", "4090", *STREAMED)
    host = found["host_by_category"]
    assert code == 0 and host["layers"] > 0 and host["activations"] > 0 and host["embedding"] > 0
    assert found["host_bytes"] == sum(host.values())
    assert found["host_budget_bytes"] is None and found["link_bytes_per_second"] == 24.7e9
    assert cli.main(["plan", str(config), "--gpu", "4090", "--host-memory", "2GiB", *STREAMED]) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert "layers in host memory" in words and "host memory that may be pinned 1.80 GiB" in words
    assert "(predicted)" in out and "24.7 GB/s from host memory to the card, as such cards have" in out
    assert "it pins" not in out  # compared, so no note
    assert max(len(line) for line in out.splitlines() if "because" not in line and "·" not in line) <= 100


def test_a_host_that_is_too_small_is_named_with_its_sizes(config, capsys):
    small = ["--gpu", "4090", "--host-memory", "0.01MiB", "base_offload=true"]
    code, found = plan_as_json(capsys, str(config), *small)
    assert (code, found["fits"], found["host_budget_bytes"]) == (3, False, int(0.9 * int(0.01 * 2**20)))
    assert cli.main(["plan", str(config), *small]) == 3
    assert "MiB of free host memory, a smaller model, or a larger card" in " ".join(capsys.readouterr().out.split())


def test_a_host_memory_that_is_no_size_is_refused(config, capsys):
    assert cli.main(["plan", str(config), "--gpu", "4090", "--host-memory", "lots"]) == 2
    assert error_in(capsys.readouterr().err) == snapshot("""\
--host-memory: not a size
  seen:    lots
  allowed: 64GiB, 31.5 GiB or 64GB\
""")


def test_the_link_that_was_measured_here_counts_and_not_the_tables(config, monkeypatch):
    here = {**vars(probe()), "gpu": "NVIDIA GeForce RTX 4090", "gpu_bytes": 24 * GIB, "gpu_free_bytes": 20 * GIB}
    machine = Machine(**{**here, "num_gpus": 1, "compute_capability": (8, 9)})
    speeds = {}
    for rate in (3e9, 24e9):  # a slot with 4 lanes, and one with 16
        monkeypatch.setattr(plan_inputs.link, "host_to_device_bytes_per_second", lambda rate=rate: rate)
        found = plan_inputs.plan_for(load_config(config, STREAMED), machine, None)
        assert found.card.link_bytes == rate and found.times()["link"].endswith("measured")
        speeds[rate] = found.option.seconds.tokens_per_second
    assert speeds[3e9] < speeds[24e9]


def test_without_a_gpu_it_is_this_machines_cpu(config):
    found = solotune.plan(config, ["use_cpu=true"])
    assert found.card.is_cpu
    assert found.resolved.torch_compile is False
    assert {choice.key for choice in found.choices} >= {"optim", "bf16", "base_residency"}


def test_the_gpu_that_is_here_is_planned_for_with_what_is_free(config, monkeypatch):
    here = {**vars(probe()), "gpu": "NVIDIA L4", "gpu_bytes": 23 * GIB, "gpu_free_bytes": 9 * GIB, "num_gpus": 1}
    machine = Machine(**{**here, "compute_capability": (8, 9), "ram_limited_by": "memory.max"})
    checked = load_config(config)
    found = plan_inputs.plan_for(checked, machine, None)
    assert found.card.name == "l4" and machine.ram.in_words() in found.notes
    assert "memory.max" not in str(plan_inputs.plan_for(checked, machine, None, "l4").notes)
    assert 8 * GIB < found.budget.bytes < 9 * GIB
    assert "9.0 GiB of 23.0 GiB are free" in found.budget.because


# --- train applies it


@pytest.fixture
def runnable(config):
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES["llama"]()).save_pretrained(config.parent / "model")
    return config


def test_a_run_follows_its_plan_and_keeps_it_beside_what_was_measured(runnable):
    quick = ["use_cpu=true", "max_steps=2", "num_samples=0", "output_dir=run", "lora_target_modules=all-linear"]
    result = solotune.train(runnable, quick)
    chosen = {choice.key: choice.value for choice in result.choices}
    assert chosen["gradient_checkpointing"] is False
    assert chosen["base_residency"] == "dequantized"
    text = Path("run/config.yaml").read_text()
    assert "gradient_checkpointing: false  # plan" in text
    assert "base_residency: dequantized  # plan" in text
    kept = json.loads(Path("run/plan.json").read_text())
    assert kept["predicted"]["fits"] is True
    assert kept["measured"]["peak_bytes"] > 0
    assert kept["measured"]["step_seconds"] > 0
    assert YAML(typ="safe").load(text)["gradient_checkpointing"] is False


def test_a_run_that_does_not_fit_is_refused_before_anything_is_loaded_or_written(runnable, monkeypatch, capsys):
    monkeypatch.setattr(environment, "ram", lambda: Ram(16 * GIB, 8 * GIB, "memory.max"))
    quick = ["use_cpu=true", "max_steps=2", "output_dir=run", "memory_budget=100MiB"]
    assert cli.main(["train", str(runnable), *quick]) == CheckError.exit_code == 3
    shown = "".join(capsys.readouterr())
    assert "memory_budget: 100MiB" in shown
    assert "8.0 of 16.0 GiB of host memory are free (memory.max of a cgroup limits it)" in shown
    assert not os.path.exists("run")


def test_a_micro_batch_of_the_plan_is_recorded_and_kept_when_the_run_is_continued(runnable, monkeypatch, capsys):
    def twice_the_rows(config, before, work, best, workloads):
        larger = config.replaced("plan", per_device_train_batch_size=8, gradient_accumulation_steps=4)
        option, resolved, _ = best(larger, workloads(larger))
        return MicroBatch(option, resolved, workloads(larger))

    quick = ["use_cpu=true", "max_steps=2", "num_samples=0", "validation_size=0", "output_dir=run"]
    with monkeypatch.context() as patch:
        patch.setattr(planner, "larger_micro_batch", twice_the_rows)  # on a CPU nothing is to be gained
        first = solotune.train(runnable, quick)
    text = Path("run/config.yaml").read_text()
    assert "per_device_train_batch_size: 8  # plan" in text and "gradient_accumulation_steps: 4  # plan" in text
    assert {choice.key: choice.value for choice in first.choices}["gradient_accumulation_steps"] == 4
    steps = [event for event in metrics_of(RunDirectory(Path("run"))) if event["event"] == "step"]
    for _ in range(2):  # the second time it is read from what the first one recorded
        again = solotune.train(runnable, quick, resume=True)
        (kept,) = [choice for choice in again.choices if choice.key == "per_device_train_batch_size"]
        assert (kept.value, kept.because) == (8, "the run that is continued was planned so")
        assert Path("run/config.yaml").read_text() == text
    assert [event for event in metrics_of(RunDirectory(Path("run"))) if event["event"] == "step"] == steps
    resumed = [event for event in metrics_of(RunDirectory(Path("run"))) if event["event"] == "resume"]
    assert resumed and all(event["exact"] for event in resumed)


def test_packed_passes_are_planned_in_the_shape_they_are_padded_to(config):
    from solotune import dataset

    checked = load_config(config, ["packing=true", "per_device_train_batch_size=3"])
    prepared = dataset.prepare(checked, dataset.load_tokenizer(checked))
    work = plan_inputs.work_of(checked.batches, checked.evaluation, prepared)
    assert (work.rows, work.tokens, work.mean_tokens) == (3, checked.max_length, checked.max_length)
    assert 0 < work.real_share < 1
    eager = checked.replaced("test", torch_compile=False)
    as_they_are = plan_inputs.work_of(eager.batches, eager.evaluation, prepared)
    assert as_they_are.mean_tokens < checked.max_length


# --- several ranks


def test_cards_of_one_machine_are_planned_for_together(config, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, found = plan_as_json(capsys, str(config), "--gpu", "h100x2")
    assert code == 0 and found["ranks"]["size"] == 2 and found["ranks"]["link"] == "NVLink"
    assert found["ranks"]["rows_per_step"] == 2 * 4 * 8
    assert found["ranks"]["tokens_per_second_per_gpu"] == found["tokens_per_second"] / 2
    assert cli.main(["plan", str(config), "--gpu", "h100x2"]) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    assert "peak memory on each of 2 h100" in words and "tokens/s on 2 GPUs (predicted)" in words
    assert "4 x 8 of the 64 rows of a step" in words and "over NVLink, 310 GB/s (predicted)" in words
    assert max(len(line) for line in out.splitlines() if "because" not in line) <= 80


def test_the_host_memory_that_is_given_is_that_of_the_whole_machine(config, capsys):
    _, found = plan_as_json(capsys, str(config), "--gpu", "4090x2", "--host-memory", "8GiB", "base_offload=true")
    assert found["host_budget_bytes"] == int(0.9 * 4 * GIB)
    assert found["ranks"]["host_bytes_of_all"] == 2 * found["host_bytes"] > 0


TORCHRUN = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def test_sharding_over_one_card_is_refused(config, capsys):
    assert cli.main(["plan", str(config), "--gpu", "h100", "base_sharding=true"]) == 2
    assert error_in(capsys.readouterr().err) == snapshot("""\
command line, base_sharding: a base is split over the GPUs of one machine, with a rank for each
  seen:    one rank
  allowed: at least 2 ranks on each machine (in a plan: --gpu h100x2)
  change:  torchrun --nproc-per-node=N -m solotune train CONFIG (N: the number of GPUs), or base_offload: true instead of base_sharding\
""")


@pytest.fixture
def two_gpus(monkeypatch) -> Machine:
    """This machine with two H100 in it, which reach each other."""
    here = {**vars(probe()), "gpu": "NVIDIA H100 80GB HBM3", "gpu_bytes": 80 * GIB, "gpu_free_bytes": 79 * GIB}
    versions = {"triton": "there", **here["versions"]}
    machine = Machine(**{**here, "num_gpus": 2, "compute_capability": (9, 0), "versions": versions})
    monkeypatch.setattr(plan_inputs.several_gpus, "pairs_without_peer_access", lambda count: [])
    monkeypatch.setattr("solotune.hardware.machine.probe", lambda: machine)
    return machine


def test_under_torchrun_it_is_the_plan_of_its_ranks_and_rank_0_prints_it(two_gpus, config, capsys, monkeypatch):
    for name, value in {**TORCHRUN, "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    _, found = plan_as_json(capsys, str(config))
    assert (found["ranks"]["size"], found["ranks"]["on_one_machine"], found["ranks"]["link"]) == (4, 2, "NVLink")
    assert any("the time of the network between machines is not known" in note for note in found["notes"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert cli.main(["plan", str(config), "base_sharding=true"]) == 2
    assert "rank 0 is alone on its machine" in capsys.readouterr().err
    _, named = plan_as_json(capsys, str(config), "--gpu", "h100")
    assert "ranks" not in named  # a named card counts, and not the launcher
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["plan", str(config), "use_cpu=true"]) == 0
    assert capsys.readouterr().out == ""


def test_a_machine_with_two_gpus_is_told_what_both_would_give(two_gpus, config):
    alone = solotune.plan(config, ["learning_rate=1e-4"])
    assert alone.ranks.size == 1
    assert alone.notes[0].endswith(
        f"(predicted): torchrun --standalone --nproc-per-node=2 -m solotune train {config} learning_rate=1e-4"
    )
    assert alone.notes[0].startswith("on the 2 GPUs of this machine: ") and "times as fast" in alone.notes[0]


@pytest.mark.parametrize("reach", [True, False])
def test_gpus_that_do_not_reach_each_other_have_no_nvlink(two_gpus, monkeypatch, reach):
    monkeypatch.setattr(plan_inputs.several_gpus, "pairs_without_peer_access", lambda count: [] if reach else [(0, 1)])
    card, _ = plan_inputs.card_here(two_gpus, False)
    assert (card.has_peer_access, card.peer_link) == (reach, "NVLink" if reach else "PCIe")


def test_a_step_waits_for_the_rank_with_the_longest_rows(config):
    from solotune import dataset

    checked = load_config(config, ["gradient_accumulation_steps=1", "per_device_train_batch_size=3"]).on_ranks(2)
    prepared = dataset.prepare(checked, dataset.load_tokenizer(checked))
    lengths = [len(row.input_ids) for row in prepared.train]
    steps = [[row for m in step for row in m] for step in BatchSampler.of(checked.batches, len(lengths)).steps(0)]
    work = plan_inputs.work_of(checked.batches, checked.evaluation, prepared)
    assert (work.ranks, work.rows, work.accumulation, work.steps) == (2, 3, 1, 6)
    assert work.mean_tokens == pytest.approx(sum(max(lengths[row] for row in step) for step in steps) / 6)
    assert work.tokens_per_step == pytest.approx(sum(lengths[row] for step in steps for row in step) / 6)
