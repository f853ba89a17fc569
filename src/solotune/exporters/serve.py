"""OpenAI's API on an exported model, by a server that exists: `transformers serve`, or llama.cpp's.

    choice = choose_engine(None, ggufs)                   which of the two, and why
    with Server(engine, model, "127.0.0.1", 8000) as server:
        server.url                                        http://127.0.0.1:8000/v1
        server.wait()                                     until it ends, or Ctrl-C

Neither server is this process: it runs in a child of its own session, which gets no Ctrl-C from the terminal and ends
with this process, however that ends. Template and stop tokens are those of the exported files, which were compared with
the training. There is no key and no encryption, so the default address is loopback.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from solotune.config.run_config import Choice
from solotune.errors import InputError
from solotune.exporters import serve_process
from solotune.exporters.tools import ENGINE

ENGINES = ("transformers", "llama.cpp")
PACKAGES = ("openai", "fastapi", "uvicorn")  # what `transformers serve` imports: the extra `serve`
LOOPBACK = ("127.0.0.1", "localhost", "::1")
START_SECONDS = 600
STOP_SECONDS = 10
_PREFERRED = ("f16", "bf16", "q8_0", "f32")  # of several GGUF files


def missing_packages() -> list[str]:
    """What of the extra `serve` is not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def choose_engine(wanted: str | None, ggufs: Sequence[Path]) -> Choice:
    """The server to run, and why.

    Args:
        wanted: `--engine`; None: what is installed.
        ggufs: GGUF files that the run has been exported to.

    Raises:
        InputError: no such engine, or what it needs is not installed.
    """
    missing = missing_packages()
    if wanted is not None and wanted not in ENGINES:
        raise InputError(f"--engine: {wanted} is not known", allowed=", ".join(ENGINES))
    if wanted == "llama.cpp" or (wanted is None and missing and ggufs):
        why = "--engine" if wanted else f"{', '.join(missing)} not installed, and there is a GGUF file"
        return Choice("engine", "llama.cpp", why)
    if missing:
        raise InputError(
            "`transformers serve` needs packages that are not installed",
            seen=f"missing: {', '.join(missing)}",
            change="pip install 'solotune[serve]', or use --engine llama.cpp",
        )
    return Choice("engine", "transformers", "--engine" if wanted else f"{', '.join(PACKAGES)} are installed")


def best_gguf(ggufs: Sequence[Path]) -> Path:
    """The file to serve: of 16 bits if there is one."""
    ranked = {f"model-{name}.gguf": place for place, name in enumerate(_PREFERRED)}
    return min(ggufs, key=lambda path: (ranked.get(path.name, len(ranked)), path.name))


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
        InputError: the port is taken or not allowed, or the address is none of this machine.
    """
    try:
        ((family, kind, _, _, address), *_) = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as held:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(address)
            return held.getsockname()[1]
    except OSError as error:
        is_taken = error.errno == errno.EADDRINUSE
        raise InputError(
            f"--port {port}: {'another program is using it' if is_taken else f'cannot be used on {host}'}",
            seen=error.strerror or str(error),
            allowed="a free port of this machine",
            change=f"use another one, such as --port {port + 1 if 1024 <= port < 65535 else 8001}, or 0 for any",
        ) from None


class Server:
    """A running server; use it in a `with` block."""

    def __init__(self, engine: str, model: Path, host: str, port: int, prompt_format: str = "chat") -> None:
        """Args:
        model: the merged folder, or the GGUF file.
        prompt_format: `text` for a model that continues texts: `transformers serve` then refuses chats.
        """
        self.engine, self.model, self.host, self.port = engine, model, host, port
        self.prompt_format = prompt_format
        self._child: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115

    @property
    def name(self) -> str:
        """What requests give as `model`."""
        return self.model.name

    @property
    def url(self) -> str:
        """The base URL of OpenAI's API."""
        return f"{self._address}/v1"

    @property
    def _address(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def __enter__(self) -> Server:
        return self.start()

    def start(self) -> Server:
        """Start the server, and wait until it answers.

        Raises:
            InputError: it ended, or does not answer.
        """
        paths = [str(ENGINE.folder())] if self.engine == "llama.cpp" else []
        before = os.environ.get("PYTHONPATH")
        self._child = subprocess.Popen(
            [sys.executable, "-P", serve_process.__file__],
            cwd=self.model.parent,  # so that the model's name is no path of this machine
            stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [before])])},
        )  # fmt: skip
        request = {"engine": self.engine, "model": self.name, "host": self.host, "port": self.port}
        request["prompt_format"] = self.prompt_format
        try:
            assert self._child.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._child.stdin.write(json.dumps(request).encode() + b"\n")
                self._child.stdin.flush()
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self) -> None:
        """Raises:
        InputError: it ended, or does not answer.
        """
        assert self._child is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._child.poll() is not None:
                raise InputError(
                    f"{self.model}: {self.engine} could not serve it", seen=self._last_words() or "it ended at once"
                )
            if self._answers():
                return
            time.sleep(0.2)
        late = f"{self.engine} does not answer after {START_SECONDS} s"
        raise InputError(f"{self.model}: {late}", seen=self._last_words())

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._address}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:  # it does not listen yet, or is still loading
            return False

    def wait(self) -> None:
        """Wait until the server ends.

        Raises:
            InputError: it ended by itself.
            KeyboardInterrupt: Ctrl-C.
        """
        assert self._child is not None
        self._child.wait()
        raise InputError(f"{self.model}: {self.engine} has ended", seen=self._last_words())

    def stop(self) -> None:
        """End the server."""
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(OSError):
            if child.stdin is not None:
                child.stdin.close()  # it ends when this pipe does
        try:
            child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else ""
