"""Cache of prepared datasets: a second start on 5,000 chats takes less than a second.

Key
---
A hash of everything that the result depends on: the bytes of the data files, the tokenizer as it is loaded with all
that its template can see of it (`_tokenizer_state`), the date if a template writes it, the config's data keys and seed,
this package's source and the versions of Python and of the libraries that read, render or tokenize. So an entry never
becomes stale: after a change it is no longer looked up, and nothing has to be cleared by hand.

Entry
-----
One safetensors file, written completely or not at all: the rows of both sides in the layout of a `Store` (so they are
used in place), their lengths, hashes and the report. The last tensor is the sha256 of everything before it; a file that
does not match is deleted and prepared again. Checking reads the whole entry, about a second per GiB, which is little
compared with the time saved; the data files are hashed for the key anyway. No pickle: others may be able to write to a
cache folder, so loading must not run code. A folder that cannot be written is no error, because a run does not need the
cache. The oldest entries are deleted when all together exceed 20 GiB; no entry takes more than half of the free disk.

The findings about an entry's rows are stored in a second file, under a key that also covers the whole config, what the
rules read of the model, and the rules' source: running 29 rules again takes longer than the rest of a second start.

Folder: $XDG_CACHE_HOME/solotune/data, by default ~/.cache/solotune/data. It contains texts of the rows, so only its
owner can read it.

What it does not do
-------------------
Store results that take less than a second, errors, or rows of a tokenizer without a Rust backend (its state has no
canonical form).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import fields
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from solotune.config.describe import section_of
from solotune.config.run_config import RunConfig
from solotune.dataset.chat.template import directives_of, special_tokens
from solotune.dataset.data_report import DataReport
from solotune.dataset.example import Examples, Prepared
from solotune.dataset.row_store import Store, folder
from solotune.dataset.split.split_manifest import Manifest
from solotune.errors import StorageError
from solotune.run.atomic_io import write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_BYTES = 20 << 30
MIN_SECONDS = 1.0
_SUFFIX, _FINDINGS = ".safetensors", ".findings.json"
_LEFT_OVER_SECONDS = 3600


def key_of(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, digests: Sequence[str], rendered_on: date
) -> str | None:
    """Return the cache key of this input; None for a tokenizer whose state cannot be hashed.

    Args:
        digests: one per source, see `Source.digest`.
        rendered_on: the date that the template sees as today.
    """
    if not tokenizer.is_fast:
        return None
    keys = [key for key in RunConfig.model_fields if section_of(key) == "data"]
    state = _tokenizer_state(tokenizer)
    parts = {
        "code": _code_version(),
        "digests": list(digests),
        "config": {key: getattr(config, key) for key in (*keys, "seed")},
        "tokenizer": state,
        # Llama 3.2's template writes the date into each row
        "day": directives_of(rendered_on) if "strftime_now" in json.dumps(state["template"]) else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What tokenizer and template make of a row, and what a template can see, as JSON.

    It is taken from the loaded tokenizer: files of which it has nothing left do not matter, and changes made after
    loading do. Where its files lie is left out, so that a copy of a model shares the entries of the model.
    """
    backend: Any = tokenizer
    return {
        "class": type(tokenizer).__name__,
        "backend": hashlib.sha256(backend.backend_tokenizer.to_str().encode()).hexdigest(),
        "template": tokenizer.chat_template,
        "seen_by_templates": special_tokens(tokenizer),
        "special_ids": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.all_special_ids],
        "special_tokens": tokenizer.all_special_tokens,
        "added_tokens": {
            str(index): [token.content, token.special, token.lstrip, token.rstrip, token.single_word, token.normalized]
            for index, token in tokenizer.added_tokens_decoder.items()
        },
        "affixes": tokenizer.encode("x", add_special_tokens=True),
        "settings": {
            name: value
            for name, value in tokenizer.init_kwargs.items()
            if not name.endswith("_file") and name not in _OF_NO_CONCERN
        },
    }


