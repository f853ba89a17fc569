"""What a download shows while it comes: against a stand-in of the hub on this machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets
import datasets.config
import pytest
from huggingface_hub import constants

from solotune.dataset.readers.source import Source
from solotune.hub import download, download_progress
from tests.dataset.conftest import chat

COMMIT = "c" * 40
ROWS = "".join(json.dumps({"messages": chat(f"What is {n}?", f"It is {n}.")}) + "\n" for n in range(2000)).encode()
FILES = {"config.json": b"{}", "model.safetensors": bytes(5 << 20), "rows.jsonl": ROWS}
PIECE = 50_000


class _Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for a repository with FILES, of one commit."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        name = path.rpartition(f"/resolve/{COMMIT}/")[2]
        if name in FILES:
            etag = {"ETag": f'"{hashlib.sha256(FILES[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
            return self._send(200, FILES[name], etag)
        if "/tree/" in path:
            return self._send(200, [_entry(name) for name in FILES])
        if re.fullmatch(r"/api/(models|datasets)/owner/name(/revision/\w+)?", path):
            siblings = [{"rfilename": name, "size": len(content)} for name, content in FILES.items()]
            return self._send(200, {"id": "owner/name", "sha": COMMIT, "siblings": siblings, "tags": []})
        return self._send(200 if path == "/" else 404, b"", {} if path == "/" else {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self._send(200, [_entry(name) for name in FILES if name in asked] if "paths-info" in self.path else {})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def _entry(name: str) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(FILES[name]), "oid": "0" * 40}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in is the hub, nothing is in the cache, and each piece that comes is shown."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        for name, value in (
            ("ENDPOINT", endpoint), ("HUGGINGFACE_CO_URL_TEMPLATE", template), ("HF_HUB_OFFLINE", False),
            ("HF_HUB_CACHE", str(tmp_path / "hub")), ("DOWNLOAD_CHUNK_SIZE", PIECE),
        ):  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        for name, value in (("HF_ENDPOINT", endpoint), ("HF_DATASETS_CACHE", str(tmp_path / "datasets"))):
            monkeypatch.setattr(datasets.config, name, value)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(download_progress, "REFRESH_SECONDS", 0)
        download.offline_if_unreachable.cache_clear()
        yield
        download.offline_if_unreachable.cache_clear()
        server.shutdown()


def test_the_bytes_of_a_model_are_shown(hub: None) -> None:
    shown: list[str] = []
    with download_progress.shown_by(lambda done, total, what: shown.append(what)):
        folder = download.download("owner/name", "main", "here", ["*.json", "*.safetensors"], [])
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    line = re.compile(r"downloading owner/name  [\d.]+ MiB of 5 MiB  \(\d+%\)  [\d.,]+ [MG]iB/s")
    assert len(shown) >= 6
    assert [one for one in shown[2:] if not line.fullmatch(one)] == []
    assert "(100%)" in shown[-1]


def test_the_bytes_of_a_dataset_are_shown(hub: None) -> None:
    shown: list[str] = []
    with download_progress.shown_by(lambda done, total, what: shown.append(what)):
        assert sum(1 for _ in Source.of("dataset", "owner/name", "train")) == 2000
    assert len(ROWS) > 3 * PIECE and len(shown) >= 3
    assert shown[-1].startswith("downloading owner/name  ") and "(100%)" in shown[-1]


def test_nothing_is_shown_outside_of_the_block_and_nothing_stays_changed(hub: None) -> None:
    from huggingface_hub import HfApi

    before = HfApi.hf_hub_download
    with download_progress.of_single_files("owner/name"):
        assert HfApi.hf_hub_download is before and download_progress.bars("owner/name") is None
    with download_progress.shown_by(print), download_progress.of_single_files("owner/name"):
        assert HfApi.hf_hub_download is not before
    assert HfApi.hf_hub_download is before
    assert download.download("owner/name", "main", "here", ["*.json"], []).is_dir()
