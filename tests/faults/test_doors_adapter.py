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
from inline_snapshot import snapshot
from safetensors.torch import load_file, save_file
from tiny import chat_rows

from solotune import cli
from solotune.run.manifest import MANIFEST, entry_at, manifest_text
from tests.messages import error_in

ADAPTER = Path("run/adapter")
WEIGHTS = ADAPTER / "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, sharded: Path) -> Path:
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
    "r": (
        config(r=8),
        2,
        snapshot("""\
run/adapter/adapter_config.json: r differs from the run's config
  seen:    r: 8
  allowed: r: 4
  change:  restore the adapter of this run\
"""),
    ),
    "alpha": (
        config(lora_alpha=1.0),
        2,
        snapshot("""\
run/adapter/adapter_config.json: lora_alpha differs from the run's config
  seen:    lora_alpha: 1.0
  allowed: lora_alpha: 32.0
  change:  restore the adapter of this run\
"""),
    ),
    "rsLoRA": (
        config(use_rslora=True),
        2,
        snapshot("""\
run/adapter/adapter_config.json: use_rslora differs from the run's config
  seen:    use_rslora: true
  allowed: use_rslora: false
  change:  restore the adapter of this run\
"""),
    ),
    "targets": (
        config(target_modules=["q_proj"]),
        2,
        snapshot("""\
run/adapter/adapter_config.json: target_modules differs from the run's config
  seen:    target_modules: ["q_proj"]
  allowed: target_modules: ["q_proj", "v_proj"]
  change:  restore the adapter of this run\
"""),
    ),
    "targets as a pattern": (
        config(target_modules=".*"),
        2,
        snapshot("""\
run/adapter/adapter_config.json: target_modules differs from the run's config
  seen:    target_modules: ".*"
  allowed: target_modules: ["q_proj", "v_proj"]
  change:  restore the adapter of this run\
"""),
    ),
    "another method": (
        config(peft_type="IA3"),
        2,
        snapshot("""\
run/adapter/adapter_config.json: peft_type differs from the run's config
  seen:    peft_type: "IA3"
  allowed: peft_type: "LORA"
  change:  restore the adapter of this run\
"""),
    ),
    "DoRA": (
        config(use_dora=True),
        2,
        snapshot("""\
run/adapter/adapter_config.json: use_dora differs from the run's config
  seen:    use_dora: true
  allowed: plain LoRA
  change:  restore the adapter of this run\
"""),
    ),
    "auto_mapping": (
        config(auto_mapping={"base_model_class": "E", "parent_library": "evil"}),
        2,
        snapshot("""\
run/adapter/adapter_config.json: auto_mapping differs from the run's config
  seen:    auto_mapping: {"base_model_class": "E", "parent_library": "evil"}
  allowed: plain LoRA
  change:  restore the adapter of this run\
"""),
    ),
    "megatron": (
        config(megatron_core="evil"),
        2,
        snapshot("""\
run/adapter/adapter_config.json: megatron_core differs from the run's config
  seen:    megatron_core: "evil"
  allowed: plain LoRA
  change:  restore the adapter of this run\
"""),
    ),
    "a cache file": (
        config(corda_config={"cache_file": "x.pt"}),
        2,
        snapshot("""\
run/adapter/adapter_config.json: corda_config differs from the run's config
  seen:    corda_config: {"cache_file": "x.pt"}
  allowed: plain LoRA
  change:  restore the adapter of this run\
"""),
    ),
    "trained embeddings": (
        config(modules_to_save=["lm_head"]),
        2,
        snapshot("""\
run/adapter/adapter_config.json: modules_to_save differs from the run's config
  seen:    modules_to_save: ["lm_head"]
  allowed: plain LoRA
  change:  restore the adapter of this run\
"""),
    ),
    "unknown key": (
        config(evil=1),
        2,
        snapshot("""\
run/adapter/adapter_config.json: evil differs from the run's config
  seen:    evil: 1
  allowed: plain LoRA
  change:  restore the adapter of this run\
"""),
    ),
    "config cut": (
        lambda: (ADAPTER / "adapter_config.json").write_text("{"),
        2,
        snapshot("""\
run/adapter/adapter_config.json, line 1: not valid JSON
  seen:    Expecting property name enclosed in double quotes\
"""),
    ),
    "no config": (
        lambda: (ADAPTER / "adapter_config.json").unlink(),
        2,
        snapshot("""\
run/adapter: no adapter_config.json
  allowed: an adapter that solotune or PEFT wrote\
"""),
    ),
    "half the keys": (
        tensors(halved),
        2,
        snapshot("""\
run/adapter: the adapter does not fit this model and config
  seen:    base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight is missing
  allowed: 8 tensors such as base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight\
"""),
    ),
    "a renamed key": (
        tensors(renamed),
        2,
        snapshot("""\
run/adapter: the adapter does not fit this model and config
  seen:    base_model.model.evil is unknown
  allowed: 8 tensors such as base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight\
"""),
    ),
    "a key too many": (
        tensors(lambda held: held.update(x=torch.zeros(1))),
        2,
        snapshot("""\
run/adapter: the adapter does not fit this model and config
  seen:    x is unknown
  allowed: 8 tensors such as base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight\
"""),
    ),
    "another shape": (
        tensors(lambda held: held.update({first(held): torch.zeros(2, 2)})),
        2,
        snapshot("""\
run/adapter: the adapter does not fit this model and config
  seen:    base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight has shape (2, 2)
  allowed: shape (4, 64)\
"""),
    ),
    "NaN": (
        tensors(lambda held: held[first(held)].view(-1)[3].fill_(float("nan"))),
        2,
        snapshot("""\
run/adapter/adapter_model.safetensors: tensor base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is not finite
  seen:    1 of 256 numbers are NaN or infinite
  change:  download the folder again, or use another model\
"""),
    ),
    "infinity": (
        tensors(lambda held: held[first(held)].view(-1)[3].fill_(float("-inf"))),
        2,
        snapshot("""\
run/adapter/adapter_model.safetensors: tensor base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is not finite
  seen:    1 of 256 numbers are NaN or infinite
  change:  download the folder again, or use another model\
"""),
    ),
    "cut": (
        lambda: WEIGHTS.write_bytes(WEIGHTS.read_bytes()[:-9]),
        5,
        snapshot("""\
run/adapter/adapter_model.safetensors: the file is damaged
  seen:    Error while deserializing: incomplete metadata, file not fully covered
  change:  use an older checkpoint\
"""),
    ),
    "empty": (
        lambda: WEIGHTS.write_bytes(b""),
        5,
        snapshot("""\
run/adapter/adapter_model.safetensors: the file is damaged
  seen:    Error while deserializing: header too small
  change:  use an older checkpoint\
"""),
    ),
    "a pickle": (
        a_pickle,
        2,
        snapshot("""\
run/adapter: no adapter in safetensors
  seen:    adapter_model.bin
  allowed: adapter_model.safetensors; formats that can run code are not read\
"""),
    ),
    "a link": (
        a_link,
        2,
        snapshot("""\
run/adapter/adapter_model.safetensors: a link to a file outside the folder
  seen:    <tmp>/elsewhere.safetensors
  allowed: files in the folder itself, and links of the hub's cache
  change:  copy the file into the folder\
"""),
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_96_adapters_that_are_refused(name: str, run: None, capsys: pytest.CaptureFixture[str]) -> None:
    change, code, message = DAMAGED[name]
    change()
    seal()
    capsys.readouterr()
    found = cli.main(["chat", "run", "--prompt", "twice 2"])
    shown = capsys.readouterr().err
    assert error_in(shown) == message
    assert found == code and "Traceback" not in shown


def test_the_adapter_of_the_run_is_taken(run: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", "run", "--prompt", "twice 2"]) == 0
    config(base_model_name_or_path="elsewhere", lora_dropout=0.0, eva_config=None, layers_pattern=None)()
    seal()
    assert cli.main(["chat", "run", "--prompt", "twice 2"]) == 0  # what PEFT adds when it saves, and what may differ
