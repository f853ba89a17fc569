"""What to type instead, where the target of `solotune diagnose` is no run: data, an archive, a model, several runs."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

from solotune.dataset.readers.files import format_of
from solotune.diagnosis.sources.surroundings import files_of, folders_of, is_array
from solotune.errors import InputError

ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
SCRIPTS = (".py", ".ipynb", ".sh")
NUM_LISTED = 5
DEPTH = 2
"""Levels of folders in which runs are looked for: project/outputs/run-1."""
ALLOWED = "a config file, a run directory, a folder or a log of another trainer"


def of_file(path: Path) -> InputError | None:
    """The error for a file that is no config; None if it may be one."""
    name = path.name.lower()
    quoted = shlex.quote(str(path))
    if name.endswith(ARCHIVES) or ".tar." in name:
        unpack = f"unzip {quoted} -d run" if name.endswith(".zip") else f"mkdir run; tar -xf {quoted} -C run"
        return InputError(
            f"{path}: an archive; it is not unpacked here", allowed=ALLOWED, change=f"{unpack}; solotune diagnose run"
        )
    if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf")):
        return InputError(f"{path}: weights; a diagnosis needs the folder around them", allowed=ALLOWED,
                          change=f"solotune diagnose {shlex.quote(str(path.parent))}")  # fmt: skip
    if name.endswith(SCRIPTS):
        return InputError(f"{path}: a script, which is not run here", allowed=ALLOWED,
                          change="solotune diagnose FOLDER, with the output_dir of the script")  # fmt: skip
    is_data = format_of(path) is not None and (path.suffix.lower() != ".json" or is_array(path))
    if not is_data:
        return None
    return InputError(
        f"{path}: this is data, not a run",
        allowed=ALLOWED,
        change=f"to check the rows: solotune init MODEL {quoted}, then solotune data solotune.yaml; to diagnose a run "
        f"that was trained on it: solotune diagnose FOLDER --dataset {quoted}",
    )


def runs_in(folder: Path, is_run: Callable[[Path], bool]) -> list[Path]:
    """The folders of runs below a folder, the oldest first."""
    found, level = [], [folder]
    for _ in range(DEPTH):
        inner = [one for place in level for one in folders_of(place, 200)][:200]
        runs = [one for one in inner if is_run(one)]
        found += runs
        level = [one for one in inner if one not in runs]
    return sorted(found, key=lambda one: one.stat().st_mtime)


def of_folder(folder: Path, runs: list[Path]) -> InputError:
    """The error for a folder that is no run."""
    if runs:
        shown = ", ".join(str(run) for run in runs[-NUM_LISTED:])
        return InputError(
            f"{folder}: a folder of {len(runs)} run{'s' * (len(runs) > 1)}",
            seen=shown,
            change=f"solotune diagnose {shlex.quote(str(runs[-1]))}",
        )
    files = files_of(folder)
    names = {file.name for file in files}
    if "config.json" in names and any(name.endswith((".safetensors", ".bin", ".gguf")) for name in names):
        return InputError(
            f"{folder}: a model, without anything of its training (a merged model, or a base)",
            seen=", ".join(sorted(names)[:NUM_LISTED]),
            change="diagnose the output_dir of the training: the folder with trainer_state.json or adapter_config.json",
        )
    data = [file for file in files if format_of(file) is not None and file.suffix.lower() != ".json"]
    if data:
        return InputError(
            f"{folder}: data, not a run",
            seen=", ".join(file.name for file in data[:NUM_LISTED]),
            change=f"check the rows: solotune init MODEL {shlex.quote(str(data[0]))}, then solotune data solotune.yaml",
        )
    return InputError(
        f"{folder} is not a run, a config or a trainer's output folder",
        seen=", ".join(sorted(path.name for path in folder.iterdir())[:6]) or "an empty folder",
        allowed="a config file, a run directory (config.yaml), a trainer's folder (trainer_state.json, "
        "training_args.bin, adapter_config.json), or its logs (*.jsonl, TensorBoard, W&B, MLflow, a console log)",
    )
