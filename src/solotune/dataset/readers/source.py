"""Data sources: from `dataset` and `dataset_split` to rows of local files, a folder, or a hub dataset.

Names
-----
A name that exists on disk is local, whatever it looks like; a name that looks like a path but does not exist is a
missing file, never a hub id, so a typo does not end in a network error. Slices have the syntax of `datasets`
(`train[:100]`, `train[10%:20%]`, `train[-50:]`) and mean the same for local files; percentages round to the nearest
row, as there.

    train_sft[:5000]  ->  Split(name="train_sft", start=None, stop="5000")

What it does not do
-------------------
Run code that comes with a dataset (`datasets` 4 cannot, and nothing here enables it), or cache rows (`cache.py` caches
the finished tokens): so errors can name a file's lines.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from solotune.dataset.readers.api_logs import from_log
from solotune.dataset.readers.files import FORMATS, format_of, read_file, rows_of_texts
from solotune.dataset.readers.json_layouts import SPLIT_NAMES
from solotune.dataset.readers.json_records import OnBadRow
from solotune.dataset.readers.left_out import LeftOut
from solotune.dataset.readers.row import Row, RowError
from solotune.dataset.readers.schema_nulls import SchemaNulls
from solotune.errors import InputError
from solotune.hub import download_progress
from solotune.hub.download import is_local_path, offline_if_unreachable, offline_switch
from solotune.runtime import watchdog
from solotune.units import first_line

_SLICE = re.compile(r"(?P<name>[^\[\]+]*)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")
_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class Split:
    """A split's name and slice; bounds as written, such as `10%` or `-50`."""

    written: str
    name: str
    start: str | None = None
    stop: str | None = None

    @classmethod
    def parse(cls, key: str, written: str) -> Split:
        """Parse `name[start:stop]`; `key` is the config key, for the message."""
        match = _SLICE.fullmatch(written.strip())
        if match is None:
            raise InputError(
                f"{key}: not a split",
                seen=written,
                allowed="a name, with or without one slice: train, train[:100], train[10%:20%], train[-50:]",
            )
        return cls(written, match["name"] or "train", match["start"], match["stop"])

    @property
    def needs_count(self) -> bool:
        """Whether a bound is a percentage or counted from the end."""
        return any(bound is not None and not bound.isdigit() for bound in (self.start, self.stop))

    def cut(self, rows: Iterable[_Item], num_rows: int | None = None) -> Iterator[_Item]:
        """Yield the rows of the slice and read no further; `num_rows` is required if the slice `needs_count`."""
        start, stop = self._bound(self.start, num_rows), self._bound(self.stop, num_rows)
        if num_rows is not None:
            start, stop, _ = slice(start, stop).indices(num_rows)
        start = start or 0
        return islice(rows, start, stop if stop is None else max(start, stop))

    @staticmethod
    def _bound(bound: str | None, num_rows: int | None) -> int | None:
        if bound is None or num_rows is None or not bound.endswith("%"):
            return None if bound is None else int(bound)
        return round(int(bound[:-1]) * num_rows / 100)