_OF_NO_CONCERN = {
    *("name_or_path", "_commit_hash", "local_files_only", "is_local", "processor_class"),  # where it comes from
    *("model_max_length", "padding_side", "truncation_side", "model_input_names"),  # of batches that others make
    *("verbose", "clean_up_tokenization_spaces", "added_tokens_decoder", "chat_template"),  # the last two: as loaded
}
"""Settings of a tokenizer that neither a template nor the ids of a row depend on."""


@cache
def _code_version() -> str:
    libraries = ("tokenizers", "transformers", "numpy", "jinja2", "markupsafe", "pyarrow", "datasets")
    versions = [sys.version, *(version(name) for name in libraries)]
    return hashlib.sha256(" ".join([*versions, source_digest(Path(__file__).parent)]).encode()).hexdigest()


def source_digest(package: Path) -> str:
    """sha256 over the Python source of a package and its sub-packages; changes if any of these files changes."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name, content = path.relative_to(package).as_posix().encode(), path.read_bytes()
        digest.update(len(name).to_bytes(8, "little") + name + len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


# --- one entry


def load(key: str) -> Prepared | None:
    """Load an entry; None if there is none, or if it is damaged."""
    path = folder() / (key + _SUFFIX)
    if not os.path.isfile(path):  # Path.is_file raises if the folder is not readable
        return None
    try:
        file = path.open("rb", buffering=0)
        prepared = _unpacked(file, _checked_header(file))
        os.utime(path)
    # a damaged file can fail in a dozen ways, all handled alike
    except Exception:
        with contextlib.suppress(OSError):
            path.unlink()
        return None
    return prepared


def store(key: str, prepared: Prepared) -> None:
    """Write an entry and delete the oldest ones if the cache is too large; do nothing if that is not possible."""
    tensors = _packed(prepared)
    num_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    temporary = None
    try:
        target = folder()
        if num_bytes > MAX_BYTES:
            return
        target.mkdir(parents=True, exist_ok=True, mode=0o700)
        if num_bytes > shutil.disk_usage(target).free / 2:
            return
        with tempfile.NamedTemporaryFile(dir=target, suffix=".tmp", delete=False) as file:
            temporary = file.name
            _write(file, tensors)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target / (key + _SUFFIX))
        _remove_oldest(target)
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def load_findings(key: str) -> list[dict[str, Any]] | None:
    """Load what `store_findings` saved, or None."""
    try:
        held = json.loads((folder() / (key + _FINDINGS)).read_bytes())
    except (OSError, ValueError):
        return None
    return held["findings"] if isinstance(held, dict) and held.get("key") == key else None


def store_findings(key: str, findings: list[dict[str, Any]]) -> None:
    """Save the findings of an entry under their own key; do nothing if that is not possible."""
    with contextlib.suppress(StorageError):
        write_whole(folder() / (key + _FINDINGS), json.dumps({"key": key, "findings": findings}))


def _remove_oldest(target: Path) -> None:
    now = time.time()
    for left_over in target.glob("*.tmp"):
        if now - left_over.stat().st_mtime > _LEFT_OVER_SECONDS:  # of a process that was killed
            left_over.unlink()
    kept = (*target.glob("*" + _SUFFIX), *target.glob("*" + _FINDINGS))
    entries = [(path.stat().st_mtime, path.stat().st_size, path) for path in kept]
    excess = sum(size for _, size, _ in entries) - MAX_BYTES
    for _, size, path in sorted(entries):
        if excess <= 0:
            break
        path.unlink()
        excess -= size


# --- the file: 8 bytes of length, a header in JSON, the tensors


class _Tensor(NamedTuple):
    """One tensor of the file: its bytes, in pieces."""

    dtype: str
    shape: list[int]
    num_bytes: int
    pieces: Iterable[Any]

    @classmethod
    def of(cls, values: Any) -> _Tensor:
        values = np.ascontiguousarray(values)
        return cls(_DTYPES[values.dtype.kind + str(values.itemsize)], list(values.shape), values.nbytes, [values.data])


_DTYPES = {"u1": "U8", "b1": "BOOL", "i4": "I32", "u8": "U64", "f8": "F64"}
_SHA256_BYTES = 32


def _write(file: IO[bytes], tensors: dict[str, _Tensor]) -> None:
    header, begin = {}, 0
    for name, tensor in tensors.items():
        end = begin + tensor.num_bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
        begin = end
    header["sha256"] = {"dtype": "U8", "shape": [_SHA256_BYTES], "data_offsets": [begin, begin + _SHA256_BYTES]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    for piece in (len(text).to_bytes(8, "little"), text, *(tensor.pieces for tensor in tensors.values())):
        for part in [piece] if isinstance(piece, bytes) else piece:
            digest.update(part)
            file.write(part)
    file.write(digest.digest())


def _checked_header(file: IO[bytes]) -> dict[str, tuple[int, int]]:
    """Verify the checksum and return the byte range of each tensor.

    Raises:
        ValueError: the checksum does not match.
    """
    digest, left = hashlib.sha256(), os.fstat(file.fileno()).st_size - _SHA256_BYTES
    while left > 0 and (piece := file.read(min(left, 1 << 20))):
        digest.update(piece)
        left -= len(piece)
    if file.read() != digest.digest():
        raise ValueError("checksum")
    file.seek(0)
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    return {name: tuple(8 + size + offset for offset in tensor["data_offsets"]) for name, tensor in header.items()}


# --- between Prepared and tensors


def _packed(prepared: Prepared) -> dict[str, _Tensor]:
    tensors = {}
    for name, examples in (("train", prepared.train), ("validation", prepared.validation)):
        assert isinstance(examples, Examples)
        rows = examples.store
        tensors[f"{name}.rows"] = _Tensor("U8", [rows.num_bytes], rows.num_bytes, rows.pieces())
        tensors[f"{name}.ends"] = _Tensor.of(np.array(rows.ends, np.uint64))
        tensors[f"{name}.lengths"] = _Tensor.of(np.array(examples.lengths, np.int32))
    labels, manifest = _fields(prepared.report.labels), prepared.manifest
    tensors["row_tokens"] = _Tensor.of(np.array(labels.pop("row_tokens"), np.int32))
    tensors["shares"] = _Tensor.of(np.array(labels.pop("shares"), np.float64))
    tensors["hashes"] = _Tensor.of(manifest.hashes.view(np.uint8))
    tensors["is_validation"] = _Tensor.of(manifest.is_validation)
    report = {**_fields(prepared.report), "labels": labels}
    text = json.dumps({"report": report, "settings": manifest.settings})
    tensors["json"] = _Tensor.of(np.frombuffer(text.encode(), np.uint8))
    return tensors


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _unpacked(file: IO[bytes], places: dict[str, tuple[int, int]]) -> Prepared:
    def held(name: str, kind: str) -> array[Any]:
        begin, end = places[name]
        file.seek(begin)
        return array(kind, file.read(end - begin))

    sides = []
    for name in ("train", "validation"):
        rows = Store.of(file, places[f"{name}.rows"][0], held(f"{name}.ends", "Q"))
        sides.append(Examples(rows, held(f"{name}.lengths", "i")))
    text = json.loads(held("json", "B").tobytes())
    labels = {**text["report"]["labels"], "row_tokens": held("row_tokens", "i"), "shares": held("shares", "d")}
    hashes, is_validation = np.frombuffer(held("hashes", "B"), "S16"), np.frombuffer(held("is_validation", "B"), bool)
    report = DataReport.from_json_fields({**text["report"], "labels": labels})
    return Prepared(sides[0], sides[1], report, Manifest(text["settings"], hashes, is_validation))
