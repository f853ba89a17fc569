"""A frozen base in parts on two GPUs: the bits of a whole one, and the memory of a part.

sh scripts/test -n 0 -m gpu tests/gpu/test_base_sharding.py

The ranks are processes of their own: this file, or `solotune train`.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import environment, free_port
from tiny import chat_rows, metrics_of, save_model, save_tokenizer

from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.model.layer_blocks import MAX_INCOMPLETE
from solotune.model.loading import load_model
from solotune.run.run_dir import RunDirectory
from solotune.runtime.world import World, joined
from tests.gpu.test_layer_ring import ON_GPU, PRECISIONS, assert_same_bits, history_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif("torch.cuda.device_count() < 2", reason="needs two GPUs")]
DTYPE, SECONDS = torch.bfloat16, 400


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A model of five tiny layers, with a tokenizer and chats."""
    save_tokenizer(tmp_path / "base")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(60)))
    return save_model(tmp_path / "base", num_hidden_layers=5)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with layers of 30 MiB in 16 bits."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_key_value_heads": 8}
    return save_model(tmp_path_factory.mktemp("large"), num_hidden_layers=16, **sizes)


def started(size: int, command: list[str], folder: Path, **variables: str) -> list[subprocess.Popen[str]]:
    """A process for each rank; what it says is in `rank-N.txt`."""
    port, found = free_port(), []
    for rank in range(size):
        paths = os.pathsep.join(map(os.path.abspath, sys.path))
        environ = {**os.environ, **environment(rank, size, port), "PYTHONPATH": paths, **variables}
        with open(folder / f"rank-{rank}.txt", "w") as file:
            found.append(
                subprocess.Popen([sys.executable, *command], cwd=folder, env=environ, stdout=file, stderr=file)
            )
    return found


