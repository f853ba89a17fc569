"""`solotune export` from start to end: what is written, what is refused, what verify says afterwards."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

import solotune
from solotune.cli.commands import solotune as command_line
from solotune.errors import CheckError, DirectoryInUseError, InputError
from solotune.exporters import export_folder, export_plan, merge_choice, parity, write_artifacts
from solotune.exporters.artifact import Parity
from solotune.exporters.source import open_source
from solotune.hardware.ram import Ram
from solotune.model.adapter import Adapter
from solotune.run import atomic_io
from solotune.run.manifest import check_folder
from tests.exporters.conftest import export_base, run, train

__all__ = ["export_base", "run", "train"]
IDS = torch.arange(3, 60)[None]


@pytest.fixture
def copied(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, to write into; without the comparisons that take long: `exported` has them."""
    equal = Parity("transformers", token_ids_equal=True, conversations=1)
    monkeypatch.setattr(write_artifacts, "folder_parity", lambda *_: (equal, []))
    monkeypatch.setattr(parity, "find_spec", lambda name: None)  # no PEFT
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A copy of the run with its exports, and the result."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    shutil.copytree(run, folder)
    return folder, solotune.export(folder)


def test_adapter_and_merged_model_are_what_was_trained(exported: tuple[Path, Any]) -> None:
    folder, result = exported
    assert result.ok and result.folder == folder / "export"
    assert [(one.kind, [p.engine for p in one.parity]) for one in result.artifacts] == [
        ("adapter", ["peft"]),
        ("merged", ["transformers"]),
    ]
    for one in result.artifacts:
        assert one.parity[0].mean_kl < 1e-4 and one.parity[0].top1_agreement == 1.0
        assert one.parity[0].token_ids_equal and one.parity[0].conversations >= 200
        assert check_folder(one.path) == [] and one.bytes > 1000 and one.problems == []
    assert {choice.key: choice.value for choice in result.choices} == {
        "rows compared": 8, "dtype": "bf16", "merge_into": "dequantized",
    }  # fmt: skip
    written = json.loads((folder / "export/export.json").read_text())
    assert written["ok"] and [one["path"] for one in written["artifacts"]] == ["adapter", "merged"]
    assert str(folder) not in json.dumps(written["artifacts"])
    assert 'id="export"' in (folder / "report.html").read_text()
    for table in (result._repr_html_(), repr(result)):
        assert "merged" in table


