"""Find the run that `--resume` continues: the newest run of this config, by what the runs recorded.

    runs/demo-20260101-120000/environment.json    {"config_name": "demo", ...}
    runs/demo-20260101-120000/config.yaml         every key

The name of a run's folder says nothing: `demo-eval-...` begins with `demo`, and folders are renamed. A run belongs to
a config if it recorded the same config name, and the same values of all keys but those that may change. Of a run that
recorded no name, from an older version, the evaluation keys have to be equal too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solotune.config.describe import section_of
from solotune.config.run_config import RunConfig
from solotune.config.settings import MICRO_BATCH
from solotune.errors import IntegrityError
from solotune.run.record import RunRecord
from solotune.run.run_dir import RunDirectory, list_runs

CONFIG_NAME = "config_name"  # key of environment.json
MAY_CHANGE = {
    "preflight", "gradient_checkpointing", "activation_offload", "base_residency", "base_offload", "base_sharding",
    "torch_compile", "cuda_graphs", "attn_implementation",
}  # fmt: skip
"""Keys outside of the section `run` that change no more than rounding."""


def run_of_config(config: RunConfig) -> RunDirectory | None:
    """The newest run of this config in `runs/`; None if there is none.

    Raises:
        IntegrityError: there are runs of a config of this name, but with other values.
    """
    others = []
    for run in reversed(list_runs()):
        record = RunRecord(run.path, ())  # its files are read at first use; its events are not needed
        name = recorded_name(record)
        if name not in (None, config.name):
            continue
        changed = changed_keys(record, config, with_evaluation=name is None)
        if changed is not None and not changed:
            return run
        if name is not None:
            others.append((run, changed))
    if not others:
        return None
    run, changed = others[0]
    raise IntegrityError(
        f"--resume: the newest run of {config.name}, {run.path}, has another config than this",
        seen=in_words(changed) if changed else "its config.yaml cannot be read",
        change=f"set it back, continue that run on purpose with output_dir={run.path}, or train without --resume",
    )


def recorded_name(record: RunRecord) -> str | None:
    """The name of the config that started a run; None if it is not recorded."""
    name = (record.environment or {}).get(CONFIG_NAME)
    return name if isinstance(name, str) else None


def changed_keys(
    record: RunRecord, config: RunConfig, with_evaluation: bool = False
) -> dict[str, tuple[Any, Any]] | None:
    """Keys whose change makes it another run, with the value of the run and of the config; None without a config.yaml.

    Keys that solotune chose for the machine of the run are left out: the config has what was asked for.
    """
    then = record.config
    if then is None:
        return None
    chosen = _chosen(record)
    now = config.model_dump()
    changed = {}
    for key, value in now.items():
        section = section_of(key)
        may_change = section == "run" or (section == "evaluation" and not with_evaluation) or key in MAY_CHANGE
        if key in then and not may_change and key not in chosen and then[key] != value:
            changed[key] = (then[key], value)
    ranks = (record.fingerprints or {}).get("world_size", 1)
    if rows_per_step(then, ranks) == rows_per_step(now, config.ranks):
        changed = {key: pair for key, pair in changed.items() if key not in MICRO_BATCH}
    return changed


def in_words(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """`learning_rate: 0.0001 there, 0.0002 here`; up to four keys."""
    parts = [f"{key}: {str(there)[:80]} there, {str(here)[:80]} here" for key, (there, here) in changed.items()]
    more = f"; and {len(parts) - 4} more keys" if len(parts) > 4 else ""
    return "; ".join(parts[:4]) + more


def refuse_other_config(path: Path, config: RunConfig) -> None:
    """Check that a run without a checkpoint, which would start again from step 0, is a run of this config.

    Raises:
        IntegrityError: it is a run of another config.
    """
    changed = changed_keys(RunRecord(path, ()), config)
    if changed:
        raise IntegrityError(
            f"{path}: the run in this folder has another config and no checkpoint, so nothing of it can be continued",
            seen=in_words(changed),
            change="choose another output_dir, or remove the folder",
        )


def planned_micro_batch(record: RunRecord) -> dict[str, int]:
    """The values of `MICRO_BATCH` that the plan of a run chose; empty if it chose none, or they are damaged."""
    chosen = _chosen(record)
    sizes = {key: chosen[key] for key in MICRO_BATCH if type(chosen.get(key)) is int}
    return sizes if rows_per_step(sizes) else {}


def _chosen(record: RunRecord) -> dict[str, Any]:
    """Keys that solotune chose for a run, with their values."""
    choices = (record.environment or {}).get("choices")
    entries = choices if isinstance(choices, list) else []
    return {str(entry.get("key")): entry.get("value") for entry in entries if isinstance(entry, dict)}


def rows_per_step(values: Mapping[str, Any], ranks: Any = 1) -> int | None:
    """Rows of an optimizer step by the values of a config, on so many ranks; None if they are damaged."""
    sizes = [*(values.get(key) for key in MICRO_BATCH), ranks]
    return math.prod(sizes) if all(type(size) is int for size in sizes) else None  # type: ignore[arg-type]