def codes_of(ranks: list[subprocess.Popen[str]]) -> list[int]:
    until = time.monotonic() + SECONDS
    try:
        return [rank.wait(max(1.0, until - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def said(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("rank-*.txt")))


@pytest.mark.parametrize("segments", ["", "expandable_segments:True"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_bits_in_the_memory_of_a_part(
    precision: str, segments: str, base: str, large: str, tmp_path: Path
) -> None:
    more = {"PYTORCH_CUDA_ALLOC_CONF": segments} if segments else {}
    ranks = started(2, ["-m", "tests.gpu.test_base_sharding", base, large, precision], tmp_path, **more)
    assert codes_of(ranks) == [0, 0], said(tmp_path)


def keys_of(folder: str, precision: str, **more: Any) -> dict[str, Any]:
    return {**ON_GPU, **PRECISIONS[precision], "model_name_or_path": folder, "dataset": "chats.jsonl", "max_length": 64,
            "lora_target_modules": "all-linear", "lora_r": 4, "seed": 0, **more}  # fmt: skip


def train(keys: dict[str, Any], folder: Path) -> list[subprocess.Popen[str]]:
    path = folder / f"{keys['output_dir']}.yaml"
    path.write_text(json.dumps(keys))
    return started(2, ["-m", "solotune", "train", str(path)], folder)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_whole_run_is_that_of_a_whole_base(precision: str, base: str, tmp_path: Path) -> None:
    found = []
    for name, sharding in (("first", False), ("whole", False), ("parts", True)):
        keys = {"base_sharding": sharding, "output_dir": name, "max_steps": 8, "packing": True, "save_steps": 4,
                "eval_steps": 4, "validation_size": 10, "num_samples": 2, "max_new_tokens": 8,
                "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}  # fmt: skip
        assert codes_of(train(keys_of(base, precision, **keys), tmp_path)) == [0, 0], said(tmp_path)
        assert "Producer process" not in said(tmp_path)  # none has freed what another one had open
        events = [event for event in metrics_of(RunDirectory(tmp_path / name)) if event["event"] in ("step", "eval")]
        figures = [{key: event.get(key) for key in ("step", "loss", "grad_norm", "token_accuracy")} for event in events]
        if name == "first":  # it fills the compiler's cache, and may round otherwise than those that find it full
            continue
        found.append((figures, (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()))
    assert len(found[0][0]) == 10
    assert [one for one in zip(found[0][0], found[1][0], strict=True) if one[0] != one[1]] == []
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_is_named_though_its_memory_is_gone(victim: int, base: str, tmp_path: Path) -> None:
    keys = {"base_sharding": True, "output_dir": "run", "max_steps": 100_000, "save_steps": 20, "validation_size": 0}
    ranks = train(keys_of(base, "bf16", **keys), tmp_path)
    until = time.monotonic() + SECONDS
    while not (tmp_path / "run" / "checkpoints" / "step-000020").is_dir():
        assert time.monotonic() < until and ranks[0].poll() is None, said(tmp_path)
        time.sleep(0.1)
    ranks[victim].send_signal(signal.SIGKILL)
    codes = codes_of(ranks)
    assert codes[victim] == -9 and codes[1 - victim] == 137, said(tmp_path)
    assert "this is a bug" not in said(tmp_path)
    if victim == 1:
        assert f"rank 1 (process {ranks[1].pid} on " in said(tmp_path) and "has died" in said(tmp_path)


# --- a rank of the first test


@contextmanager
def used(world: World) -> Iterator[dict[str, int]]:
    """Bytes that were allocated at the end of the block, and the most in it."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, found = torch.cuda.memory_allocated(), dict[str, int]()
    yield found
    torch.cuda.synchronize()
    found |= {"now": torch.cuda.memory_allocated() - before, "peak": torch.cuda.max_memory_allocated() - before}
    world.all_gather(None)


def num_processes_on_cards() -> int:
    query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    return len(subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines())


def rank_main(base: str, large: str, precision: str) -> None:
    world = World.of_environment(os.environ)
    torch.cuda.set_device(world.rank)
    device = torch.device("cuda", world.rank)
    with joined(world, lambda error: {"how": "failed", "exit_code": 1, "problem": repr(error)}):
        check_bits(load_config(keys_of(base, precision)), device, world)
        torch._dynamo.reset()
        check_memory(load_config(keys_of(large, precision)), device, world)


def check_bits(config: RunConfig, device: torch.device, world: World) -> None:
    whole = load_model(config, device, DTYPE)
    part = load_model(config.replaced("test", base_sharding=True), device, DTYPE, world=world)
    for takes_graphs in (False, True):
        assert_same_bits(history_of(whole, takes_graphs), history_of(part, takes_graphs))
    assert part.shared is not None
    part.shared.close()


def check_memory(config: RunConfig, device: torch.device, world: World) -> None:
    """A card has its part and the ring, loads with few layers more, and no context of another card's process."""
    load_model(config, device, DTYPE)  # what stays for the life of a process is allocated now
    with used(world) as whole:
        model = load_model(config, device, DTYPE)
    del model
    processes = num_processes_on_cards()
    with used(world) as part:
        model = load_model(config.replaced("test", base_sharding=True), device, DTYPE, world=world)
    assert num_processes_on_cards() == processes
    world.all_gather(None)
    assert model.shared is not None and model.ring is not None
    blocks, slots = model.ring._blocks, model.ring._slots
    all_bytes, layer = sum(block.num_bytes for block in blocks), max(block.num_bytes for block in blocks)
    own = sum(block.num_bytes_on_device for block in blocks)
    assert abs(own - all_bytes / 2) <= 256 * len(blocks)
    assert model.ring.num_bytes_on_device == own + len(slots) * layer
    saved = all_bytes - model.ring.num_bytes_on_device
    assert whole["now"] - part["now"] == pytest.approx(saved, rel=0.05, abs=4 << 20), (whole, part, saved)
    assert whole["peak"] - part["peak"] >= saved - (MAX_INCOMPLETE + 1) * layer, (whole, part, saved)
    model.shared.close()


if __name__ == "__main__":
    rank_main(*sys.argv[1:])
