"""Host memory that this process may use: what the system has available, or less if a cgroup leaves less.

A container, a Slurm job and a systemd service are cgroups, each may have a limit, and they nest. The kernel ends a
process when any of them is full, so all count, from the process's own up to the outermost that can be seen:

         limit                     used                     of it, cached files
    v2   memory.max, memory.high   memory.current           inactive_file in memory.stat
    v1   memory.limit_in_bytes     memory.usage_in_bytes    total_inactive_file in memory.stat

Cached files that nothing has read again count as free: the kernel drops them first. Where the hierarchies lie is read
from /proc, since a container, v1 and v2 side by side, and namespaces each mount them in a way of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from solotune.units import gib

SYSTEM = Path("/")


class Ram(NamedTuple):
    """Bytes of host memory."""

    total: int  # of the machine, or the smallest limit
    free: int
    limited_by: str | None = None  # a cgroup's file that has a limit; None: no cgroup limits it

    @property
    def limit_in_words(self) -> str:
        return f" ({self.limited_by} of a cgroup limits it)" if self.limited_by else ""

    def in_words(self) -> str:
        """`2.0 of 16.0 GiB of host memory are free (memory.max of a cgroup limits it)`."""
        return f"{gib(self.free)} of {gib(self.total)} GiB of host memory are free{self.limit_in_words}"


class _Hierarchy(NamedTuple):
    """Names of a version of cgroups."""

    limits: tuple[str, ...]
    used: str
    cached: str


V1 = _Hierarchy(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
V2 = _Hierarchy(("memory.max", "memory.high"), "memory.current", "inactive_file")


def ram(system: Path = SYSTEM) -> Ram:
    """Total and free host memory.

    Args:
        system: the folder that has `proc` and what is mounted; the root, but for tests.
    """
    kib = _table(system / "proc/meminfo")
    if "MemTotal:" not in kib:  # not Linux
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Ram(total, total)
    total, free = kib["MemTotal:"] << 10, kib["MemAvailable:"] << 10
    limits = [limit for limit in _limits(system) if limit.total < total]
    least = min(limits, key=lambda limit: limit.free, default=Ram(total, free))
    return Ram(min([total, *(limit.total for limit in limits)]), min(free, least.free), least.limited_by)


def _limits(system: Path) -> Iterator[Ram]:
    """The limits of this process's cgroup and of all above it."""
    for names, folder in _cgroups(system):
        used = _number(folder / names.used)
        for name in names.limits:
            if (limit := _number(folder / name)) is not None and used is not None:
                cached = _table(folder / "memory.stat").get(names.cached, 0)
                yield Ram(limit, min(limit, max(0, limit - used + cached)), name)


def _cgroups(system: Path) -> Iterator[tuple[_Hierarchy, Path]]:
    """The folder of this process's cgroup in each hierarchy with memory, and the folders above it."""
    own: dict[_Hierarchy, str] = {}  # the path of the cgroup
    for line in _text(system / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            own[V1] = path
        elif number == "0":
            own[V2] = path
    for line in _text(system / "proc/self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        fields, kinds = mount.split(), kind.split()
        is_v1 = kinds[:1] == ["cgroup"] and "memory" in kinds[-1].split(",")
        version = V1 if is_v1 else V2 if kinds[:1] == ["cgroup2"] else None
        if version is None or version not in own or len(fields) < 5:
            continue
        # a container may see its own cgroup as the root of the mount, under a path of the host
        path, top = PurePosixPath(own[version]), system / fields[4].lstrip("/")
        inside = path.relative_to(fields[3]) if path.is_relative_to(fields[3]) else PurePosixPath()
        folder = top / inside if ".." not in inside.parts else top
        yield from ((version, one) for one in (folder, *folder.parents) if one.is_relative_to(top))


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
