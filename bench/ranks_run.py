"""A tiny run on several ranks of this machine's CPU, and what it has written: for the benches of several ranks.

The ranks are forked from this process, which has torch loaded already, so nobody but the ranks themselves ends them, as
under srun; or they are processes of their own, which load it first; or torchrun starts them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 120.0
TIMES = ("step_seconds", "tokens_per_second", "peak_bytes", "time")
ON_CPU = """\
use_cpu: true
base_precision: fp32
bf16: false
"""
CONFIG = f"""\
model_name_or_path: model
dataset: chats.jsonl
max_length: 64
{ON_CPU}lora_target_modules: all-linear
lora_r: 4
lora_dropout: 0.1
max_steps: 12
per_device_train_batch_size: 1
gradient_accumulation_steps: 2
gradient_checkpointing: false
packing: true
validation_size: 10
learning_rate: 1.0e-2
save_steps: 3
eval_steps: 6
num_samples: 0
logging_steps: 1
seed: 0
output_dir: run
"""


def load_all() -> None:
    """Load what a run needs once, for all that are forked; work out shapes and speeds once, which take longer."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import torch

    import solotune.api.train
    import solotune.diagnosis.monitor
    import solotune.report_page.build
    import solotune.training.loop  # noqa: F401 - a run imports all of them
    from solotune.planning import plan_inputs

    torch.set_num_threads(1)
    shape, kept = plan_inputs.model_shape, dict[str, Any]()

    def model_shape(config: Any, model_files: Any = None) -> Any:
        if "shape" not in kept:
            kept["shape"] = shape(config, model_files)
        return kept["shape"]

    plan_inputs.model_shape = model_shape
    plan_inputs.cpu_gflops = cache(plan_inputs.cpu_gflops)


def prepare(work: Path, num_layers: int = 1, *, on_gpus: bool = False) -> None:
    """A tiny model, chats of many lengths, some of double weight, and the config."""
    import numpy as np
    import torch
    import transformers

    from tests.tiny import FAMILIES, save_tokenizer

    torch.manual_seed(0)
    config = FAMILIES["llama"]()
    config.num_hidden_layers = num_layers
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(work / "model")
    save_tokenizer(work / "model")
    rng = np.random.default_rng(0)
    with open(work / "chats.jsonl", "w", encoding="utf-8") as file:
        for i in range(90):
            asked = {"role": "user", "content": "x" * int(rng.integers(1, 20))}
            answer = {"role": "assistant", "content": "y" * int(rng.integers(1, 12)) + str(i), "weight": 1 + i % 2}
            file.write(json.dumps({"messages": [asked, answer]}) + "\n")
    config = CONFIG.replace(ON_CPU, "base_precision: nf4\n") if on_gpus else CONFIG
    (work / "run.yaml").write_text(config, encoding="utf-8")


