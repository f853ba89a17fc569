"""Exports of runs that were trained on CUDA, in NF4, fp8 and bf16: proven there, and merged on the CPU too.

sh scripts/test -n 0 -m gpu tests/gpu/test_export.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import solotune
from solotune.exporters.base_tensors import BaseTensors
from solotune.exporters.merge import DEQUANTIZED, ORIGINAL, Merge
from solotune.exporters.source import open_source
from tests.exporters.conftest import export_base, run, train

__all__ = ["export_base", "run", "train"]
pytestmark = pytest.mark.gpu
BASES = {"nf4": DEQUANTIZED, "fp8": DEQUANTIZED, "bf16": ORIGINAL}


@pytest.fixture(scope="module", params=BASES)
def trained(request: Any, train: Any) -> tuple[str, Path]:
    """(precision, a run of a few steps on CUDA)."""
    keys = {"use_cpu": False, "bf16": True, "base_precision": request.param, "torch_compile": False}
    return request.param, train(**keys)


def test_an_export_is_what_was_trained_on_the_card(trained: tuple[str, Path], tmp_path: Path, capsys: Any) -> None:
    precision, folder = trained
    shutil.copytree(folder, tmp_path / "run")
    result = solotune.export(tmp_path / "run")
    with capsys.disabled():
        print(f"\n{precision}: {result.merge}")
        for one in result.artifacts:
            print(one.kind, one.parity, one.problems, one.notes)
    assert result.ok, [one.problems for one in result.artifacts]
    assert result.merge is not None and result.merge["into"] == BASES[precision]
    assert solotune.verify(tmp_path / "run").ok


def test_a_merge_on_the_cpu_differs_from_that_on_the_card_by_rounding(trained: tuple[str, Path]) -> None:
    precision, folder = trained
    source = open_source(folder)
    tensors = BaseTensors.of(source.base, source.config)
    on_card = Merge.of(source, BASES[precision], torch.bfloat16)
    assert on_card.device.type == "cuda"
    on_cpu = replace(on_card, device=torch.device("cpu"))
    different = beyond = total = 0
    found: list[str] = []
    for tensor in tensors.weights:
        one, other = on_card.weight(tensor).float(), on_cpu.weight(tensor).float()
        differs, far = one != other, ~torch.isclose(one, other, rtol=2**-7, atol=1e-6)  # one rounding to bfloat16
        different, beyond, total = different + int(differs.sum()), beyond + int(far.sum()), total + one.numel()
        if far.any():
            found.append(
                f"{tensor.key}: {int(differs.sum())} differ, {int(far.sum())} by more: {_kinds(one, other, far)}"
            )
    said = f"{precision}: {different:,} of {total:,} differ, {beyond:,} by more than a rounding\n" + "\n".join(found)
    assert beyond == 0, said
    assert different <= 1e-2 * total, said


def _kinds(one: torch.Tensor, other: torch.Tensor, far: torch.Tensor) -> str:
    """How far two merges are apart where they are: by one code of e4m3 (6 to 13 %) or of NF4, or by anything else."""
    apart = ((one - other).abs() / torch.maximum(one.abs(), other.abs()))[far]
    row, column = (int(place) for place in far.nonzero()[0])
    rows = len(far.any(1).nonzero())
    return (
        f"{int((apart < 0.06).sum())} below 6 %, {int(((apart >= 0.06) & (apart <= 0.13)).sum())} by 6 to 13 %, "
        f"{int((apart > 0.13).sum())} above, in {rows} rows; the first at ({row}, {column}): "
        f"{one[row, column]:.9g} on the card, {other[row, column]:.9g} on the CPU"
    )


def test_a_run_of_the_card_is_exported_on_a_machine_without_one(trained: tuple[str, Path], tmp_path: Path) -> None:
    precision, folder = trained
    shutil.copytree(folder, tmp_path / "run")
    command = [sys.executable, "-m", "solotune", "export", str(tmp_path / "run"), "--to", "merged"]
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "run/export/export.json").read_text())
    assert written["ok"] and written["merge"]["into"] == BASES[precision]
