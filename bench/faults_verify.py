"""Random damage to a finished run, which `solotune verify` has to find and name; clean copies, which it must not."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from solotune.run.run_dir import LOCK
from solotune.training.verify_run import verify

Undo = Callable[[], object]


def flip(rng: random.Random, file: Path) -> Undo:
    """One bit."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return _replace(file, bytes(content))


def truncate(rng: random.Random, file: Path) -> Undo:
    """To any shorter length."""
    content = file.read_bytes()
    return _replace(file, content[: rng.randrange(len(content))])


def zero(rng: random.Random, file: Path) -> Undo:
    """A stretch of zeros."""
    content = bytearray(file.read_bytes())
    begin = rng.randrange(len(content))
    end = rng.randrange(begin, len(content)) + 1
    content[begin:end] = bytes(end - begin)
    return _replace(file, bytes(content))


def lengthen(rng: random.Random, file: Path) -> Undo:
    """A few bytes more."""
    return _replace(file, file.read_bytes() + rng.randbytes(rng.randrange(1, 64)))


def swap(rng: random.Random, file: Path) -> Undo:
    """The contents of two files."""
    others = [other for other in _files(_run_of(file)) if other != file]
    other = rng.choice(others)
    mine, theirs = file.read_bytes(), other.read_bytes()
    undo, redo = _replace(file, theirs), _replace(other, mine)
    return lambda: (undo(), redo())


def delete(rng: random.Random, file: Path) -> Undo:
    """A file."""
    content = file.read_bytes()
    file.unlink()
    return lambda: file.write_bytes(content)


def add(rng: random.Random, file: Path) -> Undo:
    """A file, an empty folder, or a link, anywhere."""
    path = file.with_name(f"{rng.choice(['', '.', 'step-'])}{rng.randrange(10**9)}{rng.choice(['', '.json', '.py'])}")
    kind = rng.choice(("file", "folder", "link"))
    if kind == "file":
        path.write_bytes(rng.randbytes(rng.randrange(64)))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(file.name)
    return path.rmdir if kind == "folder" else path.unlink


def rename(rng: random.Random, file: Path) -> Undo:
    """A file, or the folder that it is in."""
    what = file if file.parent == _run_of(file) or rng.random() < 0.7 else file.parent
    name = what.with_name(rng.choice([f"{what.name}{rng.randrange(10)}", f".{what.name}", what.name.swapcase()]))
    if name.exists():
        name = what.with_name(f"{what.name}-")
    what.rename(name)
    return lambda: name.rename(what)


KINDS = (flip, truncate, zero, lengthen, swap, delete, add, rename)


def mutations(run: Path, count: int, seed: int) -> Iterator[tuple[str, str | None]]:
    """(what was done, what went wrong) for each random change; one that changes nothing is drawn again."""
    rng = random.Random(seed)
    files = _files(run)
    clean = _content(run)
    done = 0
    while done < count:
        kind, file = rng.choice(KINDS), rng.choice(files)
        if kind in (flip, truncate, zero) and not file.stat().st_size:
            continue
        if kind is lengthen and file.name == "log.txt":
            continue  # which may grow
        undo = kind(rng, file)
        changed = {name for name, _ in _content(run) ^ clean}
        if changed:
            done += 1
            yield f"{kind.__name__} {file.relative_to(run)}", _missed(run, changed)
        undo()
    assert _content(run) == clean, "a change was not undone"


def _missed(run: Path, changed: set[str]) -> str | None:
    """What `verify` has to answer for; None where it names a file that was changed."""
    try:
        named = {problem.file for problem in verify(run).problems}
    except Exception as error:
        return f"it crashed: {type(error).__name__}: {error}"
    if not named:
        return "not found"
    seen = any(name == other or other.startswith(f"{name}/") for name in named for other in changed)
    return None if seen else f"another file is named: {sorted(named)}"


def clean_copies(run: Path, count: int, place: Path) -> Iterator[tuple[str, str | None]]:
    """(which, what went wrong) for whole copies of a run, in another place, of other times and modes."""
    rng = random.Random(count)
    for number in range(count):
        copy = place / f"copy-{number}"
        shutil.copytree(run, copy)
        for path in copy.rglob("*"):
            os.utime(path, (rng.randrange(10**9), rng.randrange(10**9)))
            if path.is_file():
                path.chmod(rng.choice((0o600, 0o640, 0o644)))
        found = verify(copy)
        yield f"copy {number}", None if found.ok else str(found.problems)
        shutil.rmtree(copy)


def _run_of(file: Path) -> Path:
    return next(folder for folder in file.parents if (folder / "metrics.jsonl").exists())


def _files(run: Path) -> list[Path]:
    return sorted(path for path in run.rglob("*") if path.is_file() and path.name != LOCK)


def _content(run: Path) -> set[tuple[str, bytes]]:
    return {
        (path.relative_to(run).as_posix(), path.read_bytes() if path.is_file() and not path.is_symlink() else b"")
        for path in run.rglob("*")
    }


def _replace(file: Path, content: bytes) -> Undo:
    before = file.read_bytes()
    file.write_bytes(content)
    return lambda: file.write_bytes(before)