def test_the_exported_adapter_names_no_path_and_the_run_s_loads_by_itself(
    exported: tuple[Path, Any], export_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, result = exported
    for path in (folder / "export/adapter").iterdir():
        assert b"user-name" not in path.read_bytes(), path.name
    config = Adapter.read(folder / "export/adapter").config
    assert config["base_model_name_or_path"] == "./the-base" and "./the-base" in result.artifacts[0].notes[0]
    monkeypatch.chdir(tmp_path)  # the run's adapter is found from anywhere, the exported one beside its base
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float32)
    monkeypatch.chdir(export_base.parent)
    again = AutoPeftModelForCausalLM.from_pretrained(folder / "export/adapter", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(theirs(IDS).logits, again(IDS).logits)
        assert not torch.equal(theirs(IDS).logits, AutoModelForCausalLM.from_pretrained(export_base)(IDS).logits)


def test_verify_knows_exports(exported: tuple[Path, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exported[0], run)
    assert solotune.verify(run).problems == []
    weights = run / "export/merged/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (run / "export/extra").mkdir()
    names = [problem.file for problem in solotune.verify(run).problems]
    assert names == ["export/extra/manifest.json", "export/merged/model.safetensors"]
    shutil.rmtree(run / "export/extra")
    with atomic_io.whole_folder(run / "export/merged") as other:  # another folder that is whole in itself
        other.write("config.json", "{}")
    assert [p.file for p in solotune.verify(run).problems] == ["export/merged/manifest.json"]
    shutil.rmtree(run / "export/merged")
    assert solotune.verify(run).problems == []
    (run / "export/export.json").write_text("{}")
    assert [problem.file for problem in solotune.verify(run).problems] == ["export/export.json"]
    shutil.rmtree(run / "export")
    assert solotune.verify(run).problems == []


def test_nothing_is_overwritten_and_a_second_export_adds_to_the_first(copied: Path, tmp_path: Path) -> None:
    solotune.export(copied, "adapter")
    before = (copied / "export/adapter/manifest.json").read_bytes()
    with pytest.raises(InputError, match="export/adapter exists already") as caught:
        solotune.export(copied)
    assert "rm -r" in str(caught.value.change) and not (copied / "export/merged").exists()
    solotune.export(copied, ["merged"])
    written = json.loads((copied / "export/export.json").read_text())
    assert [one["kind"] for one in written["artifacts"]] == ["adapter", "merged"]
    assert (copied / "export/adapter/manifest.json").read_bytes() == before
    assert solotune.verify(copied).ok
    result = solotune.export(copied, "adapter", out=tmp_path / "elsewhere")
    assert result.folder == tmp_path / "elsewhere" and (tmp_path / "elsewhere/adapter").is_dir()


def test_vllm_is_a_check_of_what_is_there(copied: Path) -> None:
    (artifact,) = solotune.export(copied, "adapter").artifacts
    assert artifact.next_commands == []
    (served,) = solotune.export(copied, "vllm").artifacts
    assert served.path == copied / "export/adapter" and "vLLM itself was not run" in served.notes[0]
    assert "--enable-lora" in served.next_commands[0]
    written = json.loads((copied / "export/export.json").read_text())
    assert [(one["kind"], one["path"]) for one in written["artifacts"]] == [("adapter", "adapter"), ("vllm", "adapter")]
    assert solotune.verify(copied).ok


def test_what_is_made_of_the_merged_model_has_it_written_first(copied: Path, tmp_path: Path) -> None:
    plan = export_plan.checked(open_source(copied), tmp_path / "out", ["vllm"], None, None, ["f16"])
    assert plan.kinds == ["merged", "vllm"] and plan.choices[0].value == "written too"
    assert plan.sizes.keys() == {"merged"} and plan.sizes["merged"] > 100_000


def test_an_adapter_that_was_trained_further_is_not_mixed_with_earlier_exports(copied: Path) -> None:
    solotune.export(copied, "adapter")
    path = copied / "export/export.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "adapter_sha256": "0" * 64}))
    with pytest.raises(InputError, match="were made of another adapter"):
        solotune.export(copied, "merged")


def test_a_full_disk_is_said_before_anything_is_written(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_folder, "free_bytes", lambda _: 50_000)
    with pytest.raises(CheckError, match="does not fit on the disk") as caught:
        solotune.export(copied)
    assert "merged" in str(caught.value.seen) and "--out" in str(caught.value.change)
    assert not (copied / "export").exists()


def test_two_exports_do_not_write_into_one_folder(copied: Path) -> None:
    (copied / "export").mkdir()
    handle = atomic_io.take_lock(copied / "export/.lock", "another")
    assert handle is not None
    try:
        with pytest.raises(DirectoryInUseError, match="another export is writing there"):
            solotune.export(copied, "adapter")
    finally:
        os.close(handle)


def test_what_is_not_what_was_trained_is_a_problem_with_exit_code_3(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_choice, "MEAN_KL", 1e-12)
    monkeypatch.setattr(merge_choice.beyond, "__defaults__", (1e-12, 0.99))
    found = CliRunner().invoke(command_line, ["export", str(copied), "--to", "merged"])
    assert found.exit_code == 3 and "this is not what was trained" in found.output
    assert not json.loads((copied / "export/export.json").read_text())["ok"]


def test_what_cannot_be_compared_is_said(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "ram", lambda: Ram(0, 1000))
    result = solotune.export(copied)
    assert result.ok and [[p.mean_kl for p in one.parity] for one in result.artifacts] == [[None], [None]]
    assert "pip install peft" in result.artifacts[0].notes[-1] and "not loaded again" in result.artifacts[1].notes[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"to": "merged,onnx"}, "--to: onnx is not known"),
        ({"to": ""}, "--to: nothing is named"),
        ({"to": "gguf", "quantization": "q9"}, "quantization: 'q9' is not made here"),
        ({"dtype": "fp8"}, "--dtype: fp8 is not known"),
        ({"merge_into": "nf4"}, "--merge-into: nf4 is not known"),
        ({"base_precision": "int8"}, "--base-precision: int8 is not known"),
        ({"out": __file__}, "is a file"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], words: str, run: Path) -> None:
    with pytest.raises(InputError, match=words):
        solotune.export(run, **arguments)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run directory"):
        solotune.export(tmp_path)


def test_the_command_prints_what_fits_60_columns(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    found = CliRunner().invoke(command_line, ["export", str(copied)])
    assert found.exit_code == 0, found.output
    tables = [line.rstrip() for line in found.output.splitlines() if line.startswith(" ")]
    assert len(tables) >= 8 and max(map(len, tables)) <= 60
    assert "exported as it was trained" in found.output
