"""What a base model is, in a few numbers: so that an adapter is never put on another base than its own.

    config    sha256 of config.json, without the keys that name where and with what it was saved
    tensors   sha256 of every tensor's name, dtype and shape
    content   sha256 of SAMPLES stretches of SAMPLE_BYTES, evenly spaced, of every tensor

PEFT loads an adapter on any base of the same shapes, without a word. Another revision, a fine-tune of the base, or one
layer that was changed differ in nearly every byte of a tensor, and so in each stretch. What stays unseen is damage of a
few bytes between the stretches; all of 16 GB would have to be read to find it. The stretches of an 8B model are 19 MB
(291 tensors x 4 x 16 KiB), read and hashed in 0.04 s where the disk does not have to be waited for.

The folder's name is no part of it: a base that was moved or downloaded again is the same base.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from solotune.errors import IntegrityError
from solotune.hub.model_files import ModelFiles
from solotune.hub.safe_files import contained, json_object
from solotune.hub.safetensors_header import read_header
from solotune.model.weights import weight_files

SAMPLES, SAMPLE_BYTES = 4, 16 << 10
NOT_THE_MODEL = ("_name_or_path", "transformers_version")  # keys of config.json
WORDS = {"config": "its config.json", "tensors": "its tensors' names or shapes", "content": "its weights"}


def base_fingerprint(base: ModelFiles) -> dict[str, str]:
    """Of a model, whose weights are downloaded where they are not here.

    Raises:
        InputError: they cannot be had, or a file cannot be read.
    """
    return fingerprint_of(base.with_weights().folder)


def fingerprint_of(folder: Path) -> dict[str, str]:
    """Of a model folder."""
    architecture = json_object(contained(folder, "config.json"))
    kept = {key: value for key, value in architecture.items() if key not in NOT_THE_MODEL}
    tensors, content = hashlib.sha256(), hashlib.sha256()
    for path in weight_files(folder):
        entries = read_header(path)
        with path.open("rb") as file:
            for name in sorted(entries):
                entry = entries[name]
                tensors.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
                room = max(0, entry.end - entry.begin - SAMPLE_BYTES)
                for offset in sorted({room * number // (SAMPLES - 1) for number in range(SAMPLES)}):
                    wanted = min(SAMPLE_BYTES, entry.end - entry.begin)
                    content.update(os.pread(file.fileno(), wanted, entry.begin + offset))
    said = json.dumps(kept, sort_keys=True).encode()
    return {
        "config": hashlib.sha256(said).hexdigest(),
        "tensors": tensors.hexdigest(),
        "content": content.hexdigest(),
    }


def check_base(recorded: Mapping[str, str] | None, found: Mapping[str, str], where: str) -> None:
    """Raises:
    IntegrityError: `found` is not the recorded base.
    """
    for key, words in WORDS.items():
        if recorded is not None and recorded[key] != found[key]:
            raise IntegrityError(
                f"{where}: the base model is not the one that this adapter was trained on",
                seen=f"{words} differ: sha256 {found[key][:12]}",
                allowed=f"{recorded[key][:12]}",
                change="name the base of this run in model_name_or_path, with its model_revision",
                fault="F78",
            )
