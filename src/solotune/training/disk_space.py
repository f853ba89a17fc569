"""Check the disk space for a run's files before the first step: a full disk at step 300 costs an afternoon.

    checkpoint  adapter (float32) + optimizer's moments + random states + state.json, each in whole blocks of the disk
    most        min(saves of the run, save_total_limit + 1) checkpoints: a new one is written before the oldest goes
    need        most * checkpoint + final adapter with its tokenizer + the text files of the run

Sizes are computed from the loaded model: exact to the byte for tensor files, by number of rows and steps for text
files. Checkpoints that exist already (of a resumed run) are not counted again.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from solotune.config.run_config import RunConfig
from solotune.dataset import Prepared
from solotune.dataset.sampler import BatchSampler, pack_sequences
from solotune.errors import CheckError
from solotune.model import lora
from solotune.model.loading import TrainableModel
from solotune.planning.memory import MIN_8BIT_WEIGHTS, OPTIMIZER_BLOCK
from solotune.training import checkpoint
from solotune.units import mib

CODE_BOOK_BYTES = 2 * 256 * 4  # quantization tables of the two 8-bit moments
STEP_BYTES, ROW_BYTES = 480, 48  # a line of metrics.jsonl, and of split.json
REPORT_BYTES, REPORT_STEP_BYTES, REPORT_STEPS = 128 << 10, 150, 12_000  # of report.html: longer curves are thinned out
RECORD_BYTES = (4096, 4096, 16384, 8192, 4096, 16384, 8192)  # config, environment, data, plan, log, evaluation, state


@dataclass(frozen=True)
class Need:
    """Bytes of a run's files."""

    checkpoint: int
    checkpoints: int  # the most that exist at one time
    adapter: int
    records: int

    @property
    def total(self) -> int:
        return self.checkpoint * self.checkpoints + self.adapter + self.records


def need_of(config: RunConfig, model: TrainableModel, prepared: Prepared, tokenizer: Any, existing: int = 0,
            block: int = 4096) -> Need:  # fmt: skip
    """The bytes that a run will write.

    Args:
        existing: number of checkpoints that exist already.
        block: file sizes on that disk are rounded up to a multiple of this.
    """
    schedule = BatchSampler.of(config.batches, len(pack_sequences(config.batches, prepared.train)))
    every = config.every("save", schedule.steps_per_epoch)
    saves = math.ceil(schedule.total_steps / every) if every else 0
    most = saves if config.save_total_limit is None else min(saves, config.save_total_limit + 1)
    adapter = [
        _tensor_file_bytes({key: 4 * part.numel() for key, part in lora.parameters(model.lora_layers).items()}),
        2048,
    ]
    state = 2048 + len(json.dumps(config.model_dump(), indent=2))
    files = [
        *adapter,
        _tensor_file_bytes(_optimizer_sizes(config.optim, model.flat_params.numel())),
        _random_bytes(),
        state,
    ]
    if config.evaluation.tracks_best and prepared.validation:
        files.append(9 * len(prepared.validation) + 4096 + (adapter[0] if config.load_best_model_at_end else 0))
    rows = len(prepared.train) + len(prepared.validation)
    report = REPORT_BYTES + min(schedule.total_steps, REPORT_STEPS) * REPORT_STEP_BYTES
    records = [schedule.total_steps * STEP_BYTES, rows * ROW_BYTES, report, *RECORD_BYTES]
    return Need(
        checkpoint=_on_disk(files, block),
        checkpoints=max(most - existing, 1 if saves else 0),
        adapter=_on_disk([*adapter, *_tokenizer_bytes(tokenizer)], block),
        records=_on_disk(records, block),
    )


def require_room(need: Need, folder: Path) -> None:
    """Raises:
    CheckError: the disk of `folder` has less free space than the run needs.
    """
    free = free_bytes(folder)
    if free >= need.total:
        return
    parts = f"{need.checkpoints} checkpoints of {mib(need.checkpoint)} MiB, adapter {mib(need.adapter)} MiB"
    parts += f", text files {mib(need.records)} MiB"
    fewer = "save_total_limit: 1 (keeps fewer checkpoints), " * (need.checkpoints > 2)
    raise CheckError(
        "the files of this run do not fit on the disk",
        seen=f"{mib(free)} MiB free in {folder}, {mib(need.total)} MiB needed: {parts}",
        change=f"{fewer}free {mib(need.total - free)} MiB, or choose an output_dir on another disk",
    )


def require_writable(folder: Path) -> None:
    """Raises:
    CheckError: a test file cannot be written there (permissions alone do not show it).
    """
    try:
        with tempfile.TemporaryFile(prefix=".solotune-", dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        raise CheckError(
            f"{folder}: cannot create the run directory there",
            seen=error.strerror,
            change="free disk space, fix the permissions, or choose another output_dir",
        ) from None


def free_bytes(folder: Path) -> int:
    """Bytes that this user can still write there."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def block_bytes(folder: Path) -> int:
    return os.statvfs(folder).f_frsize


def _optimizer_sizes(optim: str, weights: int) -> dict[str, int]:
    if "8bit" in optim and weights >= MIN_8BIT_WEIGHTS:
        scales = 4 * math.ceil(weights / OPTIMIZER_BLOCK)
        return {"0/state1": weights, "0/state2": weights, "0/scales": 2 * scales + CODE_BOOK_BYTES}
    return {"0/exp_avg": 4 * weights, "0/exp_avg_sq": 4 * weights}


def _random_bytes() -> int:
    states = checkpoint.random_state()
    return _tensor_file_bytes({name: state.numel() for name, state in states.items()})


def _tensor_file_bytes(sizes: Mapping[str, int]) -> int:
    """Size of a safetensors file: 8 bytes, its header, the tensors."""
    header = sum(len(name) + 90 for name in sizes) + 32
    return 8 + header + sum(sizes.values())


def _tokenizer_bytes(tokenizer: Any) -> list[int]:
    """Sizes of the tokenizer files saved with the adapter."""
    template = len(str(tokenizer.chat_template or "").encode())
    if getattr(tokenizer, "is_fast", False):
        vocabulary = len(tokenizer.backend_tokenizer.to_str(pretty=True).encode())
    else:
        vocabulary = 64 * len(tokenizer)
    return [vocabulary, template, 4096]


def _on_disk(sizes: Sequence[int], block: int) -> int:
    return sum(-(-size // block) * block for size in sizes)
