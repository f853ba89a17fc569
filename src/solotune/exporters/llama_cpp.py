"""Run a GGUF file in llama.cpp, to compare it with the model that was trained.

    with LlamaCpp(path) as engine:
        engine.token_ids(messages)         through the file's own chat template and tokenizer, as its server does it
        engine.log_probs(ids)              (T, V): of the whole vocabulary, after each of the T tokens
        engine.generate(ids, 64)           greedy
    LlamaCpp(base, lora=adapter)           an adapter beside its base

llama.cpp's own server runs in a child process (`llama_cpp_process`) on a loopback port, with a key that only this
process knows. The KV cache is in f32: with the default f16, an f32 file's log-probabilities are off by 0.014.

The server gives probabilities of generated tokens only, not of a prompt. So `log_probs` asks for one token after each
prefix; the server keeps the prefix before, and computes one more token a request. A request takes half a second with a
vocabulary of 50,000 (most of it is text: 4.7 MB of JSON), whatever the model's size.

Shape legend: T positions, V vocabulary.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from solotune.errors import InputError
from solotune.exporters import llama_cpp_process
from solotune.exporters.tools import ENGINE

LOAD_SECONDS, LOAD_BYTES_PER_SECOND = 120, 20 << 20  # a model may take LOAD_SECONDS, and more if it is large
ANSWER_SECONDS = 600
CONTEXT = 4096


class EngineError(InputError):
    """llama.cpp does not load a file, refuses a conversation, or does not answer."""


class LlamaCpp:
    """A GGUF file in llama.cpp; use it in a `with` block."""

    def __init__(
        self, path: Path, *, lora: Path | None = None, context: int = CONTEXT, threads: int | None = None
    ) -> None:
        """Args:
        lora: an adapter in GGUF to add to it.
        context: the most tokens of a conversation.
        threads: default: those that torch uses.
        """
        self.path, self.lora, self.context = path, lora, context
        self._threads = threads or torch.get_num_threads()
        self._key = secrets.token_hex(16)
        self._child: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._address = ""

    def __enter__(self) -> LlamaCpp:
        for file in filter(None, (self.path, self.lora)):
            if not file.is_file():
                raise InputError(f"{file}: no such file", allowed="a GGUF file")
        self._log = tempfile.TemporaryFile()
        self._child = subprocess.Popen(
            [sys.executable, "-P", llama_cpp_process.__file__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env={**os.environ, "PYTHONPATH": str(ENGINE.folder())},
        )  # fmt: skip
        atexit.register(self.close)
        try:
            self._address = self._loaded(self._child)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the child process."""
        atexit.unregister(self.close)
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                with contextlib.suppress(OSError):
                    if stream is not None:
                        stream.close()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _loaded(self, child: subprocess.Popen[bytes]) -> str:
        """The server's address, once the model is loaded."""
        assert child.stdin is not None and child.stdout is not None
        request = {
            "model": str(self.path.resolve()),
            "lora": str(self.lora.resolve()) if self.lora else None,
            "context": self.context,
            "threads": self._threads,
            "key": self._key,
        }
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
        seconds = LOAD_SECONDS + self.path.stat().st_size / LOAD_BYTES_PER_SECOND
        ready = select.select([child.stdout], [], [], seconds)[0]
        address = child.stdout.readline().decode().strip() if ready else ""
        if not address:
            why = f"not loaded within {seconds:.0f} s" if not ready else self._last_words()
            raise EngineError(f"{self.path}: llama.cpp does not load this file", seen=why)
        return address

    def _last_words(self) -> str:
        """The last line of the child's log that says what went wrong."""
        if self._log is None:
            return "its process has ended"
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert self._child is not None
            self._child.wait(5)
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        wrong = [
            line for line in lines if any(word in line.lower() for word in ("error", "fail", "unknown", "invalid"))
        ]
        return (wrong or lines or ["its process has ended"])[-1][:300]

    # --- what it is asked

    def token_ids(
        self, messages: list[dict[str, Any]] | str, tools: list[dict[str, Any]] | None = None, *, is_prompt: bool = True
    ) -> list[int]:
        """Ids that the server computes for a conversation, or for a text to continue.

        Args:
            is_prompt: add the header of an answer (`add_generation_prompt`).

        Raises:
            EngineError: the template refuses the messages, or the server does not answer.
        """
        text = messages if isinstance(messages, str) else self.rendered(messages, tools, is_prompt=is_prompt)
        asked = {"content": text, "add_special": True, "parse_special": True}
        return self._ask("/tokenize", asked)["tokens"]

    def rendered(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, *, is_prompt: bool = True
    ) -> str:
        """The text of a conversation; without the BOS that the tokenizer adds."""
        asked: dict[str, Any] = {"messages": messages, "add_generation_prompt": is_prompt}
        return self._ask("/apply-template", {**asked, **({"tools": tools} if tools else {})})["prompt"]

    def log_probs(self, ids: Sequence[int], positions: Sequence[int] | None = None) -> torch.Tensor:
        """float32 (T, V): log-probabilities of the token that follows each of these positions.

        Args:
            ids: a row of tokens, as it is: nothing is added.
            positions: default: all.

        Raises:
            EngineError: the row is longer than the context, or the server does not answer.
        """
        size = self.vocab_size
        positions = range(len(ids)) if positions is None else positions
        found = torch.full((len(positions), size), -torch.inf)
        # of a token that ends the answer, or is a part of a character, the server shows nothing; so it generates a
        # letter. The probabilities are those before this
        letter = self._ask("/tokenize", {"content": "a", "add_special": False})["tokens"][-1]
        for row, position in enumerate(positions):
            asked = {"prompt": list(ids[: position + 1]), "n_predict": 1, "n_probs": size, "temperature": 0}
            asked |= {"logit_bias": [[letter, 1e6]], "cache_prompt": True}
            (answer,) = self._ask("/completion", asked)["completion_probabilities"]
            tops = answer["top_logprobs"]
            if len(tops) != size:
                raise EngineError(f"{self.path}: {len(tops):,} probabilities instead of {size:,}")
            found[row, [top["id"] for top in tops]] = torch.tensor([top["logprob"] for top in tops])
        return found

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation of a prompt, up to an end token, which is left out."""
        asked = {"prompt": list(ids), "n_predict": max_new_tokens, "temperature": 0, "top_k": 1, "return_tokens": True}
        answer = self._ask("/completion", {**asked, "cache_prompt": True})
        return answer["tokens"][:-1] if answer["stop_type"] == "eos" else answer["tokens"]

    @property
    def vocab_size(self) -> int:
        """Size of the file's vocabulary."""
        return int(self._ask("/v1/models")["data"][0]["meta"]["n_vocab"])

    def _ask(self, path: str, content: dict[str, Any] | None = None) -> Any:
        """The server's answer to a request.

        Raises:
            EngineError: it says no, or does not answer in time.
        """
        body = None if content is None else json.dumps(content).encode()
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        request, begin = urllib.request.Request(self._address + path, body, headers), time.monotonic()
        try:
            with _opener.open(request, timeout=ANSWER_SECONDS) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise EngineError(f"{self.path}: llama.cpp refuses {path}", seen=_message_of(error)) from None
        except (OSError, ValueError) as error:
            why = f"{type(error).__name__} after {time.monotonic() - begin:.0f} s"
            if self._child is None or self._child.poll() is not None:
                why = "its process has ended"
            raise EngineError(f"{self.path}: llama.cpp does not answer {path}", seen=why) from None


_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback needs no proxy


def _message_of(error: urllib.error.HTTPError) -> str:
    """What the server says in its error."""
    try:
        return str(json.loads(error.read())["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError, OSError):
        return f"HTTP {error.code}"
