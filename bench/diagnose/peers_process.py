"""A peer's own commands in its own environment: one process that has its modules loaded, and a fork for each command.

    environment = Environment("peft-doctor", folder)       the folder of its virtual environment
    output = environment.run(["peft-doctor", "generation-check", "model", "-o", "json"], cwd, limit=60)
    environment.close()

The limit is of processor time, and ten times as much by the clock. Each command goes through the package's own entry
point with the arguments that a shell would give it; loading transformers once instead of once a command is all that is
saved.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = """
import importlib, json, os, resource, signal, sys, time, traceback
for name in sys.argv[1:]:
    module, _, attributes = name.partition(":")
    try:
        loaded = importlib.import_module(module)
        [getattr(loaded, attribute) for attribute in attributes.split(",") if attribute]
    except ImportError:
        pass
from importlib.metadata import entry_points
scripts = {one.name: one for one in entry_points(group="console_scripts")}
print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            seconds = max(1, round(asked["limit"]))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            os.chdir(asked["cwd"])
            os.environ.update(asked["environment"])
            into = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(into, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = asked["words"]
            if sys.argv[0] == "python":
                exec(compile(sys.argv[1], "<command>", "exec"), {"__name__": "__main__"})
                code = 0
            else:
                code = scripts[sys.argv[0]].load()() or 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    ends, status = time.monotonic() + 10 * asked["limit"], None
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        status = None
    print(json.dumps({"code": None if status is None else os.waitstatus_to_exitcode(status)}), flush=True)
"""


@dataclass(frozen=True)
class Output:
    """What a command printed, both streams, and its exit code; None (or a signal's) where the time ran out."""

    code: int | None
    text: str


class Environment:
    """A virtual environment with a process in it."""

    def __init__(self, folder: Path, preload: tuple[str, ...] = ()) -> None:
        self._process = subprocess.Popen(
            [folder / "bin" / "python", "-c", SERVER, *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": "", "COLUMNS": "4000", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"},
        )
        self._is_ready = False

    def run(self, words: list[str], cwd: Path, limit: float, environment: dict[str, str] | None = None) -> Output:
        assert self._process.stdin is not None
        if not self._is_ready:  # several of them load at a time
            self._answer()
            self._is_ready = True
        with tempfile.NamedTemporaryFile(suffix=".txt") as file:
            asked = {"words": words, "cwd": str(cwd), "limit": limit, "output": file.name,
                     "environment": environment or {}}  # fmt: skip
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            code = json.loads(self._answer())["code"]
            return Output(code, Path(file.name).read_text(encoding="utf-8", errors="replace"))

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the peer's environment ended; make it again with --install")
        return line

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def install(folder: Path, packages: list[str], shares_training_stack: bool) -> None:
    """A virtual environment with these packages; torch, transformers and PEFT are this interpreter's where needed."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "-q", *packages], check=True)
    if shares_training_stack:
        site = next((folder / "lib").glob("python3.*")) / "site-packages"
        here = Path(json.__file__).parents[1] / "site-packages"
        shared: Any = [path for path in sys.path if path.endswith("site-packages")] or [here]
        (site / "shared.pth").write_text("".join(f"{path}\n" for path in shared))


def installed_version(folder: Path, package: str) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([folder / "bin" / "python", "-c", code], check=True, capture_output=True,
                          text=True).stdout.strip()  # fmt: skip
