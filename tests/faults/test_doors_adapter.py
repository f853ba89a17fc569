"""An adapter's door: entry 96 of the corpus. What is in a run directory may have been swapped, damaged or sent by a
stranger; PEFT takes most of these with a warning or without a word.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import chat_rows

from solotune import cli
from solotune.manifest import MANIFEST, entry_at, manifest_text
from tests.faults.test_doors_model import sharded  # noqa: F401

ADAPTER = Path("run/adapter")
WEIGHTS = ADAPTER / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sharded: Path) -> Path:  # noqa: F811
    """A folder with a model and a finished run of it."""
    base = tmp_path_factory.mktemp("trained")
    shutil.copytree(sharded, base / "model")
    (base / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(8)))
    config = {
        "model_name_or_path": str(base / "model"), "dataset": str(base / "chats.jsonl"), "validation_size": 2,
        "max_length": 64, "base_precision": "fp32", "use_cpu": True, "output_dir": str(base / "run"), "lora_r": 4,
        "max_steps": 1, "num_samples": 0, "lora_target_modules": ["q_proj", "v_proj"], "max_new_tokens": 2,
    }  # fmt: skip
    (base / "run.yaml").write_text(json.dumps(config))
    assert cli.main(["train", str(base / "run.yaml")]) == 0
    return base


@pytest.fixture
def run(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "run", "run")


def seal() -> None:
    """As somebody would who wants the change to be believed: `solotune verify` is tested elsewhere."""
    files = [path for path in ADAPTER.iterdir() if path.name != MANIFEST and path.is_file()]
    (ADAPTER / MANIFEST).write_text("".join(manifest_text({path.name: entry_at(path) for path in files})))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[], None]:
    def make() -> None:
        held = load_file(WEIGHTS)
        change(held)
        save_file(held, WEIGHTS, {"format": "pt"})

    return make


def config(**values: Any) -> Callable[[], None]:
    def make() -> None:
        path = ADAPTER / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return make


def first(held: dict[str, torch.Tensor]) -> str:
    return min(held)


def halved(held: dict[str, torch.Tensor]) -> None:
    for name in [name for name in held if ".layers.1." in name]:
        del held[name]


def renamed(held: dict[str, torch.Tensor]) -> None:
    held["base_model.model.evil"] = held.pop(first(held))


def a_pickle() -> None:
    WEIGHTS.unlink()
    (ADAPTER / "adapter_model.bin").write_bytes(pickle.dumps({}))


def a_link() -> None:
    WEIGHTS.rename("elsewhere.safetensors")
    WEIGHTS.symlink_to("../../elsewhere.safetensors")


DAMAGED: dict[str, tuple[Callable[[], Any], int, str]] = {
    "r": (config(r=8), 2, "adapter_config.json: r is not that of the run"),
    "alpha": (config(lora_alpha=1.0), 2, "adapter_config.json: lora_alpha is not that of the run"),
    "rsLoRA": (config(use_rslora=True), 2, "use_rslora is not that of the run"),
    "targets": (config(target_modules=["q_proj"]), 2, "target_modules is not that of the run"),
    "targets as a pattern": (config(target_modules=".*"), 2, "target_modules is not that of the run"),
    "another method": (config(peft_type="IA3"), 2, "peft_type is not that of the run"),
    "DoRA": (config(use_dora=True), 2, "use_dora is not that of the run"),
    "auto_mapping": (
        config(auto_mapping={"base_model_class": "E", "parent_library": "evil"}),
        2,
        "auto_mapping is not",
    ),
    "megatron": (config(megatron_core="evil"), 2, "megatron_core is not that of the run"),
    "a cache file": (config(corda_config={"cache_file": "x.pt"}), 2, "corda_config is not that of the run"),
    "trained embeddings": (config(modules_to_save=["lm_head"]), 2, "modules_to_save is not that of the run"),
    "unknown key": (config(evil=1), 2, "evil is not that of the run"),
    "config cut": (
        lambda: (ADAPTER / "adapter_config.json").write_text("{"),
        2,
        "adapter_config.json, line 1: not val",
    ),
    "no config": (lambda: (ADAPTER / "adapter_config.json").unlink(), 2, "no adapter_config.json"),
    "half the keys": (tensors(halved), 2, "the adapter does not fit this model and config"),
    "a renamed key": (tensors(renamed), 2, "the adapter does not fit this model and config"),
    "a key too many": (tensors(lambda held: held.update(x=torch.zeros(1))), 2, "x is unknown"),
    "another shape": (tensors(lambda held: held.update({first(held): torch.zeros(2, 2)})), 2, "has shape (2, 2)"),
    "NaN": (tensors(lambda held: held[first(held)].view(-1)[3].fill_(float("nan"))), 2, "is not finite"),
    "infinity": (tensors(lambda held: held[first(held)].view(-1)[3].fill_(float("-inf"))), 2, "is not finite"),
    "cut": (
        lambda: WEIGHTS.write_bytes(WEIGHTS.read_bytes()[:-9]),
        5,
        "adapter_model.safetensors: the file is damaged",
    ),
    "empty": (lambda: WEIGHTS.write_bytes(b""), 5, "adapter_model.safetensors: the file is damaged"),
    "a pickle": (a_pickle, 2, "formats that can run code are not read"),
    "a link": (a_link, 2, "a link that leads out of the folder"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_96_adapters_that_are_refused(name: str, run: None, capsys: pytest.CaptureFixture[str]) -> None:
    change, code, words = DAMAGED[name]
    change()
    seal()
    capsys.readouterr()
    found = cli.main(["chat", "run", "--prompt", "twice 2"])
    shown = capsys.readouterr().err
    assert (found, words in shown, "Traceback" in shown) == (code, True, False), shown


def test_the_adapter_of_the_run_is_taken(run: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "run", "--prompt", "twice 2"]) == 0
    config(base_model_name_or_path="elsewhere", lora_dropout=0.0, eva_config=None, layers_pattern=None)()
    seal()
    assert cli.main(["chat", "run", "--prompt", "twice 2"]) == 0  # what PEFT adds when it saves, and what may differ
