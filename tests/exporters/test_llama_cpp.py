"""llama.cpp's child process: its answers, its failures, its end. The engine here is a stand-in in a real process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from solotune.errors import InputError
from solotune.exporters import llama_cpp
from solotune.exporters.llama_cpp import EngineError, LlamaCpp
from solotune.exporters.tools import ENGINE

XLLAMACPP = """
import json, math, threading, http.server
class Any:
    def __getattr__(self, name):
        value = Any(); object.__setattr__(self, name, value); return value
class CommonParams(Any): pass
class ggml_type: GGML_TYPE_F32 = 0
class llama_flash_attn_type: LLAMA_FLASH_ATTN_TYPE_DISABLED = 0
def CommonAdapterLoraInfo(path, scale): return (path, scale)
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def answer(self, content, code=200):
        body = json.dumps(content).encode()
        self.send_response(code); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def generated(self, asked):
        tokens = asked["prompt"][::-1][: asked["n_predict"]]
        self.answer({"tokens": tokens, "stop_type": "eos" if tokens[-1] == 9 else "limit"})
    def do_GET(self): self.answer({"data": [{"meta": {"n_vocab": 3}}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != "Bearer " + self.server.key:
            return self.answer({"error": {"message": "no key"}}, 401)
        if self.path == "/apply-template":
            if asked["messages"][0]["content"] == "raise":
                return self.answer({"error": {"message": "roles must alternate"}}, 500)
            return self.answer({"prompt": json.dumps(asked)})
        if self.path == "/tokenize": return self.answer({"tokens": [len(asked["content"]), asked.get("parse_special")]})
        if "n_probs" not in asked: return self.generated(asked)
        if asked["prompt"][-1] == 8 and "logit_bias" not in asked: return self.answer({"tokens": []})
        tops = [{"id": n, "logprob": -float(n) - len(asked["prompt"])} for n in (2, 0, 1)]
        self.answer({"completion_probabilities": [{"top_logprobs": tops[: 2 if asked["prompt"][0] == 9 else 3]}]})
class Server:
    def __init__(self, params):
        print("loading", params.model.path)
        if "broken" in params.model.path: raise RuntimeError("Failed to load: unknown type")
        if "slow" in params.model.path: __import__("time").sleep(60)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.key = params.api_keys[0]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.listening_address = "http://127.0.0.1:%d" % server.server_port
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A file for a stand-in of the engine, which is where the real one would be."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ENGINE.path.mkdir(parents=True)
    (ENGINE.path / "xllamacpp.py").write_text(XLLAMACPP)

    def make(name: str) -> Path:
        (tmp_path / name).write_text("GGUF")
        return tmp_path / name

    return make


def test_what_it_answers(file: Callable[[str], Path]) -> None:
    with LlamaCpp(file("model.gguf"), lora=file("adapter.gguf"), context=64) as engine:
        found = engine.log_probs([5, 6, 7])
        assert torch.equal(found, torch.tensor([[-1.0, -2, -3], [-2, -3, -4], [-3, -4, -5]]))
        assert torch.equal(engine.log_probs([5, 6, 7], [2]), found[2:])
        assert engine.log_probs([8]).shape == (1, 3)  # an end token follows
        assert engine.token_ids("four") == [4, True]
        asked = engine.rendered([{"role": "user", "content": "Hi"}], is_prompt=False)
        assert '"add_generation_prompt": false' in asked and '"tools"' not in asked
        assert engine.generate([1, 2, 3], 2) == [3, 2]
        assert engine.generate([1, 9, 3], 2) == [3]  # an end token


def test_a_refusal_says_what_the_template_says(file: Callable[[str], Path]) -> None:
    with LlamaCpp(file("model.gguf")) as engine, pytest.raises(EngineError) as caught:
        engine.token_ids([{"role": "user", "content": "raise"}])
    assert caught.value.seen == "roles must alternate"


def test_a_part_of_the_vocabulary_is_not_taken_for_all(file: Callable[[str], Path]) -> None:
    with LlamaCpp(file("model.gguf")) as engine, pytest.raises(EngineError, match="2 probabilities instead of 3"):
        engine.log_probs([9])


def test_only_this_process_has_the_key(file: Callable[[str], Path]) -> None:
    with LlamaCpp(file("model.gguf")) as engine:
        assert engine._key not in Path(f"/proc/{engine._child.pid}/cmdline").read_text()
        engine._key = "other"
        with pytest.raises(EngineError) as caught:
            engine.token_ids("x")
    assert caught.value.seen == "no key"


def test_a_file_that_is_not_loaded(file: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="does not load") as caught, LlamaCpp(file("broken.gguf")):
        pass
    assert caught.value.seen == "RuntimeError: Failed to load: unknown type"
    with pytest.raises(InputError, match="no such file"), LlamaCpp(tmp_path / "none.gguf"):
        pass


def test_a_file_that_takes_too_long(file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "LOAD_SECONDS", 0.2)
    begin = time.monotonic()
    with pytest.raises(EngineError) as caught, LlamaCpp(file("slow.gguf")):
        pass
    assert caught.value.seen == "not loaded within 0 s" and time.monotonic() - begin < 30


def test_an_engine_that_dies_is_said(file: Callable[[str], Path]) -> None:
    with LlamaCpp(file("model.gguf")) as engine:
        engine._child.kill()
        engine._child.wait()
        with pytest.raises(EngineError) as caught:
            engine.token_ids("x")
    assert caught.value.seen == "its process has ended"


def test_it_ends_with_the_block_and_with_the_process_that_started_it(file: Callable[[str], Path]) -> None:
    with LlamaCpp(file("model.gguf")) as engine:
        child = engine._child
    assert child.poll() is not None
    with LlamaCpp(file("model.gguf")) as engine:
        os.close(os.dup(0))
        engine._child.stdin.close()  # as if this process had been killed
        assert engine._child.wait(10) == 0
