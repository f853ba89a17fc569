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

CHAT_PATHS = ("/v1/chat/completions", "/v1/responses")
NO_CHATS = "this model was trained on plain text, without a chat template: use /v1/completions"


def serve_transformers(request: dict) -> None:
    """What `transformers serve` does: FastAPI and uvicorn, on a folder."""
    from transformers.cli.serve import Serve
    from transformers.cli.serving import server

    if request["prompt_format"] == "text":
        build = server.build_server
        server.build_server = lambda *given, **named: without_chats(build(*given, **named))
    Serve(force_model=request["model"], host=request["host"], port=request["port"])


def without_chats(app):
    """The server, with an error for requests that would go through a chat template."""
    from fastapi.responses import JSONResponse  # pyright: ignore[reportMissingImports]

    @app.middleware("http")
    async def refuse_chats(request, answer):
        if request.url.path not in CHAT_PATHS:
            return await answer(request)
        error = {"message": NO_CHATS, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": error}, 400)

    return app


def serve_llama_cpp(request: dict) -> None:
    """llama.cpp's own HTTP server, on a GGUF file."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path, params.model_alias = request["model"], {request["model"]}
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
