"""Runs `solotune data` on configs in one process, with a hub that nobody answers for and then one that refuses.

    python hub_calls.py      in a folder with warm.yaml, nowhere.json and refused.json; it leaves found.json

Each of the JSON files is a list of configs. found.json has an answer for each, in lists of the same names: exit code,
the object on stdout, and seconds, of the processor and asleep, since what else runs on this machine does not count.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any


class Hub(BaseHTTPRequestHandler):
    """Refuses as the hub does; `/` answers."""

    def do_GET(self) -> None:
        error = "GatedRepo" if "gated" in self.path else "RepoNotFound"
        self.send_response(200 if self.path == "/" else 403 if error == "GatedRepo" else 404)
        self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def answers(configs: list[dict[str, Any]], asleep: list[float]) -> list[tuple[int, Any, float]]:
    from solotune import cli

    found = []
    for config in configs:
        Path("one.yaml").write_text(json.dumps(config))
        out, started = io.StringIO(), time.process_time() + asleep[0]
        with contextlib.redirect_stdout(out):
            code = cli.main(["data", "one.yaml", "--json"])
        found.append((code, json.loads(out.getvalue()), time.process_time() + asleep[0] - started))
    return found


def main() -> None:
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub, bind_and_activate=False)
    hub.server_bind()  # nobody else can have the address, and nobody listens at it yet
    os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"  # read when huggingface_hub is imported
    from huggingface_hub import constants

    from solotune import cli
    from solotune.hub import download

    asleep, sleep = [0.0], time.sleep

    def noted(seconds: float) -> None:
        asleep[0] += seconds
        sleep(seconds)

    time.sleep = noted
    cli.main(["data", "warm.yaml", "--json"])
    found = {"nowhere": answers(json.loads(Path("nowhere.json").read_text()), asleep)}
    hub.server_activate()
    Thread(target=hub.serve_forever, daemon=True).start()
    download.offline_if_unreachable.cache_clear()  # as a new process would, it asks again whether the hub is there
    constants.HF_HUB_OFFLINE = False
    found["refused"] = answers(json.loads(Path("refused.json").read_text()), asleep)
    Path("found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
