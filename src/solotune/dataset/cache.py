"""What `prepare` made, kept for the next start: 5,000 chats come back in less than a second.

The key is a hash of everything that the result depends on: the bytes of the data files, the tokenizer and its template,
the config's data keys and seed, this package's own source and the versions of tokenizers and transformers. So an entry
is never out of date, it only stops being asked for, and there is nothing to clear by hand.

An entry is one safetensors file (ids, mask, lengths; the rest as JSON in a byte tensor) with a checksum, written whole
or not at all. No pickle: a cache folder is a place that others may write to, and loading it must not run anything. An
entry that does not read or does not match its checksum is removed and made anew; a folder that cannot be written is
no error, since the run needs no cache. The oldest entries go when all together are larger than 2 GiB.

Where: $XDG_CACHE_HOME/solotune/data, by default ~/.cache/solotune/data. It holds texts of the rows, so only its owner
may look in.

What it does not do: keep what takes less than a second anyway, errors, or rows of a tokenizer without a Rust backend
(its state has no canonical form).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from solotune.config import RunConfig, section_of
from solotune.dataset.example import Example, Prepared
from solotune.dataset.report import DataReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BYTES = 2 << 30
MIN_SECONDS = 1.0
_SUFFIX = ".safetensors"
_LEFT_OVER_SECONDS = 3600


def folder() -> Path:
    """Where the entries are."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "solotune" / "data"


def key_of(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, digests: Sequence[str], rendered_on: date
) -> str | None:
    """The name of the entry for this input; None if it cannot be named.

    Args:
        digests: of the sources, see `Source.digest`.
        rendered_on: the date that templates write.
    """
    if not tokenizer.is_fast:
        return None
    backend: Any = tokenizer
    template = json.dumps(tokenizer.chat_template)
    keys = [key for key in RunConfig.model_fields if section_of(key) == "data"]
    parts = {
        "code": _code_version(),
        "digests": list(digests),
        "config": {key: getattr(config, key) for key in (*keys, "seed")},
        "tokenizer": hashlib.sha256(backend.backend_tokenizer.to_str().encode()).hexdigest(),
        "special": [
            type(tokenizer).__name__,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            tokenizer.all_special_ids,
        ],
        "template": template,
        # Llama 3.2's template writes the date into each row
        "day": rendered_on.isoformat() if "strftime_now" in template else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def _code_version() -> str:
    digest = hashlib.sha256(" ".join(version(name) for name in ("tokenizers", "transformers", "numpy")).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


# --- one entry


def load(key: str) -> Prepared | None:
    """The entry, or None where there is none that is whole."""
    from safetensors import safe_open

    path = folder() / (key + _SUFFIX)
    if not os.path.isfile(path):  # Path.is_file raises where the folder may not be looked into
        return None
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
            if (file.metadata() or {}).get("sha256") != _checksum(arrays):
                raise ValueError("checksum")
        prepared = _unpacked(arrays)
        os.utime(path)
    # a damaged file fails in any of a dozen ways, and there is one answer to all of them
    except Exception:
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    return prepared


def store(key: str, prepared: Prepared) -> None:
    """Writes an entry, and removes the oldest if there are too many; does nothing where that is not possible."""
    from safetensors.numpy import save

    arrays = _packed(prepared)
    if sum(array.nbytes for array in arrays.values()) > MAX_BYTES:
        return
    temporary = None
    try:
        target = folder()
        target.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=target, suffix=".tmp", delete=False) as file:
            temporary = file.name
            file.write(save(arrays, {"sha256": _checksum(arrays)}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target / (key + _SUFFIX))
        _remove_oldest(target)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _remove_oldest(target: Path) -> None:
    now = time.time()
    for left_over in target.glob("*.tmp"):
        if now - left_over.stat().st_mtime > _LEFT_OVER_SECONDS:  # of a process that was killed
            left_over.unlink()
    entries = [(path.stat().st_mtime, path.stat().st_size, path) for path in target.glob("*" + _SUFFIX)]
    excess = sum(size for _, size, _ in entries) - MAX_BYTES
    for _, size, path in sorted(entries):
        if excess <= 0:
            break
        path.unlink()
        excess -= size


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape} ".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


# --- between Prepared and arrays


def _packed(prepared: Prepared) -> dict[str, np.ndarray]:
    arrays, rows = {}, {}
    for name, examples in (("train", prepared.train), ("validation", prepared.validation)):
        arrays[f"{name}.ids"] = np.concatenate([np.empty(0, np.int32), *(one.input_ids for one in examples)])
        arrays[f"{name}.mask"] = np.concatenate([np.empty(0, bool), *(one.supervised for one in examples)])
        arrays[f"{name}.lengths"] = np.array([len(one.input_ids) for one in examples], np.int64)
        arrays[f"{name}.is_weighted"] = np.array([one.weights is not None for one in examples], bool)
        weights = [one.weights for one in examples if one.weights is not None]
        arrays[f"{name}.weights"] = np.concatenate([np.empty(0, np.float32), *weights])
        rows[name] = [[one.where, one.messages, one.tools] for one in examples]
    report = {**_fields(prepared.report), "labels": _fields(prepared.report.labels), "findings": []}
    text = json.dumps({"rows": rows, "report": report, "manifest": prepared.manifest})
    arrays["json"] = np.frombuffer(text.encode(), np.uint8)
    return arrays


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _unpacked(arrays: dict[str, np.ndarray]) -> Prepared:
    held = json.loads(arrays["json"].tobytes())
    sides = []
    for name in ("train", "validation"):
        lengths, is_weighted = arrays[f"{name}.lengths"], arrays[f"{name}.is_weighted"]
        ends = np.cumsum(lengths)[:-1]
        ids, masks = (np.split(arrays[f"{name}.{what}"], ends) for what in ("ids", "mask"))
        some = iter(np.split(arrays[f"{name}.weights"], np.cumsum(lengths[is_weighted])[:-1]))
        weights = [next(some) if has else None for has in is_weighted]
        rows = held["rows"][name]  # none: np.split still gives one, empty, piece
        parts = zip(ids[: len(rows)], masks, rows, weights, strict=False)
        sides.append([Example(i, m, *row, weights=w) for i, m, row, w in parts])
    return Prepared(sides[0], sides[1], DataReport.from_json_fields(held["report"]), held["manifest"])
