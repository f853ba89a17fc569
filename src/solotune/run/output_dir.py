"""Is this a place for a run? Asked before anything is spent on it; nothing is made or changed for the answer.

A run directory is new, empty, or a run's own. Not a link, for whoever planted it decides what is overwritten; not a
folder with other things in it, nor the base model; and in a run that is resumed no link stands where a file will be
written.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from solotune.errors import DirectoryInUseError, InputError
from solotune.hub.download import local_path
from solotune.run.manifest import MANIFEST
from solotune.run.run_dir import FINGERPRINTS, LOG, METRICS, STACKS

OF_A_RUN = {
    "config.yaml", "environment.json", "plan.json", "data.json", "split.json", "evaluation.json", "diagnosis.json",
    "report.html", "checkpoints", "adapter", "export", METRICS, LOG, FINGERPRINTS, STACKS, MANIFEST,
}  # fmt: skip


def check_destination(output_dir: str | None, source: str, model_name_or_path: str) -> None:
    """Check `output_dir`; None: a new folder will be made below `runs/`.

    Args:
        source: where the value of `output_dir` came from, for messages.

    Raises:
        InputError: no path that can be, a link, or the base model's folder.
        DirectoryInUseError: a folder with other things than a run in it.
    """
    path = Path(os.path.expanduser(output_dir or "runs"))
    where = f"{source}, output_dir"
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        mode = 0
    except (OSError, ValueError) as error:  # too long, a file among its parents, no access
        raise InputError(f"{where}: no such folder can be", seen=_reason(error, path)) from None
    if mode and output_dir:
        _check_present(where, path, mode)
    real, model = Path(os.path.realpath(path)), local_path(model_name_or_path)
    if model is not None and os.path.isdir(model) and real.is_relative_to(os.path.realpath(model)):
        raise InputError(f"{where}: inside the base model's folder", seen=str(path), change="another output_dir")


def _check_present(where: str, path: Path, mode: int) -> None:
    if stat.S_ISLNK(mode):
        raise InputError(f"{where}: a link", seen=f"{path} -> {os.readlink(path)}", change="name the folder itself")
    if not stat.S_ISDIR(mode):
        raise InputError(f"{where}: {path} is no folder", allowed="a folder, existing or not")
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_symlink():
                change = "remove the link, or choose another output_dir"
                raise InputError(f"{where}: a link where the run writes", seen=entry.path, change=change)
            if entry.name not in OF_A_RUN and not entry.name.startswith("."):
                raise DirectoryInUseError(
                    f"{path} holds something else than a run",
                    seen=entry.name,
                    change="an output_dir that is empty or does not exist yet",
                )


def _reason(error: Exception, path: Path) -> str:
    text = str(path)
    shown = text if len(text) <= 80 else f"{text[:80]}..."
    return f"{shown}: {getattr(error, 'strerror', None) or error}"