@dataclass
class Source:
    """The rows of a config's `dataset` or `eval_dataset`, read again each time it is iterated.

    So only one row is in memory, however large the file is; to know something about all rows before the first is used
    (the most common format), iterate twice. `key` is the config key, for messages.
    """

    key: str
    label: str
    wanted: Split
    files: list[tuple[Path, str]] | None
    """Local files, each with its label in messages; None for a hub dataset."""
    load_from_hub: Callable[[], Iterable[Any]]
    on_bad_row: OnBadRow | None = None
    """Called with the error of each row that cannot be read; None: the error is raised."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """What the last pass left out of the rows."""
    num_bad: int = 0
    """Rows that the last pass could not read."""
    _num_rows: int | None = None
    _stamps: list[tuple[int, int]] | None = None

    @classmethod
    def of(
        cls,
        key: str,
        source: str | list[str],
        split: str,
        *,
        config_name: str | None = None,
        revision: str | None = None,
    ) -> Source:
        """Finds the rows.

        Args:
            key: the config key (`dataset`), for messages.
            source: hub id, file, folder, or several files.
            split: `train`, `train_sft[:5000]`, ...
            config_name: configuration (subset) of a hub dataset.
            revision: branch, tag or commit of a hub dataset.

        Raises:
            InputError: no such file.
        """
        wanted = Split.parse(f"{key}_split", split)
        names = [source] if isinstance(source, str) else source
        for name in names:
            if _printable(name) != name:
                raise InputError(
                    f"{key}: the name is not UTF-8, so the run could not record it",
                    seen=_printable(name),
                    change="rename the file, or give its folder instead",
                )
        is_local = [_is_local(name) for name in names]
        if not any(is_local) and len(names) == 1:
            load = partial(_load_from_hub, key, names[0], wanted, config_name, revision)
            return cls(key, names[0], wanted, None, load)
        for what, value in (("dataset_config", config_name), ("dataset_revision", revision)):
            if value is not None:
                raise InputError(f"{what}: only for hub datasets, but {key} is local", seen=value, change="remove it")
        return cls(key, ", ".join(names), wanted, _local_files(key, names, wanted), list)

    def __iter__(self) -> Iterator[Row]:
        """Read the rows.

        Raises:
            InputError: no such dataset, a file that cannot be parsed, or no rows; names the place.
        """
        for _, row in self.rows_by_file():
            yield row

    def rows_by_file(self) -> Iterator[tuple[int, Row]]:
        """Read the rows, each with the number of its file, counted from 0.

        Raises:
            InputError: as iterating does.
        """
        self.left_out, self.num_bad = LeftOut(), 0
        rows = self._hub_rows() if self.files is None else self._file_rows(self.files)
        first = next(rows, None)
        if first is None and self.num_bad:
            return
        if first is None:
            part = "" if self.wanted.written == "train" else f", split {self.wanted.written}"
            raise InputError(
                f"{self.key}: 0 rows", seen=self.label + part, change="use a file that has rows, or another slice"
            )
        yield first
        yield from rows

    def _file_rows(self, files: list[tuple[Path, str]]) -> Iterator[tuple[int, Row]]:
        def rows(left_out: LeftOut) -> Iterator[tuple[int, Row]]:
            for number, (path, label) in enumerate(files):
                for row in read_file(path, label, left_out, self._on_bad):
                    yield number, row

        if self.wanted.needs_count and self._num_rows is None:
            self._num_rows = sum(1 for _ in rows(LeftOut()))
        return self.wanted.cut(rows(self.left_out), self._num_rows)

    def _on_bad(self, error: RowError) -> None:
        if self.on_bad_row is None:
            raise error
        self.num_bad += 1
        self.on_bad_row(error)

    def _hub_rows(self) -> Iterator[tuple[int, Row]]:
        features = getattr(self._loaded, "features", None)
        nulls = SchemaNulls(features.arrow_schema if features else (), self.left_out.schema_nulls)
        for index, values in enumerate(self._loaded):
            try:
                row = from_log(Row(f"{self.label}[{index}]", nulls.drop(values)))
            except RowError as error:
                self._on_bad(error)
            else:
                yield 0, row

    @cached_property
    def _loaded(self) -> Iterable[Any]:
        """The hub dataset; it is on disk, and iterating it reads a few rows at a time."""
        return self.load_from_hub()

    def digest(self) -> str:
        """sha256 of the files' names and bytes, or of the values of a hub dataset."""
        digest = hashlib.sha256(repr((self.key, self.wanted)).encode())
        if self.files is None:
            for index, values in enumerate(self._loaded):
                digest.update(json.dumps([f"{self.label}[{index}]", values], default=str).encode())
            return digest.hexdigest()
        self._stamps = self._stamps_now()
        for path, label in self.files:
            digest.update(f"\0{label}\0".encode())
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError:
                digest.update(os.urandom(16))  # the reader reports why
        return digest.hexdigest()

    def is_unchanged(self) -> bool:
        """Whether the files are those that `digest` saw."""
        return self._stamps is None or self._stamps == self._stamps_now()

    def _stamps_now(self) -> list[tuple[int, int]]:
        found = []
        for path, _ in self.files or ():
            try:
                status = path.stat()
                found.append((status.st_size, status.st_mtime_ns))
            except OSError:
                found.append((-1, -1))
        return found


def _is_local(name: str) -> bool:
    path = _path(name)
    if os.path.lexists(path):
        return True
    looks_like_a_path = (
        format_of(path) is not None
        or path.suffix.lower() in (".txt", ".md", ".gz", ".zst", ".xlsx", ".zip", ".jsonlines")
        or is_local_path(name)
    )
    if looks_like_a_path:
        raise _no_such_file(name, path)
    return False


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))  # Path.expanduser raises for an unknown user


def _printable(name: str) -> str:
    """A file name as text, with bytes that are not UTF-8 (surrogates in Python) as `\\xff`."""
    try:
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half of a surrogate pair, which no file name contains
        return name.encode(errors="backslashreplace").decode()


def _no_such_file(name: str, path: Path) -> InputError:
    folder = path.parent
    is_folder = os.path.isdir(folder)  # Path.is_dir raises if the name is too long
    try:
        present = sorted(map(_printable, os.listdir(folder))) if is_folder else []
    except OSError:
        present = []
    near = difflib.get_close_matches(path.name, present, n=3, cutoff=0.5)
    if not near and os.path.lexists(path.name):  # the config is used in another folder than it was written for
        near = [path.name]
    place = str(folder.resolve()) if is_folder else f"{folder} (which does not exist)"
    return InputError(
        f"{name}: no such file",
        seen=f"looked in {place}",
        change="did you mean " + " or ".join(near) + "?"
        if near
        else "check the path; a hub dataset is named owner/name",
    )


