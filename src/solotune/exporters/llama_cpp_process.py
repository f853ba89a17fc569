"""The child process that runs llama.cpp; `llama_cpp.py` starts it, and nothing imports it.

    PYTHONPATH=TOOL python -P llama_cpp_process.py

One line of JSON on stdin says what to load: `{"model": FILE, "lora": FILE or null, "context": N, "threads": N, "key":
TEXT}`. It answers with the server's address on its stdout, and ends when stdin ends: with the process that started it,
however that ends.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def server(request: dict[str, Any]) -> Any:
    """llama.cpp's own HTTP server on a loopback port of its choice, computing as exactly as it can."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx = request["context"]
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = request["threads"]
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [request["key"]]
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.prefill_assistant = False  # a conversation that ends with an answer is a row, not one to continue
    params.cache_ram_mib, params.warmup, params.fit_params = 0, False, False
    if request["lora"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(request["lora"], 1.0)]
    return xllamacpp.Server(params)


def main() -> None:
    request = json.loads(sys.stdin.readline())
    answers = os.dup(1)
    os.dup2(2, 1)  # what the library prints is no answer
    running = server(request)
    os.write(answers, f"{running.listening_address}\n".encode())
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
