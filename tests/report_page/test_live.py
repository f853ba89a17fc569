"""The page served while a run goes on: from its files, to this machine only, after any damage."""

from __future__ import annotations

import http.client
import json
import re
import socket
from pathlib import Path

import pytest

from solotune.errors import InputError
from solotune.report_page.build import build_page
from solotune.report_page.curves import curves
from solotune.report_page.live import LiveServer
from solotune.report_page.render import policy_hash
from solotune.run.events import to_line
from tests.display.test_progress import metrics


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "config.yaml").write_text("model_name_or_path: m\n")
    (tmp_path / "metrics.jsonl").write_text(to_line(metrics(1)) + to_line(metrics(2)))
    return tmp_path


@pytest.fixture
def server(run):
    with LiveServer(run, build_page, curves) as started:
        yield started


def ask(server: LiveServer, path: str, host: str | None = None, method: str = "GET"):
    address = re.fullmatch(r"http://(127\.0\.0\.1):(\d+)/", server.url)
    assert address is not None
    connection = http.client.HTTPConnection(address[1], int(address[2]), timeout=10)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    content = answer.read().decode()
    connection.close()
    return answer.status, content


def test_the_page_runs_its_script_and_may_ask_nobody_else(server):
    status, page = ask(server, "/")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert status == 200 and policy is not None
    assert "connect-src 'self'; script-src 'sha256-" in policy[1] and "default-src 'none'" in policy[1]
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert "solotuneLive(" in scripts[-1]
    assert all(policy_hash(script) in policy[1] for script in scripts), "a script that the policy does not name is dead"
    assert ask(server, "/", method="HEAD") == (200, "")


def test_new_points_come_from_the_byte_where_the_page_ended(server, run):
    _, page = ask(server, "/")
    served = json.loads(re.findall(r"solotuneLive\((\{.*\})\);", page)[-1])
    assert served["since"] == (run / "metrics.jsonl").stat().st_size
    with (run / "metrics.jsonl").open("a") as file:
        file.write(to_line(metrics(3, loss=1.5)) + to_line(metrics(4))[:20])
    _, text = ask(server, f"/curves.json?since={served['since']}")
    found = json.loads(text)
    assert found["series"]["loss"] == {"steps": [3], "values": [1.5]} and not found["restarted"]
    assert found["files"] == served["files"]
    (run / "evaluation.json").write_text("{}")
    again = json.loads(ask(server, f"/curves.json?since={found['next']}")[1])
    assert again["series"] == {} and again["files"] != served["files"], "the page is loaded again"
    (run / "metrics.jsonl").write_text(to_line(metrics(1)))
    assert json.loads(ask(server, f"/curves.json?since={found['next']}")[1])["restarted"]


@pytest.mark.parametrize(
    ("path", "status"),
    [("/etc/passwd", 404), ("/../config.yaml", 404), ("/index.html", 404), ("/curves.json?since=-1", 400),
     ("/curves.json?since=x", 400), ("/curves.json?since=" + "9" * 99, 400), ("/curves.json?since=999999", 200)],
)  # fmt: skip
def test_nothing_else_is_served(server, path, status):
    found, text = ask(server, path)
    assert found == status and "model_name" not in text


@pytest.mark.parametrize(
    ("host", "status"), [("evil.example:80", 403), ("127.0.0.1.evil.example", 403), ("localhost:9", 200)]
)
def test_a_page_of_another_site_cannot_read_it(server, host, status):
    assert ask(server, "/curves.json", host)[0] == status


def test_a_page_that_cannot_be_made_is_an_answer_and_the_next_may_be_made(run):
    def broken(path: Path) -> str:
        if (run / "broken").exists():
            raise ValueError("no page\nnow")
        return "<html></html>"

    (run / "broken").touch()
    with LiveServer(run, broken, curves) as server:
        assert ask(server, "/") == (500, "ValueError: no page")
        (run / "broken").unlink()
        assert ask(server, "/")[0] == 200
        (run / "metrics.jsonl").unlink()
        assert json.loads(ask(server, "/curves.json?since=5")[1])["restarted"], "a run that starts again"


def test_a_taken_port_is_an_error_in_words(run):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError) as caught:
            LiveServer(run, build_page, curves, port)
    assert caught.value.problem == f"--port {port}: another program is using it"
