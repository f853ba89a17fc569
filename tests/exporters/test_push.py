"""Upload by huggingface_hub's own client, to a stand-in of the hub's HTTP interface on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import constants

from solotune.errors import InputError, IntegrityError
from solotune.exporters.push import exported, push
from solotune.run.atomic_io import whole_folder

TOKEN = "hf_standinstandinstandin"
WEIGHTS = b"\x08" + bytes(7) + b"{}" + bytes(3000)


class Hub(ThreadingHTTPServer):
    """Repositories, their files and what was asked, as the hub keeps them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str]] = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def handle_any(self) -> None:
        hub, path, body = self.server, self.path.partition("?")[0], self.body()
        hub.asked.append((self.command, path, self.headers.get("Authorization", "")))
        if path.startswith("/blobs/"):  # storage: the address itself is the permission
            hub.blobs[path.removeprefix("/blobs/")] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in hub.repos:
                return self.answer({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
            hub.repos[name], hub.private[name] = {".gitattributes": b""}, asked.get("visibility") == "private"
            return self.answer({"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if "/tree/" in path:
            name = path.removeprefix("/api/models/").partition("/tree/")[0]
            return self.answer([{"type": "file", "path": file, "size": len(data), "oid": "0"} for file, data in hub.repos[name].items()])  # fmt: skip
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                 "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            return self.answer({"files": files})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "authenticated": True, "actions": {"upload": {"href": f"{hub.url}/blobs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if "/commit/" in path:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.repos[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.repos[name][value["path"]] = hub.blobs[value["oid"]]
            return self.answer({"success": True, "commitOid": "abc", "commitUrl": f"{hub.url}/{name}/commit/abc"})
        return self.answer({"error": f"not of the hub: {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol needs a second server
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    with whole_folder(tmp_path / "merged") as folder:
        folder.write("model.safetensors", WEIGHTS)
        folder.write("config.json", "{}")
        folder.write("README.md", "---\nlicense: mit\n---\n# A model\n")
    return tmp_path / "merged"


def test_every_file_arrives_in_a_private_repository(hub: Hub, merged: Path) -> None:
    url = push(merged, "ada/demo", endpoint=hub.url)
    assert url == f"{hub.url}/ada/demo/commit/abc"
    assert hub.private == {"ada/demo": True}
    files = {path.name: path.read_bytes() for path in merged.iterdir()}
    assert hub.repos["ada/demo"] == {".gitattributes": b"", **files}
    assert list(hub.blobs) == [hashlib.sha256(WEIGHTS).hexdigest()]  # weights go to the storage, not into the commit
    assert all(token == f"Bearer {TOKEN}" for _, path, token in hub.asked if not path.startswith("/blobs/"))
    assert not any(TOKEN.encode() in data for data in files.values())


def test_a_public_repository_only_if_asked(hub: Hub, merged: Path) -> None:
    push(merged, "ada/demo", private=False, endpoint=hub.url)
    assert hub.private == {"ada/demo": False}


def test_an_empty_repository_is_filled_and_one_with_files_refused(hub: Hub, merged: Path) -> None:
    hub.repos = {"ada/empty": {".gitattributes": b""}, "ada/used": {"config.json": b"theirs"}}
    push(merged, "ada/empty", endpoint=hub.url)
    assert hub.repos["ada/empty"]["model.safetensors"] == WEIGHTS
    with pytest.raises(InputError, match="nothing was uploaded") as refused:
        push(merged, "ada/used", endpoint=hub.url)
    assert refused.value.seen == "it has files: config.json"
    assert hub.repos["ada/used"] == {"config.json": b"theirs"}


def test_a_token_that_may_not_write(hub: Hub, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_anotheranotheranother")
    with pytest.raises(InputError) as refused:
        push(merged, "ada/demo", endpoint=hub.url)
    assert "hf auth login" in str(refused.value) and "hf_another" not in str(refused.value)


def test_no_token_no_network_and_offline(
    hub: Hub, merged: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.shutdown()
    hub.server_close()
    with pytest.raises(InputError, match="nothing was uploaded") as refused:
        push(merged, "ada/demo", endpoint=hub.url)
    assert "ConnectError" in str(refused.value.seen)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as refused:
        push(merged, "ada/demo", endpoint=hub.url)
    assert refused.value.seen == "HF_HUB_OFFLINE=1"


def test_what_is_refused_before_anything_is_asked(hub: Hub, merged: Path) -> None:
    with pytest.raises(InputError, match="--push demo"):
        push(merged, "demo", endpoint=hub.url)
    (merged / "config.json").write_text("{ }")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        push(merged, "ada/demo", endpoint=hub.url)
    assert hub.asked == []


def test_formats_that_can_run_code_are_refused(hub: Hub, tmp_path: Path) -> None:
    with whole_folder(tmp_path / "odd") as folder:
        folder.write("pytorch_model.bin", b"x")
    with pytest.raises(InputError) as refused:
        push(tmp_path / "odd", "ada/demo", endpoint=hub.url)
    assert refused.value.seen == "pytorch_model.bin"
    assert hub.asked == []


def test_what_is_exported_already_is_uploaded_as_it_is(merged: Path) -> None:
    folder = merged.parent
    assert exported(folder, ["gguf"], "ada/demo") is None
    (folder / "export.json").write_text(json.dumps({"artifacts": [{"kind": "merged", "problems": []}]}))
    found = exported(folder, ["merged"], "ada/demo")
    assert found is not None and found.ok and found.choices[0].value == "the one that is there"
    (folder / "export.json").write_text(json.dumps({"artifacts": [{"kind": "merged", "problems": ["mean KL 0.5"]}]}))
    with pytest.raises(InputError) as refused:
        exported(folder, ["merged"], "ada/demo")
    assert refused.value.seen == "mean KL 0.5"


@pytest.mark.parametrize(
    ("kinds", "repo", "seen"),
    [(["adapter", "merged"], "a/b", "--to adapter,merged"), (["vllm"], "a/b", "--to vllm"), (["merged"], "b", "b")],
)
def test_one_kind_goes_to_one_repository(tmp_path: Path, kinds: list[str], repo: str, seen: str) -> None:
    with pytest.raises(InputError) as refused:
        exported(tmp_path, kinds, repo)
    assert refused.value.seen == seen
