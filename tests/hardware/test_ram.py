"""Free host memory with the limits of cgroups, read from trees of files as systems mount them."""

from __future__ import annotations

from pathlib import Path

import pytest

from solotune.hardware.ram import Ram, ram

GIB, MIB = 1 << 30, 1 << 20
MEMINFO = "MemTotal: 67108864 kB\nMemFree: 1 kB\nMemAvailable: 52428800 kB\nHugePages_Total: 0\n"  # 64, 50 GiB
V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "31 23 0:29 / /sys/fs/cgroup/memory rw shared:7 - cgroup cgroup rw,memory\n"
NO_LIMIT = "9223372036854771712"


@pytest.fixture
def system(tmp_path):
    """system(mounts, own, **groups) writes a tree; a group's value is (limit, used, cached) bytes."""

    def make(mounts: str, own: str, groups: dict[str, tuple[object, int, int]]) -> Path:
        files = {"proc/meminfo": MEMINFO, "proc/self/cgroup": own, "proc/self/mountinfo": mounts}
        for name, (limit, used, cached) in groups.items():
            if name.startswith("memory"):  # v1; its `inactive_file` is of the group alone, without those in it
                files[f"sys/fs/cgroup/{name}/memory.limit_in_bytes"] = f"{limit}\n"
                files[f"sys/fs/cgroup/{name}/memory.usage_in_bytes"] = f"{used}\n"
                files[f"sys/fs/cgroup/{name}/memory.stat"] = f"cache 9\ninactive_file 7\ntotal_inactive_file {cached}\n"
            else:
                files[f"sys/fs/cgroup/{name}/memory.max"] = f"{limit}\n"
                files[f"sys/fs/cgroup/{name}/memory.current"] = f"{used}\n"
                files[f"sys/fs/cgroup/{name}/memory.stat"] = f"anon 5\ninactive_file {cached}\n"
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


SLURM = "0::/system.slice/slurmstepd.scope/job_7/step_0\n"
JOB = "system.slice/slurmstepd.scope/job_7"


@pytest.mark.parametrize(
    ("mounts", "own", "groups", "expected"),
    [
        pytest.param(V2, "0::/user.slice\n", {"user.slice": ("max", 9 * GIB, 0)}, Ram(64 * GIB, 50 * GIB), id="none"),
        pytest.param(V1, "4:memory:/a\n", {"memory/a": (NO_LIMIT, GIB, 0)}, Ram(64 * GIB, 50 * GIB), id="none in v1"),
        pytest.param(
            V2, "0::/\n", {"": (8 * GIB, 3 * GIB, GIB), "..": (GIB, 0, 0)}, Ram(8 * GIB, 6 * GIB, "memory.max"),
            id="docker v2, and a file that is no cgroup's",
        ),
        pytest.param(
            V2, SLURM, {JOB: (32 * GIB, 4 * GIB, 0), f"{JOB}/step_0": ("max", 3 * GIB, 0)},
            Ram(32 * GIB, 28 * GIB, "memory.max"), id="the limit of the job above the step",
        ),
        pytest.param(
            V2, SLURM, {JOB: (32 * GIB, 30 * GIB, 0), f"{JOB}/step_0": (16 * GIB, 3 * GIB, 0)},
            Ram(16 * GIB, 2 * GIB, "memory.max"), id="steps beside this one have used the job's memory",
        ),
        pytest.param(
            V2, SLURM, {JOB: (32 * GIB, 4 * GIB, 0), "system.slice": (1 * GIB, 2 * GIB, 0)},
            Ram(1 * GIB, 0, "memory.max"), id="over the limit at the top",
        ),
        pytest.param(
            V2, SLURM, {f"{JOB}_of_others": (1 * GIB, 0, 0)}, Ram(64 * GIB, 50 * GIB), id="another's limit"
        ),
        pytest.param(
            V2, SLURM, {JOB: (60 * GIB, GIB, 0)}, Ram(60 * GIB, 50 * GIB, "memory.max"), id="the machine has less free"
        ),
        pytest.param(
            V1, "4:memory:/a/b\n0::/\n",
            {"memory": (NO_LIMIT, 20 * GIB, 0), "memory/a": (8 * GIB, 3 * GIB, GIB), "memory/a/b": (NO_LIMIT, GIB, 0)},
            Ram(8 * GIB, 6 * GIB, "memory.limit_in_bytes"), id="nested v1",
        ),
        pytest.param(
            V1.replace(" / ", " /docker/abc "), "4:cpu,memory:/docker/abc/job\n",
            {"memory": (8 * GIB, 3 * GIB, 0), "memory/job": (4 * GIB, GIB, 0)},
            Ram(4 * GIB, 3 * GIB, "memory.limit_in_bytes"), id="docker v1: its cgroup is the root of the mount",
        ),
        pytest.param(
            V2.replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified ") + V1, "4:memory:/a\n0::/b\n",
            {"memory/a": (8 * GIB, GIB, 2 * GIB)}, Ram(8 * GIB, 8 * GIB, "memory.limit_in_bytes"), id="v1 beside v2",
        ),
        pytest.param(
            V2, "0::/../../other\n", {"": (8 * GIB, 3 * GIB, 0), "../../other": (GIB, 0, 0)},
            Ram(8 * GIB, 5 * GIB, "memory.max"), id="outside of the namespace",
        ),
        pytest.param("", "", {"": (8 * GIB, 3 * GIB, 0)}, Ram(64 * GIB, 50 * GIB), id="no cgroups"),
        pytest.param("? - \n\n3 2 0:1 / /a rw - cgroup\n", "?\n\n", {}, Ram(64 * GIB, 50 * GIB), id="lines of another form"),
    ],
)  # fmt: skip
def test_the_least_that_a_cgroup_up_to_the_root_leaves(mounts, own, groups, expected, system):
    assert ram(system(mounts, own, groups)) == expected


def test_what_only_slows_a_process_down_counts_too(system):
    root = system(V2, "0::/a\n", {"a": (8 * GIB, 3 * GIB, 0)})
    (root / "sys/fs/cgroup/a/memory.high").write_text(str(6 * GIB))
    assert ram(root) == Ram(6 * GIB, 3 * GIB, "memory.high")


def test_a_limit_is_named_in_words():
    assert Ram(16 * GIB, 2 * GIB).in_words() == "2.0 of 16.0 GiB of host memory are free"
    assert Ram(16 * GIB, 2 * GIB, "memory.max").in_words().endswith(" are free (memory.max of a cgroup limits it)")


def test_this_machine():
    found = ram()
    assert 0 < found.free <= found.total
