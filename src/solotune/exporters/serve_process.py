"""The child process that serves a model; `serve.py` starts it, and nothing imports it.

    python -P serve_process.py       in the folder that has the model

One line of JSON on stdin says what to serve: `{"engine": "transformers" or "llama.cpp", "model": NAME, "host": HOST,
"port": PORT}`. It ends when stdin ends: with the process that started it, however that ends.
"""

from __future__ import annotations

import json
import os
import sys
import threading


def serve_transformers(request: dict) -> None:
    """What `transformers serve` does: FastAPI and uvicorn, on a folder."""
    from transformers.cli.serve import Serve

    Serve(force_model=request["model"], host=request["host"], port=request["port"])


def serve_llama_cpp(request: dict) -> None:
    """llama.cpp's own HTTP server, on a GGUF file."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path = params.model_alias = request["model"]
    params.hostnames, params.port = [request["host"]], request["port"]
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, file=sys.stderr)
    threading.Event().wait()


def main() -> None:
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    {"transformers": serve_transformers, "llama.cpp": serve_llama_cpp}[request["engine"]](request)


if __name__ == "__main__":
    main()
