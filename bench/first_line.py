"""Seconds until each command shows its first line, with files in the page cache (warm) and read from the disk (cold).

    python -m bench.first_line [--repeats 3] [--python FILE]

Before a cold start, the pages of all files of Python, its packages and solotune are evicted (`posix_fadvise`); how many
are left is measured by `mincore`. Pages that another process has mapped stay: use an environment that nothing else runs
in (`--python`). Where /proc/sys/vm/drop_caches can be written, directory entries and inodes are dropped too. The disk
of a virtual machine may still be in the memory of its host.

A command is stopped at its first byte on stdout or stderr. CPU seconds are those of its process until then: on a
machine with much else to do, wall seconds are more. Writes `first_line.md`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine import RESULTS

SOURCE = Path(__file__).parents[1] / "src"
COMMANDS = (
    "--help", "doctor", "plan run.yaml", "data run.yaml", "train run.yaml output_dir=other", "chat run",
    "diagnose run", "init model chats.jsonl -o new.yaml --force", "runs --root .",
)  # fmt: skip
FOLDERS = """import sys, sysconfig
print(sys.executable, sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sep="|")"""
BARS = {"warm": 1.0, "cold": 3.0}
LIBC = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
DENTRIES_AND_INODES = "2"


@dataclass(frozen=True)
class Started:
    """A command up to its first byte."""

    seconds: float
    cpu_seconds: float
    text: str


def files_of(python: str) -> list[Path]:
    """The interpreter, its standard library, its packages, and solotune's source."""
    done = subprocess.run([python, "-c", FOLDERS], capture_output=True, text=True, check=True)
    executable, library, packages = map(Path, done.stdout.strip().split("|"))
    found = {executable.resolve()}
    for folder in (library, packages, SOURCE):
        files = (path for path in folder.rglob("*") if path.is_file())
        # the packages of the interpreter itself are not on the path of a virtual environment
        found |= {path.resolve() for path in files if folder == packages or "site-packages" not in path.parts}
    return sorted(found)


def evict(files: Sequence[Path]) -> float:
    """Drop the files from the page cache; returns which share of the pages of Python modules is still there.

    Native libraries of packages are not counted: no command loads one before its first line.
    """
    os.sync()  # only clean pages can be dropped
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    counts = [resident_pages(path) for path in files if path.suffix in (".py", ".pyc")]
    if os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text(DENTRIES_AND_INODES)
    return sum(resident for resident, _ in counts) / max(1, sum(total for _, total in counts))


def resident_pages(path: Path) -> tuple[int, int]:
    """How many pages of a file are in the page cache, and how many it has."""
    size = path.stat().st_size
    if size == 0:
        return 0, 0
    total = -(-size // PAGE)
    pages = (ctypes.c_ubyte * total)()
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        failed = LIBC.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
        del first  # or the mapping cannot be closed
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {path}")
    return sum(page & 1 for page in pages), total


def start(python: str, words: Sequence[str], folder: Path) -> Started:
    """Run `solotune WORDS` up to its first byte."""
    began = time.monotonic()
    with subprocess.Popen(
        [python, "-m", "solotune", *words], cwd=folder, env=_environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, bufsize=0,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        text = process.stdout.read(4096)
        seconds = time.monotonic() - began
        used = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        process.kill()
    user, system = map(int, used[11:13])
    shown = (text.decode(errors="replace").strip().splitlines() or [""])[0]
    return Started(seconds, (user + system) / os.sysconf("SC_CLK_TCK"), shown)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), "HF_HUB_OFFLINE": "1"}


def make_folder(python: str, folder: Path) -> None:
    """A tiny model, rows, a config and a finished run of it."""
    import transformers

    from tests.tiny import FAMILIES, chat_rows, save_tokenizer

    shape = FAMILIES["llama"]()
    shape.max_position_embeddings = 512
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(60)))
    for words in (
        ["init", "model", "chats.jsonl", "-o", "run.yaml", "use_cpu=true"],
        ["train", "run.yaml", "max_steps=1", "output_dir=run"],
    ):
        command = [python, "-m", "solotune", *words]
        subprocess.run(command, cwd=folder, env=_environment(), check=True, capture_output=True)


def table(found: dict[tuple[str, str], list[Started]]) -> Iterator[str]:
    """One line for each command: medians, and what it shows."""
    yield "| command | " + " | ".join(f"{kind} s | {kind} CPU s" for kind in BARS) + " | first line |"
    yield "|---|" + "--:|" * 2 * len(BARS) + "---|"
    for command in COMMANDS:
        cells = []
        for kind in BARS:
            runs = found[kind, command]
            cells.append(f"{statistics.median(one.seconds for one in runs):.2f}")
            cells.append(f"{statistics.median(one.cpu_seconds for one in runs):.2f}")
        yield f"| `{command.split()[0]}` | " + " | ".join(cells) + f" | {found['warm', command][0].text} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--python", default=sys.executable, help="the Python that runs solotune")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    files = files_of(args.python)
    print(f"{len(files):,} files, {sum(path.stat().st_size for path in files) / 2**30:.1f} GiB", flush=True)
    found: dict[tuple[str, str], list[Started]] = {(kind, command): [] for kind in BARS for command in COMMANDS}
    kept = []
    with tempfile.TemporaryDirectory(prefix="solotune-first-line-") as folder:
        # in a child, so that this process maps no file of the packages
        if (child := os.fork()) == 0:
            code = 1
            try:
                make_folder(args.python, Path(folder))
                code = 0
            finally:
                os._exit(code)
        if os.waitpid(child, 0)[1]:
            return 1
        for command in COMMANDS:
            for _ in range(args.repeats):
                kept.append(evict(files))
                found["cold", command].append(start(args.python, command.split(), Path(folder)))
            for _ in range(args.repeats):
                found["warm", command].append(start(args.python, command.split(), Path(folder)))
            for kind in BARS:
                shown = ", ".join(f"{one.seconds:.2f} ({one.cpu_seconds:.2f})" for one in found[kind, command])
                print(f"{command.split()[0]:9} {kind}: {shown}", flush=True)
    late = [key for key, runs in found.items() if statistics.median(one.seconds for one in runs) > BARS[key[0]]]
    how = "with" if os.access(DROP_CACHES, os.W_OK) else "without"
    lines = [
        "# Seconds to the first line",
        "",
        f"`python -m bench.first_line`, medians of {args.repeats}. Before a cold start {len(files):,} files are "
        f"evicted from the page cache ({how} directory entries and inodes); at most {max(kept):.2%} of the pages of "
        "Python modules stayed. Other processes on the machine add to the wall seconds, not to the CPU seconds.",
        "",
        *table(found),
    ]
    (args.out / "first_line.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines) + f"\n{len(late)} over the bar (1 s warm, 3 s cold) {late or ''}")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
