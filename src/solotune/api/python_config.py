"""Configs as Python callers write them: keys as arguments, and rows or datasets instead of files.

solotune.train("run.yaml", learning_rate=1e-4)
solotune.train({"model_name_or_path": "model", "dataset": [{"prompt": "2 + 2 =", "completion": " 4"}]})
solotune.train("run.yaml", dataset=datasets.load_dataset(...)["train"])
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from solotune.api.types import ConfigSource, Overrides
from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.errors import InputError
from solotune.regular_files import open_regular

PIECE_BYTES = 1 << 20
_DATA_KEYS = ("dataset", "eval_dataset")


def config_of(config: ConfigSource, overrides: Overrides = (), keys: Mapping[str, Any] | None = None) -> RunConfig:
    """Check a config with its overrides, as `load_config` does.

    Rows that are given as objects become a file in the cache folder (`rows`), named by its content: a run records
    where its rows are, and reads them again when it is resumed.

    Args:
        overrides: `key=value` strings, or a mapping of keys.
        keys: further keys; they win over `overrides`.

    Raises:
        InputError: lists every mistake; rows that are no dicts, or that JSON cannot hold.
    """
    texts = [] if isinstance(overrides, Mapping) else list(overrides)
    given = {**(overrides if isinstance(overrides, Mapping) else {}), **(keys or {})}
    own = _with_files(config) if isinstance(config, Mapping) else config
    return load_config(own, texts, _with_files(given))


def _with_files(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _as_file(value, key) if key in _DATA_KEYS else value for key, value in values.items()}


def _as_file(data: Any, key: str) -> Any:
    """The path of a file with these rows; names, paths and what the config itself refuses stay as they are."""
    if hasattr(data, "to_parquet"):  # datasets.Dataset, pandas.DataFrame: keeps the types of their columns
        return _stored(data.to_parquet, ".parquet")
    if not isinstance(data, Sequence) or isinstance(data, str) or all(isinstance(one, str) for one in data):
        return data
    lines = [_line(row, f"{key}: row {number}") for number, row in enumerate(data)]
    return _stored(lambda path: Path(path).write_text("".join(lines), encoding="utf-8"), ".jsonl")


def _line(row: Any, place: str) -> str:
    if not isinstance(row, Mapping):
        raise InputError(
            f"{place} is no dict",
            seen=repr(row)[:100],
            allowed="a path, a hub id, a list of dicts, a datasets.Dataset or a pandas.DataFrame",
        )
    try:
        return json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise InputError(f"{place} cannot be written as JSON", seen=str(error)[:200]) from None


def _stored(write: Callable[[str], Any], suffix: str) -> str:
    """Write a file and name it by its content: the same rows are one file, and a changed row is another."""
    from solotune.dataset import row_store  # heavy, and seldom needed

    folder = row_store.folder().with_name("rows")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=suffix, delete=False) as file:
        written = Path(file.name)
    try:
        write(str(written))
        digest = hashlib.sha256()
        with open_regular(written) as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
        path = folder / f"{digest.hexdigest()[:32]}{suffix}"
        written.replace(path)
    except BaseException:
        written.unlink(missing_ok=True)
        raise
    return str(path)