class Launched:
    """The ranks of one run, in the folder that `prepare` has filled."""

    def __init__(self, folder: Path, ranks: int, launcher: str = "fork", *more: str) -> None:
        self.folder, self.ranks = folder, ranks
        self.codes, self.ended = dict[int, int](), dict[int, float]()
        self.started = time.monotonic()
        self.agent: subprocess.Popen[bytes] | None = None
        for path in folder.glob("rank-*.txt"):
            path.unlink()
        if launcher == "fork":
            from solotune.cli.main import main
            from tests.ranks import Ranks

            def work(rank: int) -> int:
                sys.argv = ["solotune", "train", "run.yaml", *more]
                return main()

            self.pids = Ranks(ranks, work, folder).pids
            return
        if launcher == "processes":
            self.pids = self._start(more)
            return
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        with open(folder / "rank-0.txt", "w", encoding="utf-8") as file:
            self.agent = subprocess.Popen(
                [*command, "-m", "solotune", "train", "run.yaml", *more], cwd=folder, stdout=file, stderr=file
            )
        self.pids = [self._pid_of(rank) for rank in range(ranks)]

    def _start(self, more: Sequence[str]) -> list[int]:
        """Each rank as a command of its own."""
        from tests.ranks import environment, free_port

        port, pids = free_port(), []
        for rank in range(self.ranks):
            variables = os.environ | environment(rank, self.ranks, port)
            with open(self.folder / f"rank-{rank}.txt", "w", encoding="utf-8") as file:
                command = [sys.executable, "-m", "solotune", "train", "run.yaml", *more]
                pids.append(os.posix_spawn(sys.executable, command, variables, file_actions=[
                    (os.POSIX_SPAWN_DUP2, file.fileno(), number) for number in (1, 2)]))  # fmt: skip
        return pids

    def _pid_of(self, rank: int) -> int:
        assert self.agent is not None
        until = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < until:
            for path in Path("/proc").glob("[0-9]*"):
                try:
                    parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                    environ = (path / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if parent == self.agent.pid and f"RANK={rank}".encode() in environ:
                    return int(path.name)
            time.sleep(0.05)
        raise RuntimeError("torchrun has started no rank")

    def poll(self) -> None:
        """Take note of the ranks that have ended."""
        for rank, pid in enumerate(self.pids):
            if rank in self.codes:
                continue
            if self.agent is None and (found := os.waitpid(pid, os.WNOHANG))[0]:
                self.codes[rank] = os.waitstatus_to_exitcode(found[1])
            elif self.agent is not None and (code := self.agent.poll()) is not None:
                self.codes[rank] = code
            if rank in self.codes:
                self.ended[rank] = time.monotonic()

    def is_alive(self, rank: int) -> bool:
        self.poll()
        return rank not in self.codes and (self.agent is None or Path(f"/proc/{self.pids[rank]}/fd").exists())

    def wait(self, stopped: int | None = None) -> list[str]:
        """Wait until all have ended; what is wrong.

        Args:
            stopped: this rank is stopped (SIGSTOP), so it ends only when it is killed, after the others.
        """
        since = time.monotonic()
        while len(self.codes) < self.ranks:
            self.poll()
            if stopped is not None and len(self.codes) == self.ranks - 1 and stopped not in self.codes:
                self.ended[stopped] = max(self.ended.values())
                self.kill(stopped)
                self.codes[stopped] = os.waitstatus_to_exitcode(os.waitpid(self.pids[stopped], 0)[1])
            elif time.monotonic() - since > LIMIT_SECONDS:
                left = [rank for rank in range(self.ranks) if rank not in self.codes]
                for rank in left:
                    self.kill(rank)
                return [f"rank {left} not ended after {LIMIT_SECONDS:.0f} s: {self.said()[-1000:]}"]
            time.sleep(0.005)
        bugs = 1 in self.codes.values() if self.agent is None else "this is a bug" in self.said()
        return [f"exit codes {self.codes}: {self.said()[-2000:]}"] if bugs else []

    def kill(self, rank: int) -> None:
        os.kill(self.pids[rank], signal.SIGKILL)

    def said(self) -> str:
        """What all ranks have printed, rank 0 first."""
        paths = sorted(self.folder.glob("rank-*.txt"), key=lambda path: int(path.stem.partition("-")[2]))
        return "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def adapter_of(run: Path) -> bytes:
    path = run / "adapter" / "adapter_model.safetensors"
    return path.read_bytes() if path.is_file() else b""


def figures_of(run: Path) -> dict[str, Any]:
    """All that a run has computed: adapter, steps, evaluations, comparison with the base."""
    from solotune.run.events import EvalEvent, StepEvent, to_line
    from solotune.run.record import RunRecord

    record = RunRecord.read(run)
    found: dict[str, Any] = {"adapter": adapter_of(run)}
    for name, kind in (("steps", StepEvent), ("evaluations", EvalEvent)):
        events = [json.loads(to_line(event)) for event in record.of(kind)]
        found[name] = [{key: value for key, value in event.items() if key not in TIMES} for event in events]
    path = run / "evaluation.json"
    found["comparison"] = path.read_text(encoding="utf-8") if path.is_file() else None
    return found


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The names of the figures that are not equal, bit for bit."""
    return [name for name, value in wanted.items() if found[name] != value]