def _local_files(key: str, names: list[str], split: Split) -> list[tuple[Path, str]]:
    files: list[tuple[Path, str]] = []
    for name in names:
        path = _path(name)
        if not os.path.lexists(path):
            raise _no_such_file(name, path)
        files += _files_of(key, name, path, split)
    seen: dict[Path, Path] = {}
    for path, _ in files:
        first = seen.setdefault(path.resolve(), path)
        if first is not path:
            raise InputError(
                f"{key}: the same file is listed twice",
                seen=f"{first} and {path}",
                change="list each file once",
            )
    return files


def _files_of(key: str, name: str, path: Path, split: Split) -> list[tuple[Path, str]]:
    """The data files of one name, each with its label for messages."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise InputError(f"{name}: cannot be read", seen=error.strerror or str(error)) from None
    if stat.S_ISREG(mode):
        if split.name != "train":
            raise InputError(
                f"{key}_split: a file has no split called {split.name}",
                seen=split.written,
                allowed="train, or a slice such as train[:100]",
                change=f"use {split.written.replace(split.name, 'train', 1)}",
            )
        return [(path, path.name)]
    if not stat.S_ISDIR(mode):
        # a FIFO or a device would block or never end: it is refused before it is opened
        raise InputError(f"{name}: not a regular file", allowed="a file or a folder of files: " + FORMATS)
    found = sorted(p for p in path.rglob("*") if p.is_file() and format_of(p) and not _is_hidden(p.relative_to(path)))
    if not found:
        texts = sorted({p.suffix for p in path.iterdir() if p.suffix.lower() in (".txt", ".md") and p.is_file()})
        patterns = " ".join(f"{shlex.quote(name.rstrip('/'))}/*{suffix}" for suffix in texts)
        change = rows_of_texts(f"awk 'FNR == 1 {{ print \"\" }} 1' {patterns}") if texts else None
        raise InputError(f"{name}: a folder without data files", allowed=FORMATS, change=change)
    return [(p, _printable(p.relative_to(path).as_posix())) for p in _of_split(key, name, found, split)]


def _is_hidden(relative: Path) -> bool:
    """Whether a file is a dot file, or metadata of `save_to_disk` and hub snapshots."""
    return any(part.startswith(".") for part in relative.parts) or relative.name in ("dataset_info.json", "state.json")


def _of_split(key: str, name: str, found: list[Path], split: Split) -> list[Path]:
    """Files named after a split (`train.jsonl`, `test-00000.parquet`) are that split; a folder of others is `train`."""
    words = {path: set(re.split(r"[^a-z]+", f"{path.parent.name}/{path.name}".lower())) for path in found}
    named = {path for path in found if words[path] & set(SPLIT_NAMES)}
    chosen = [p for p in found if split.name.lower() in re.split(r"[^a-z0-9_]+", f"{p.parent.name}/{p.name}".lower())]
    chosen = chosen or [path for path in found if split.name.lower() in words[path]]
    if chosen:
        return chosen
    if not named and split.name == "train":
        return found
    raise InputError(
        f"{key}_split: {name} has no files of the split {split.name}",
        seen=", ".join(_printable(path.name) for path in found[:8]),
        change=f"give a file instead of the folder, or set {key}_split to a word in the file names",
    )


def _load_from_hub(
    key: str, name: str, split: Split, config_name: str | None, revision: str | None
) -> Iterable[dict[str, Any]]:
    offline_if_unreachable()
    import datasets.config  # 1 s, and only hub datasets need it
    from huggingface_hub import constants

    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE  # it may have been imported before the check above
    try:
        with watchdog.paused(), download_progress.of_single_files(name):
            loaded: Any = datasets.load_dataset(name, config_name, split=split.written, revision=revision)
    # Whatever fails inside (no such dataset, gated, offline, unknown split, broken file) is about the user's input;
    # the library raises some twenty kinds of exceptions for it.
    except Exception as error:
        reason = first_line(error)
        raise InputError(
            f"{key}: the hub dataset {name} could not be loaded",
            seen=f"split {split.written}" + (f", configuration {config_name}" if config_name else "") + f": {reason}",
            allowed="a dataset id (owner/name) that this machine can reach or has in its cache, or a local file",
            change=(f"unset HF_HUB_OFFLINE ({value} now) to download it once; " if (value := offline_switch()) else "")
            + "check name, split and dataset_config; without a network use a local file; "
            "for a gated dataset log in with `hf auth login`",
        ) from None
    return loaded
