"""What is shown and written: inert on a terminal (E8), without secrets (E9), without a network (E10)."""

from __future__ import annotations

import io
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from solotune import cli
from solotune.api import runs
from solotune.config.secrets import is_secret, without_secrets
from solotune.display.progress import make_console
from solotune.hardware import doctor, machine
from solotune.units import escape_terminal
from tests.dataset.conftest import door, model_folders  # noqa: F401

PAYLOADS = {
    "escape": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://evil\x1b\\here\x1b]8;;\x1b\\",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "C1": "\x9b31m\x9d0;x\x9c",
    "bell": "\x07\x08\x0c\x0b",
    "return": "real\rfake",
    "delete": "a\x7f",
    "bidi": "\u202egnp.exe\u202c",
    "isolates": "\u2066a\u2069\u2067b",
    "zero width": "a\u200bb\ufeffc",
    "tags": "a\U000e0041\U000e007f",
    "separators": "a\u2028b\u2029c",
    "markup": "[red]x[/red][link=http://evil]y[/link]",
    "closing tag": "[/foo]",
    "emoji code": ":boom:",
    "surrogate": "\ud800",
    "NUL": "a\0b",
}
RAW = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2060-\u2069\ufeff\u2028\u2029\ud800-\udfff]")


@pytest.mark.parametrize("name", PAYLOADS)
def test_text_is_inert_and_markup_stays_text(name: str) -> None:
    text = escape_terminal(PAYLOADS[name])
    assert not RAW.search(text)
    out = io.StringIO()
    make_console(out).print(text)
    Console(file=out, force_terminal=True, markup=False, emoji=False, highlight=False).print(text)
    if name in ("markup", "closing tag", "emoji code"):
        assert out.getvalue().count(PAYLOADS[name]) == 2


def places(text: str) -> list[list[str]]:
    """Command lines that bring a text to the screen: names, keys, values, paths, roots."""
    return [
        ["train", f"{text}.yaml"],
        ["data", "run.yaml", f"{text}=1"],
        ["data", "run.yaml", f"optim={text}"],
        ["data", "run.yaml", f"model_name_or_path={text}"],
        ["data", "run.yaml", f"dataset={text}"],
        ["data", "run.yaml", f"dataset_split={text}"],
        ["plan", "run.yaml", "--gpu", text],
        ["runs", "--root", text],
        ["chat", text],
        ["evaluate", text],
        [text],
        ["data", f"--{text}"],
    ]


@pytest.mark.parametrize("name", [name for name in PAYLOADS if name not in ("surrogate", "NUL")])
def test_nothing_a_user_types_steers_the_terminal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("model_name_or_path: nowhere/at/all\ndataset: none.jsonl\n")
    for argv in places(PAYLOADS[name]):
        code = cli.main(argv)
        out, err = capsys.readouterr()
        assert code in (0, 2, 3) and "Traceback" not in err, (argv, err)
        assert not RAW.search(out + err), argv


def test_rows_and_file_names_do_not_steer_it_either(door: Any) -> None:  # noqa: F811
    for number, (name, text) in enumerate(PAYLOADS.items()):
        if name in ("surrogate", "NUL"):
            continue
        rows = [{"messages": [{"role": "user", "content": f"{text} {n}"}, {"role": "assistant", "content": text + "x"}]}
                for n in range(2)]  # fmt: skip
        Path(f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert door(f"{number}.jsonl").code in (0, 3)
        shown = door.text(f"{number}.jsonl")
        assert not RAW.search(shown), name
        if name in ("markup", "closing tag", "emoji code"):
            assert text in shown.replace("\n", ""), name
        bad = f"{number}b{text.replace('/', '')}.jsonl"
        Path(bad).write_text(json.dumps({"messages": [{"role": text, "content": text}]}) + "\n")
        assert not RAW.search(door(bad).shown), name


# --- secrets

SECRETS = {
    "hf": "hf_" + "aB3" * 12, "openai": "sk-proj-" + "aB3" * 12, "github": "ghp_" + "aB3" * 12,
    "aws": "AKIA" + "ABCD1234" * 2, "gitlab": "glpat-" + "aB3" * 8, "google": "AIza" + "aB3-" * 9,
    "slack": "xoxb-1234567890-abcdef", "jwt": "eyJ" + "abc" * 5 + "." + "def" * 5 + "." + "ghi" * 5,
    "userinfo": "https://me:swordfish@host/a.jsonl", "user alone": "https://swordfish@host/a",
    "pem": "-----BEGIN RSA PRIVATE KEY-----",
}  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_are_known_by_their_looks(name: str) -> None:
    assert is_secret(f"x {SECRETS[name]} y")
    cleaned = without_secrets(f"x {SECRETS[name]} y")
    assert SECRETS[name] not in cleaned and "swordfish" not in cleaned and cleaned.startswith("x ")


@pytest.mark.parametrize(
    "text",
    ["meta-llama/Llama-3.1-8B-Instruct", "runs/2026-01-02_a@b", "sk-learn", "hf_hub", "https://host/a@b", "me@host.org",
     "s3://bucket/key", "train[10%:20%]", "0123456789abcdef" * 3, "task-" + "a" * 40],
)  # fmt: skip
def test_what_is_none_is_left_alone(text: str) -> None:
    assert not is_secret(text) and without_secrets(text) == text


def test_no_secret_of_the_environment_is_in_a_crash_file_an_error_or_the_machines_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", None)
    canaries = {"HF_TOKEN": "canary-one-11", "WANDB_API_KEY": "canary-two-22", "DB_PASSWORD": "canary-three-33",
                "AWS_SECRET_ACCESS_KEY": "canary-four-44"}  # fmt: skip
    for key, value in canaries.items():
        monkeypatch.setenv(key, value)

    def crash(*_: object) -> None:
        local = dict(os.environ)
        raise RuntimeError(f"failed with {local['HF_TOKEN']} and {SECRETS['hf']} at {SECRETS['userinfo']}")

    monkeypatch.setattr(runs, "runs", crash)
    assert cli.main(["runs", "--json"]) == 1
    out, err = capsys.readouterr()
    (path,) = tmp_path.glob("solotune-crash-*.log")
    record = json.dumps(machine.probe().to_json())
    for text in (out, err, path.read_text(), record):
        for secret in (*canaries.values(), SECRETS["hf"], "swordfish"):
            assert secret not in text
    assert "RuntimeError" in path.read_text() and "***" in path.read_text()
    assert not {os.uname().nodename, os.path.expanduser("~")} & set(re.findall(r'"([^"]*)"', record))


# --- network


def test_local_files_need_no_network(door: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"connects: {arguments}")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    Path("a.jsonl").write_text('{"text": "abc"}\n{"text": "abd"}\n')
    assert door("a.jsonl").code in (0, 3)
    assert doctor.doctor().checks
