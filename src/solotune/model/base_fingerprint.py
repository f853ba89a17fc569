"""A fingerprint of a base model, so that an adapter is never used with another base.

    config    sha256 of config.json, without the keys that say where and with what it was saved
    tensors   sha256 of every tensor's name, dtype and shape
    content   sha256 of SAMPLES samples of SAMPLE_BYTES, evenly spaced, from every tensor

PEFT loads an adapter on any base with the same shapes, without a warning. Another revision, a fine-tune of the base, or
one changed layer differ in nearly every byte of a tensor, and so in each sample. Damage of a few bytes between the
samples is not seen; finding it would need all of 16 GB. The samples of an 8B model are 19 MB (291 tensors x 4 x 16
KiB), read and hashed in 0.04 s if the disk does not have to be waited for.

The folder's name is not part of it: a base that was moved or downloaded again is the same base.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from solotune.errors import IntegrityError
from solotune.hub.model_files import ModelFiles
from solotune.hub.safe_files import contained, json_object
from solotune.hub.safetensors_header import read_header
from solotune.model.weight_files import weight_files
from solotune.regular_files import open_regular

SAMPLES, SAMPLE_BYTES = 4, 16 << 10
NOT_THE_MODEL = ("_name_or_path", "transformers_version")  # keys of config.json that do not count
WORDS = {"config": "its config.json", "tensors": "its tensors' names or shapes", "content": "its weights"}


def base_fingerprint(base: ModelFiles) -> dict[str, str]:
    """Fingerprint of a model; its weights are downloaded if they are not on this machine.

    Raises:
        InputError: they cannot be downloaded, or a file cannot be read.
    """
    return fingerprint_of(base.with_weights().folder)


def fingerprint_of(folder: Path) -> dict[str, str]:
    """Fingerprint of a model folder."""
    architecture = json_object(contained(folder, "config.json"))
    kept = {key: value for key, value in architecture.items() if key not in NOT_THE_MODEL}
    tensors, content = hashlib.sha256(), hashlib.sha256()
    for path in weight_files(folder):
        entries = read_header(path)
        with open_regular(path) as file:
            for name in sorted(entries):
                entry = entries[name]
                tensors.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
                room = max(0, entry.end - entry.begin - SAMPLE_BYTES)
                for offset in sorted({room * number // (SAMPLES - 1) for number in range(SAMPLES)}):
                    wanted = min(SAMPLE_BYTES, entry.end - entry.begin)
                    content.update(os.pread(file.fileno(), wanted, entry.begin + offset))
    canonical = json.dumps(kept, sort_keys=True).encode()
    return {
        "config": hashlib.sha256(canonical).hexdigest(),
        "tensors": tensors.hexdigest(),
        "content": content.hexdigest(),
    }


def check_base(recorded: Mapping[str, Any] | None, found: Mapping[str, str], where: str) -> None:
    """Compare two fingerprints.

    Raises:
        IntegrityError: `found` is not the recorded base.
    """
    for key, words in WORDS.items():
        if recorded is not None and recorded.get(key) != found[key]:
            raise IntegrityError(
                f"{where}: this adapter was trained on another base model",
                seen=f"{words} differ: sha256 {found[key][:12]}",
                allowed=str(recorded.get(key))[:12],
                change="set model_name_or_path and model_revision to the base model of this run",
                fault="F78",
            )
