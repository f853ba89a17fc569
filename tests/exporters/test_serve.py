"""The server's child process, ports and engines; real servers are asked in test_serve_real.py."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import time
from pathlib import Path

import pytest

from solotune.errors import InputError
from solotune.exporters import serve
from solotune.exporters.serve import Server, best_gguf, choose_engine, free_port

STAND_IN = """
import json, os, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
request = json.loads(sys.stdin.readline())
if request["model"] == "broken": sys.exit("no such architecture")
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps([request, os.getcwd(), os.environ["HF_HUB_OFFLINE"]]).encode()
        self.send_response(200); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
HTTPServer((request["host"], request["port"]), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A program in place of the engines: it says what it was asked."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(serve.serve_process, "__file__", str(tmp_path / "stand_in.py"))
    (tmp_path / "merged").mkdir()
    return tmp_path


def test_the_child_serves_by_name_in_the_models_folder_and_ends_with_the_block(stand_in: Path) -> None:
    port = free_port("127.0.0.1", 0)
    with Server("transformers", stand_in / "merged", "127.0.0.1", port) as server:
        assert (server.url, server.name) == (f"http://127.0.0.1:{port}/v1", "merged")
        with serve.urllib.request.urlopen(server.url) as answer:
            request, folder, offline = json.loads(answer.read())
        expected = {"engine": "transformers", "model": "merged", "host": "127.0.0.1", "port": port}
        assert request == {**expected, "prompt_format": "chat"}
        assert (folder, offline) == (str(stand_in), "1")
        with pytest.raises(InputError, match="another program is using it"):
            free_port("127.0.0.1", port)
    assert free_port("127.0.0.1", port) == port


def test_a_child_that_ends_is_told_with_its_last_words(stand_in: Path) -> None:
    (stand_in / "broken").mkdir()
    with pytest.raises(InputError, match="transformers could not serve it") as failed:
        Server("transformers", stand_in / "broken", "127.0.0.1", free_port("127.0.0.1", 0)).start()
    assert failed.value.seen == "no such architecture"
    with Server("transformers", stand_in / "merged", "127.0.0.1", free_port("127.0.0.1", 0)) as server:
        assert server._child is not None
        server._child.kill()
        with pytest.raises(InputError, match="transformers has ended"):
            server.wait()


def test_the_child_ends_with_a_parent_that_is_killed(stand_in: Path) -> None:
    port = free_port("127.0.0.1", 0)
    if (parent := os.fork()) == 0:
        Server("transformers", stand_in / "merged", "127.0.0.1", port).start()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert free_port("127.0.0.1", port) == port
            return
        except InputError:
            time.sleep(0.05)
    pytest.fail("the server lives on")


@pytest.mark.parametrize(("host", "port"), [("no-such-host.invalid", 8000), ("203.0.113.1", 8000)])
def test_addresses_that_are_none_of_this_machine(host: str, port: int) -> None:
    with pytest.raises(InputError, match=f"--port {port}: cannot be used on {host}"):
        free_port(host, port)


def test_the_engine_is_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    have = {"openai", "fastapi", "uvicorn"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in have else None)
    gguf = Path("model-f16.gguf")

    def chosen(wanted: str | None, *ggufs: Path) -> tuple[object, str]:
        choice = choose_engine(wanted, ggufs)
        return choice.value, choice.because

    assert chosen(None, gguf) == ("transformers", "openai, fastapi, uvicorn are installed")
    assert chosen("llama.cpp") == ("llama.cpp", "--engine")
    have.clear()
    assert chosen(None, gguf) == ("llama.cpp", "openai, fastapi, uvicorn not installed, and there is a GGUF file")
    for wanted in ("transformers", None):
        with pytest.raises(InputError) as refused:
            choose_engine(wanted, [])
        assert "pip install 'solotune[serve]'" in str(refused.value)
    with pytest.raises(InputError, match="--engine: vllm is not known"):
        choose_engine("vllm", [])


def test_of_several_gguf_files_the_one_of_16_bits() -> None:
    names = ["model-f32.gguf", "model-q4_k_m.gguf", "model-f16.gguf", "model-q8_0.gguf"]
    assert best_gguf([Path(name) for name in names]).name == "model-f16.gguf"
    assert best_gguf([Path("model-q4_k_m.gguf"), Path("model-q8_0.gguf")]).name == "model-q8_0.gguf"


def test_an_address_for_every_interface_is_asked_on_loopback() -> None:
    assert Server("transformers", Path("m"), "0.0.0.0", 80).url == "http://127.0.0.1:80/v1"
    assert Server("transformers", Path("m"), "::1", 80).url == "http://[::1]:80/v1"


def test_a_model_of_plain_texts_refuses_chats_and_nothing_else() -> None:
    fastapi = pytest.importorskip("fastapi")
    from fastapi.testclient import TestClient

    from solotune.exporters.serve_process import without_chats

    app = fastapi.FastAPI()
    for path in ("/v1/chat/completions", "/v1/responses", "/v1/completions"):
        app.post(path)(lambda: {"answered": True})
    client = TestClient(without_chats(app))
    assert client.post("/v1/completions").json() == {"answered": True}
    for path in ("/v1/chat/completions", "/v1/responses"):
        refused = client.post(path)
        assert refused.status_code == 400 and "/v1/completions" in refused.json()["error"]["message"]
