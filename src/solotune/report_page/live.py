"""Serve the page of a run on this machine while the run goes on: `solotune report RUN --live`.

    with LiveServer(run_dir, build_page, curves, port=8765) as server:
        server.wait()         until Ctrl-C

    /                               the page, built from the files on each request
    /curves.json?since=OFFSET       what was logged after that byte of metrics.jsonl, and `files`
    anything else                   404

The files are the state, so nothing is lost if the browser, this server or the run stops and starts again. The script
`templates/live.js` asks every few seconds for new points; where `files` has changed (a result was written, the run was
resumed), it loads the page again. A page that is served may ask its own server, and nothing else.

Only this machine reaches the server (127.0.0.1), and only under its own name: a web site whose name is changed to point
here (DNS rebinding) is refused, since the page has rows of the training data.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from solotune.errors import InputError
from solotune.report_page.render import packaged, policy_hash
from solotune.run.run_dir import RunDirectory
from solotune.units import first_line

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # also through `ssh -L`, with any port
RESULTS = ("config.yaml", "plan.json", "evaluation.json", "diagnosis.json", "manifest.json", "export/export.json")
"""Files with which the page changes otherwise than by new points. A resumed run writes config.yaml again."""
BODY_END, POLICY = "</body>", "script-src "


class LiveServer:
    """Serve one run; use it in a `with` block."""

    def __init__(
        self,
        run_dir: Path,
        build_page: Callable[[Path], str],
        curves: Callable[[Path, int], dict[str, Any]],
        port: int = 0,
    ) -> None:
        """Args:
            port: 0: any free one.

        Raises:
            InputError: the port is taken, or may not be used.
        """
        self._run_dir, self._build_page, self._curves = run_dir, build_page, curves
        self._building = threading.Lock()  # one page at a time: a long run has much to read
        try:
            self._server = ThreadingHTTPServer((HOST, port), _handler_of(self))
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE
            raise InputError(
                f"--port {port}: {'another program is using it' if is_taken else 'cannot be used'}",
                seen=error.strerror or str(error),
                allowed="a free port of this machine",
                change="use another one, or 0 for any",
            ) from None
        self._server.daemon_threads = True
        self.url = f"http://{HOST}:{self._server.server_address[1]}/"

    def __enter__(self) -> LiveServer:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def wait(self) -> None:
        """Wait for Ctrl-C, which raises KeyboardInterrupt here."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def page(self) -> str:
        """The HTML, with the script that asks for new points."""
        with self._building:
            before = files_of(self._run_dir)
            since = self._curves(self._run_dir, 0)["next"]  # before the page: a point may come twice, but none is lost
            html = self._build_page(self._run_dir)
        start = f"solotuneLive({json.dumps({'since': since, 'files': before})});"
        script = f"{packaged('templates/live.js')}\n{start}"
        allowed = f"connect-src 'self'; {POLICY}{policy_hash(script)} "
        head, found, rest = html.partition(POLICY)
        html = head + (allowed if found else "") + rest
        body, _, after = html.rpartition(BODY_END)
        return f"{body}<script>{script}</script>{BODY_END}{after}"

    def points(self, since: int) -> dict[str, Any]:
        """What `/curves.json` answers."""
        return {**self._curves(self._run_dir, since), "files": files_of(self._run_dir)}


def files_of(run_dir: Path) -> str:
    """A text that changes when the run writes a result, is resumed or ends."""
    found = [f"running {RunDirectory(run_dir).is_locked()}"]
    for name in RESULTS:
        with contextlib.suppress(OSError):
            status = (run_dir / name).stat()
            found.append(f"{name} {status.st_mtime_ns} {status.st_size}")
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def _handler_of(live: LiveServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Answer GET and HEAD; others are not known here (501)."""

        server_version, sys_version = "solotune", ""

        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")
            if (host[0] or host[2]) not in NAMES:
                return self._send(HTTPStatus.FORBIDDEN, "only for this machine")
            asked = urlsplit(self.path)
            try:
                if asked.path == "/":
                    return self._send(HTTPStatus.OK, live.page(), "text/html")
                if asked.path == "/curves.json":
                    since = parse_qs(asked.query).get("since", ["0"])[0]
                    if not since.isascii() or not since.isdigit() or len(since) > 18:
                        return self._send(HTTPStatus.BAD_REQUEST, "since is a number of bytes")
                    return self._send(HTTPStatus.OK, json.dumps(live.points(int(since))), "application/json")
            except Exception as error:  # of a page that cannot be made now; the next may
                return self._send(HTTPStatus.INTERNAL_SERVER_ERROR, first_line(error, with_type=True))
            return self._send(HTTPStatus.NOT_FOUND, "not found")

        do_HEAD = do_GET

        def _send(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
            content = text.encode("utf-8", "replace")
            with contextlib.suppress(OSError):  # the browser has gone
                self.send_response(status)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Cache-Control", "no-store")
                self.send_header("X-Content-Type-Options", "nosniff")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Requests are not logged: the terminal shows what the run says."""

    return Handler
