"""A power cut, replayed: what may be on the disk after it, by POSIX's letter.

Of a file only what its last fsync covered is sure; of a folder only the names that its last fsync covered. All since
then may be there or not, in any combination, and a write may be there in part or as zeros. Real file systems promise
more (ext4 keeps the order of names); a run that survives this survives them.

    files    content that is durable, and writes and truncations since
    folders  names that are durable, and creations, renames and removals since

For each moment of a recorded run four states are built: nothing of what was not synced, all of it, and twice a random
part of it.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from bench.faults_run import Operation

Moments = Iterator[tuple[int, str]]  # (operations done, which of STATES)
STATES = ("nothing", "all", "some", "some others")


@dataclass
class File:
    durable: bytes = b""
    now: bytes = b""
    pending: list[tuple[str, int, bytes]] = field(default_factory=list)  # (write, offset, bytes) or (cut, length, -)

    def write(self, content: bytes) -> None:
        self.pending.append(("write", len(self.now), content))
        self.now += content

    def cut(self, length: int) -> None:
        self.pending.append(("cut", length, b""))
        self.now = self.now[:length].ljust(length, b"\0")

    def sync(self) -> None:
        self.durable, self.pending = self.now, []

    def after(self, pick: Callable[[], str]) -> bytes:
        """Its bytes after the cut; `pick` says what became of each thing that was not synced."""
        content = self.durable
        for kind, place, written in self.pending:
            fate = pick()
            if fate == "lost":
                continue
            if kind == "cut":
                content = content[:place].ljust(place, b"\0")
                continue
            part = {"whole": written, "torn": written[: len(written) // 2], "zeros": bytes(len(written))}[fate]
            content = content.ljust(place, b"\0")
            content = content[:place] + part + content[place + len(part) :]
        return content


@dataclass
class Folder:
    durable: dict[str, File | Folder] = field(default_factory=dict)
    now: dict[str, File | Folder] = field(default_factory=dict)
    pending: list[tuple[str, str | None, File | Folder]] = field(default_factory=list)  # (old name, new name, what)

    def change(self, old: str, new: str | None, what: File | Folder) -> None:
        """A creation (old is new), a rename, or a removal (new is None)."""
        self.pending.append((old, new, what))
        _apply(self.now, old, new, what)

    def sync(self) -> None:
        self.durable, self.pending = dict(self.now), []

    def after(self, pick: Callable[[], str]) -> dict[str, File | Folder]:
        names = dict(self.durable)
        for change in self.pending:
            if pick() != "lost":
                _apply(names, *change)
        return names


def _apply(names: dict[str, File | Folder], old: str, new: str | None, what: File | Folder) -> None:
    if names.get(old) is what:
        del names[old]
    if new is not None:
        names[new] = what


class Disk:
    """What a sequence of operations does to the folder above a run."""

    def __init__(self) -> None:
        self.root = Folder()

    @classmethod
    def of(cls, folder: Path, name: str) -> Disk:
        """One on which `folder`/`name` lies, all of it durable."""
        disk = cls()
        if (folder / name).exists():
            disk.root.durable[name] = _read(folder / name)
            disk.root.now = dict(disk.root.durable)
        return disk

    def _folder(self, path: str) -> Folder:
        found: File | Folder = self.root
        for name in PurePosixPath(path).parts:
            assert isinstance(found, Folder)
            found = found.now[name]
        assert isinstance(found, Folder)
        return found

    def do(self, operation: Operation) -> None:
        """Goes on by one operation."""
        kind, path, content = operation
        if kind == "sync_folder":
            self._folder(path).sync()
            return
        if kind == "lock":
            return
        parent, name = self._folder(os.path.dirname(path)), os.path.basename(path)
        what = parent.now.get(name)
        if kind == "mkdir":
            parent.change(name, name, Folder())
        elif kind == "open":
            if what is None:
                parent.change(name, name, File())
        elif kind == "rename":
            assert what is not None
            parent.change(name, os.path.basename(os.fsdecode(content)), what)
        elif kind in ("unlink", "rmdir"):
            if what is not None:
                parent.change(name, None, what)
        elif isinstance(what, File):
            {"write": lambda: what.write(content), "truncate": lambda: what.cut(int(content)), "fsync": what.sync}[
                kind
            ]()
        else:
            raise ValueError(f"{kind} {path}: no such file")

    def write_after(self, pick: Callable[[], str], folder: Path, name: str) -> None:
        """Makes `folder`/`name` what it is after the power cut."""
        shutil.rmtree(folder / name, ignore_errors=True)
        there = self.root.after(pick).get(name)
        if there is not None:
            _write(there, pick, folder / name)


def _read(path: Path) -> File | Folder:
    if path.is_file():
        return File(path.read_bytes(), path.read_bytes())
    names = {inner.name: _read(inner) for inner in path.iterdir()}
    return Folder(names, dict(names))


def _write(what: File | Folder, pick: Callable[[], str], path: Path) -> None:
    if isinstance(what, File):
        path.write_bytes(what.after(pick))
        return
    path.mkdir()
    for name, inner in what.after(pick).items():
        _write(inner, pick, path / name)


def states(operations: Sequence[Operation], disk: Disk, folder: Path, name: str, seed: int, every: int = 1) -> Moments:
    """Makes `folder`/`name` each state that a power cut may leave; (operations done, which state)."""
    for done in range(len(operations) + 1):
        if done % every == 0 or done == len(operations):
            yield from states_now(done, disk, folder, name, seed)
        if done < len(operations):
            disk.do(operations[done])


def states_now(done: int, disk: Disk, folder: Path, name: str, seed: int) -> Moments:
    """The states of one moment."""
    for which in STATES:
        rng = random.Random(f"{seed} {done} {which}")
        fates = {"nothing": ["lost"], "all": ["whole"]}.get(which, ["lost", "lost", "whole", "whole", "torn", "zeros"])
        disk.write_after(lambda rng=rng, fates=fates: rng.choice(fates), folder, name)
        yield done, which
