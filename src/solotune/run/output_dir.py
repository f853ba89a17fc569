"""Check `output_dir` before a run starts; nothing is created or changed.

A run directory is new, empty, or holds a run. It may not be a link (the link's target would be overwritten), a folder
with other files in it, or inside the base model's folder. In a resumed run, no file may be a link, FIFO or device.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from solotune.errors import DirectoryInUseError, InputError
from solotune.hub.download import local_path
from solotune.run.manifest import MANIFEST
from solotune.run.run_dir import FINGERPRINTS, LOG, METRICS, REPORT, STACKS, TRACKERS

OF_A_RUN = {
    "config.yaml", "environment.json", "plan.json", "data.json", "split.json", "evaluation.json", "diagnosis.json",
    "checkpoints", "adapter", "export", METRICS, LOG, FINGERPRINTS, STACKS, REPORT, MANIFEST,
    TRACKERS,
}  # fmt: skip


def check_destination(output_dir: str | None, source: str, model_name_or_path: str) -> None:
    """Check `output_dir`; None: a new folder will be made below `runs/`.

    Args:
        source: where the value of `output_dir` came from, for messages.

    Raises:
        InputError: not a possible path, a link, or in the base model's folder.
        DirectoryInUseError: a folder with other files than those of a run.
    """
    path = Path(os.path.expanduser(output_dir or "runs"))
    where = f"{source}, output_dir"
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        mode = 0
    except (OSError, ValueError) as error:  # too long, a file among its parents, no access
        raise InputError(f"{where}: this folder cannot be created", seen=_reason(error, path)) from None
    if mode and output_dir:
        _check_present(where, path, mode)
    real, model = Path(os.path.realpath(path)), local_path(model_name_or_path)
    if model is not None and os.path.isdir(model) and real.is_relative_to(os.path.realpath(model)):
        raise InputError(f"{where}: inside the base model's folder", seen=str(path), change="choose another output_dir")


def _check_present(where: str, path: Path, mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise InputError(
            f"{where}: a link", seen=f"{path} -> {os.readlink(path)}", change="use the path of the folder itself"
        )
    if not stat.S_ISDIR(mode):
        raise InputError(f"{where}: {path} is not a folder", allowed="a folder, existing or not")
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_symlink():
                change = "remove the link, or choose another output_dir"
                raise InputError(f"{where}: the folder contains a link", seen=entry.path, change=change)
            if not (entry.is_file() or entry.is_dir()):
                what = "the folder contains a FIFO, socket or device"
                change = "remove it, or choose another output_dir"
                raise InputError(f"{where}: {what}", seen=entry.path, change=change)
            if entry.name not in OF_A_RUN and not entry.name.startswith("."):
                raise DirectoryInUseError(
                    f"{path} contains other files than those of a run",
                    seen=entry.name,
                    change="choose an output_dir that is empty or does not exist yet",
                )


def _reason(error: Exception, path: Path) -> str:
    text = str(path)
    shown = text if len(text) <= 80 else f"{text[:80]}..."
    return f"{shown}: {getattr(error, 'strerror', None) or error}"
