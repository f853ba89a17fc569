"""A tiny model trained for a few steps in 4 bits: what the tests of exports export."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tiny import FAMILIES, SHORT_RUN, chat_rows, save_tokenizer

import solotune
from solotune.display.progress import SilentDisplay
from solotune.exporters import served_ids, template_parity

LLAMA = {**FAMILIES["llama"]().to_dict(), "intermediate_size": 128}  # bitsandbytes' CPU kernel wants multiples of 64


@pytest.fixture(scope="session")
def export_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bfloat16 with a tokenizer; weights are large, so that 4 bits change what it says."""
    folder = tmp_path_factory.mktemp("user-name") / "the-base"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**LLAMA))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.08 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def train(export_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Train a run of a few steps; keywords change keys."""

    def run(**keys: object) -> Path:
        folder = tmp_path_factory.mktemp("run")
        system = {"role": "system", "content": "Be exact."}
        rows = [{"messages": [system, *row["messages"]]} for row in chat_rows(40)]  # type: ignore[misc]
        (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        plain = {
            **SHORT_RUN,
            "model_name_or_path": str(export_base),
            "dataset": str(folder / "chats.jsonl"),
            "validation_size": 8,
            "output_dir": str(folder / "run"),
            "learning_rate": 3e-2,
            "warmup_steps": 0,
            "num_samples": 0,
            "save_strategy": "no",
        }
        before = os.getcwd()
        solotune.train({**plain, **keys}, display=SilentDisplay())
        assert os.getcwd() == before
        return folder / "run"

    return run


@pytest.fixture(scope="session")
def run(train: Callable[..., Path]) -> Path:
    """A finished run; tests export with `out`, or copy it."""
    return train()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that makes the ids of an exported folder without its process, whose imports take seconds.

    tests/api/test_export.py and one test of tests/exporters/test_template_parity.py start the process.
    """

    def run(command: list[str], input: bytes, **_: object) -> subprocess.CompletedProcess[bytes]:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as written:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(input)))
            try:
                served_ids.main(command[-1])
            except ValueError as error:
                return subprocess.CompletedProcess(command, 1, b"", f"Traceback\n{error}".encode())
        return subprocess.CompletedProcess(command, 0, written.getvalue().encode(), b"")

    asked = SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(template_parity, "subprocess", asked)
