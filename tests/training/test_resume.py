"""Going on: exactly where nothing has changed, said where it is not exact, refused where it would be another run."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny import metrics_of

from bench import faults
from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.config.settings import MICRO_BATCH
from solotune.dataset import sampler
from solotune.errors import IntegrityError
from solotune.model.base_fingerprint import fingerprint_of
from solotune.run.run_dir import RunDirectory
from solotune.training import checkpoint
from solotune.training.optimizer import make_optimizer
from solotune.training.resume import CLASSES, compare, fingerprints


def events(work, kind):
    return [event for event in metrics_of(RunDirectory(work.run)) if event["event"] == kind]


# --- exactly


@pytest.mark.parametrize("step", range(1, 9))
def test_stopped_after_any_step(work, step):
    faults.until_step(work, step)
    assert work.what_is_wrong(claimed=(step - 1) // 2 * 2) is None


def test_a_resume_of_a_resume_of_a_resume(work):
    faults.until_step(work, 4)
    for step in (6, 8):
        line = f'"event": "step", "step": {step},'.encode()

        def kill(kind, path, content, line=line):
            if kind == "write" and line in content:
                faults.os.kill(faults.os.getpid(), faults.signal.SIGKILL)

        assert work.once(True, kill).code == faults.KILLED
    assert work.what_is_wrong(6) is None


def test_a_finished_run_is_resumed_by_no_step(work):
    assert work.once(False).code == 0
    before = work.tree()
    assert work.what_is_wrong(8) is None
    assert len(events(work, "step")) == 8
    assert before != work.tree()  # metrics.jsonl says that it was resumed


def test_a_finished_run_without_checkpoints_is_resumed_by_no_step(work):
    ready = work.ready
    work.ready = replace(
        ready, config=load_config({**ready.config.model_dump(), "save_steps": None, "save_strategy": "no"})
    )
    try:
        assert work.once(False).code == 0
        adapter = (work.run / "adapter" / "adapter_model.safetensors").read_bytes()
        assert not (work.run / "checkpoints").exists()
        assert work.once(True).code == 0
    finally:
        work.ready = ready
    assert (work.run / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    assert len(events(work, "step")) == 8 and len(events(work, "end")) == 1


def test_rows_come_in_the_same_order(work):
    """The ids of each micro-step's rows, not their set."""
    order = sampler.BatchSampler.of(work.ready.config.batches, len(work.ready.prepared.train))
    whole = list(order.steps(0))
    for done in range(len(whole)):
        assert list(order.steps(done)) == whole[done:]
    assert sorted(row for step in whole[:5] for rows in step for row in rows) == list(range(20))


