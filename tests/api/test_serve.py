"""`solotune serve` up to its server: exports what is missing, and refuses early."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

import solotune
from solotune.api import serve as api
from solotune.cli.commands import solotune as command
from solotune.errors import CheckError, InputError, IntegrityError
from solotune.exporters import serve as exporters
from solotune.run.atomic_io import whole_folder


class Server(exporters.Server):
    """A server that starts nothing."""

    def start(self) -> Server:
        return self

    def wait(self) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A run, as `TunedRun.open` gives it, on a machine with the extra `serve`."""
    tuned = SimpleNamespace(
        directory=SimpleNamespace(path=tmp_path / "run"), prompt_format="chat", shared_system_prompt="Be exact."
    )
    monkeypatch.setattr("solotune.training.trained_run.TunedRun.open", lambda run: tuned)
    monkeypatch.setattr(exporters, "missing_packages", list)
    monkeypatch.setattr(exporters, "Server", Server)
    return tuned


def export_of(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, problems: list[str]) -> list[tuple[Any, ...]]:
    called: list[tuple[Any, ...]] = []

    def export(path: Path, kind: str, display: object) -> SimpleNamespace:
        called.append((path, kind))
        with whole_folder(path / "export" / kind) as folder:
            folder.write("config.json", "{}")
        return SimpleNamespace(artifacts=[SimpleNamespace(problems=problems)])

    monkeypatch.setattr("solotune.api.export.export", export)
    return called


def test_what_is_missing_is_exported_once(run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    called = export_of(run, monkeypatch, [])
    for _ in range(2):
        with solotune.serve("run", port=0) as serving:
            assert serving.server.model == run.directory.path / "export" / "merged"
            assert (serving.server.engine, serving.notes) == ("transformers", [])
    assert called == [(run.directory.path, "merged")]
    (run.directory.path / "export" / "merged" / "config.json").write_text("{ }")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        solotune.serve("run", port=0)


def test_an_export_that_differs_from_the_training_is_not_served(run, monkeypatch) -> None:
    export_of(run, monkeypatch, ["mean KL 0.5"])
    with pytest.raises(CheckError, match="not the model that was trained"):
        solotune.serve("run", port=0)


def test_the_request_to_try_asks_as_in_training(run, monkeypatch) -> None:
    export_of(run, monkeypatch, [])
    words = shlex.split(solotune.serve("run", port=0).curl)
    assert words[1].endswith("/v1/chat/completions")
    said = json.loads(words[-1])
    assert said["model"] == "merged"
    assert [m["role"] for m in said["messages"]] == ["system", "user"] and said["messages"][0]["content"] == "Be exact."
    run.prompt_format = "text"
    serving = solotune.serve("run", port=0, host="0.0.0.0")
    assert serving.server.prompt_format == "text"
    words = shlex.split(serving.curl)
    assert words[1].endswith("/v1/completions") and "messages" not in json.loads(words[-1])
    assert serving.notes == [
        "trained on plain text: ask it at /v1/completions; chats are refused, since no chat template was trained",
        "every machine that reaches 0.0.0.0 can use it: there is no key",
    ]


def test_the_command_prints_url_and_request_and_ends_with_ctrl_c(run, monkeypatch) -> None:
    export_of(run, monkeypatch, [])
    done = CliRunner().invoke(command, ["serve", "run", "--port", "0"])
    assert done.exit_code == 0, done.output
    assert "merged is not exported yet" in done.output and "because openai" in done.output
    assert "base URL  http://127.0.0.1:" in done.output and "try       curl http://127.0.0.1:" in done.output
    assert done.output.rstrip().endswith("Stopped.")


def test_a_taken_port_is_refused_before_anything_else(run, monkeypatch) -> None:
    called = export_of(run, monkeypatch, [])
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: another program is using it") as refused:
            solotune.serve("run", port=port)
    assert str(port + 1) in str(refused.value.change) and InputError.exit_code == 2
    assert called == []


def test_llama_cpp_serves_a_gguf_file(run, monkeypatch) -> None:
    with whole_folder(run.directory.path / "export" / "gguf") as folder:
        folder.write("model-q8_0.gguf", b"GGUF")
        folder.write("model-f16.gguf", b"GGUF")
    serving = solotune.serve("run", port=0, engine="llama.cpp")
    assert serving.server.model.name == "model-f16.gguf"
    assert serving.to_json()["model"] == "model-f16.gguf" and api.Serving is type(serving)