@pytest.mark.parametrize("keys", [{"save_steps": 1, "eval_steps": 1}, {"save_strategy": "no", "eval_strategy": "no"}])
def test_saving_and_evaluating_change_no_loss(work, keys):
    ready = work.ready
    plain = {key: value for key, value in ready.config.model_dump().items() if key not in ("save_steps", "eval_steps")}
    strategy = {"save_strategy": "steps", "eval_strategy": "steps"}
    work.ready = replace(ready, config=load_config({**plain, **strategy, **keys}))
    try:
        assert work.once(False).code == 0
    finally:
        work.ready = ready
    reference = [event for event in json.loads(work.reference)["metrics"] if event["event"] == "step"]
    for field in ("loss", "grad_norm", "token_accuracy"):
        assert [e[field].hex() for e in events(work, "step")] == [e[field].hex() for e in reference]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_every_tensor_of_the_optimizer_comes_back(tiny_config, tmp_path, name):
    config = tiny_config(optim=name)

    def made():
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 8192))
        return parameter, make_optimizer(config.optimizer, [parameter])

    def step(parameter, optimizer, seed):
        parameter.grad = torch.randn(8192, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    parameter, optimizer = made()
    for seed in range(10):
        step(parameter, optimizer, seed)
    folder = checkpoint.save(tmp_path, 10, {"x": parameter.data}, {}, optimizer, {})
    again, restored = made()
    again.data.copy_(parameter.data)
    checkpoint.restore_optimizer(restored, checkpoint.load(folder), [again])
    assert restored.state[again].keys() == optimizer.state[parameter].keys()
    for key, value in optimizer.state[parameter].items():
        back = restored.state[again][key]
        if isinstance(value, torch.Tensor):
            assert (value.dtype, value.shape) == (back.dtype, back.shape) and torch.equal(value, back), key
        else:
            assert value == back and type(value) is type(back), key
    step(parameter, optimizer, 11)
    step(again, restored, 11)
    assert torch.equal(parameter, again)


def test_the_state_of_another_optimizer_is_refused(tiny_config, tmp_path):
    parameter = torch.nn.Parameter(torch.ones(8192))
    optimizer = make_optimizer(tiny_config(optim="adamw_8bit").optimizer, [parameter])
    parameter.grad = torch.ones(8192)
    optimizer.step()
    saved = checkpoint.load(checkpoint.save(tmp_path, 1, {"x": parameter.data}, {}, optimizer, {}))
    for other, size in (("paged_adamw_32bit", 8192), ("adamw_8bit", 8448), ("adamw_torch", 8192)):
        another = torch.nn.Parameter(torch.ones(size))
        with pytest.raises(IntegrityError, match="optimizer"):
            checkpoint.restore_optimizer(
                make_optimizer(tiny_config(optim=other).optimizer, [another]), saved, [another]
            )


# --- which checkpoint


def test_a_damaged_checkpoint_is_passed_over_and_said_so(work):
    faults.until_step(work, 6)
    (work.run / "checkpoints" / "step-000004" / "random.safetensors").unlink()
    assert work.what_is_wrong(2) is None
    (resumed,) = events(work, "resume")
    assert resumed["passed_over"] == ["step-000004: random.safetensors: is missing"]
    assert (resumed["step"], resumed["exact"]) == (2, True)
    assert "skipped step-000004: random.safetensors: is missing" in (work.run / "log.txt").read_text()
    assert (work.run / "checkpoints" / "step-000004.unused").is_dir()


def test_where_no_checkpoint_is_whole_nothing_is_begun_anew(work):
    faults.until_step(work, 6)
    for path in (work.run / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    before = work.tree()
    ended = work.once(True)
    assert ended.code == 5
    assert "none of its checkpoints can be used" in ended.said
    assert "step-000004: state.json" in ended.said and "step-000002: state.json" in ended.said
    assert work.tree() == before


def test_a_checkpoint_of_another_run_is_not_continued(work, tmp_path):
    assert work.once(False).code == 0
    shutil.copytree(work.run / "checkpoints" / "step-000008", tmp_path / "foreign")
    work.clear()
    work.ready = replace(work.ready, config=work.ready.config.replaced("test", learning_rate=5e-3))
    try:
        faults.until_step(work, 6)
        shutil.copytree(tmp_path / "foreign", work.run / "checkpoints" / "step-000008")
        assert work.once(True).code == 0
    finally:
        work.ready = replace(work.ready, config=work.ready.config.replaced("test", learning_rate=1e-2))
    (resumed,) = events(work, "resume")
    assert resumed["step"] == 4 and "step-000008: metrics.jsonl" in resumed["passed_over"][0]


def test_a_step_in_the_name_that_is_not_the_steps(work):
    faults.until_step(work, 6)
    folder = work.run / "checkpoints"
    (folder / "step-000004").rename(folder / "step-000006")
    assert checkpoint.invalid_reason(folder / "step-000006") == "state.json: it belongs to step 4"
    assert work.what_is_wrong(2) is None


# --- what has changed


def test_every_key_has_its_class():
    assert set(CLASSES) == set(RunConfig.model_fields)
    frozen = {key for key, kind in CLASSES.items() if kind == "frozen"}
    assert frozen >= {
        "learning_rate",
        "lora_r",
        "seed",
        "max_length",
        "packing",
        "optim",
        "max_steps",
        "base_precision",
    }
    assert {key for key, kind in CLASSES.items() if kind == "inexact"} == {
        "gradient_checkpointing",
        "base_residency",
        "torch_compile",
        "cuda_graphs",
        "attn_implementation",
        "use_cpu",
    }
    assert (
        CLASSES["output_dir"]
        == CLASSES["eval_steps"]
        == CLASSES["model_name_or_path"]
        == CLASSES["base_offload"]
        == CLASSES["base_sharding"]
        == CLASSES["activation_offload"]
        == "free"
    )


def other_value(key, value):
    """Another allowed value of a key."""
    special = {
        "lora_target_modules": ["q_proj"], "optim": "adamw_8bit", "base_precision": "fp32", "matmul_precision": "bf16",
        "bnb_4bit_compute_dtype": "float32", "lr_scheduler_type": "linear", "attn_implementation": "eager",
        "base_residency": "quantized", "gradient_checkpointing": 1, "bnb_4bit_quant_type": "nf4-other",
    }  # fmt: skip
    if key in special:
        return special[key]
    return (not value) if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else "other"


@pytest.mark.parametrize("key", sorted(key for key, kind in CLASSES.items() if kind != "free"))
def test_a_changed_key_is_refused_or_said(workload, key):
    then = fingerprints(
        workload.ready.config, workload.ready.prepared, workload.ready.machine, workload.ready.model_files
    )
    now = {**then, "config": {**then["config"], key: other_value(key, then["config"][key])}}
    assert now["config"][key] != then["config"][key]
    assert compare(then, then, "here") == []
    if CLASSES[key] == "inexact":
        (reason,) = compare(then, now, "here")
        assert reason.startswith(f"{key} was ")
    else:
        with pytest.raises(IntegrityError, match=f"^here: {key} "):
            compare(then, now, "here")


def test_other_software_and_the_same_step_in_other_parts(workload):
    then = fingerprints(
        workload.ready.config, workload.ready.prepared, workload.ready.machine, workload.ready.model_files
    )
    split = {
        **then["config"],
        MICRO_BATCH[0]: then["config"][MICRO_BATCH[0]] // 2,
        MICRO_BATCH[1]: then["config"][MICRO_BATCH[1]] * 2,
    }
    assert len(compare(then, {**then, "config": split}, "here")) == 2
    torch_before = {**then, "software": {**then["software"], "torch": "2.0"}}
    assert compare(torch_before, then, "here") == [f"torch was 2.0, is {then['software']['torch']}"]
    assert "device was x, is " in compare({**then, "device": "x"}, then, "here")[0]
    assert "held-out rows" in compare({**then, "validation_rows": "x"}, then, "here")[0]
    paged = {**then["config"], "optim": "paged_adamw_8bit"}
    other = {**then, "config": paged, "software": {**then["software"], "bitsandbytes": "0.1"}}
    with pytest.raises(IntegrityError, match="bitsandbytes"):
        compare(other, {**then, "config": paged}, "here")


def test_another_number_of_ranks_continues_with_the_same_rows_in_a_step(workload):
    ready = workload.ready
    then = fingerprints(ready.config, ready.prepared, ready.machine, ready.model_files)
    was = {key: value for key, value in then.items() if key != "world_size"}  # of a version without ranks
    batch, accumulation = (then["config"][key] for key in MICRO_BATCH)
    two = {**then, "world_size": 2}
    assert compare(was, then, "here") == compare(two, two, "here") == []
    with pytest.raises(IntegrityError) as refused:
        compare(two, then, "here")
    assert refused.value.problem == "here: it was trained on 2 ranks, so a step of 1 has other rows than before"
    assert refused.value.change == f"gradient_accumulation_steps: {2 * accumulation}, or continue on 2 ranks"
    with pytest.raises(IntegrityError, match=f"settings of these two that make {batch * accumulation} rows"):
        compare(was, {**then, "world_size": 3}, "here")
    more = {**then, "config": {**then["config"], MICRO_BATCH[1]: 2 * accumulation}}
    assert compare(two, more, "here")[1] == "the number of ranks was 2, is 1: sums are rounded in another order"


def test_an_inexact_resume_says_so_in_metrics_and_log(work):
    faults.until_step(work, 6)
    ready = work.ready
    work.ready = replace(ready, config=ready.config.replaced("test", gradient_checkpointing=True))
    try:
        assert work.once(True).code == 0
    finally:
        work.ready = ready
    (resumed,) = events(work, "resume")
    assert resumed["exact"] is False
    assert resumed["inexact"] == ["gradient_checkpointing was False, is True"]
    assert (
        "results may differ slightly: gradient_checkpointing was False, is True" in (work.run / "log.txt").read_text()
    )


# --- the base


def test_a_moved_base_is_the_same_and_a_changed_one_is_not(workload, tmp_path):
    before = fingerprint_of(workload.folder / "model")
    moved = tmp_path / "moved"
    shutil.copytree(workload.folder / "model", moved)
    assert fingerprint_of(moved) == before
    weights = moved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-64] + bytes(64))
    assert {key for key, value in fingerprint_of(moved).items() if value != before[key]} == {"content"}
    weights.write_bytes(content)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert {key for key, value in fingerprint_of(moved).items() if value != before[key]} == {"config"}
    (moved / "config.json").write_text(json.dumps({**config, "_name_or_path": "elsewhere"}))
    assert fingerprint_of(moved) == before
