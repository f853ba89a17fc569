"""A trainer's folder from elsewhere: nothing outside of it is opened or asked for, nothing in it blocks, costs or crashes."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from tiny import save_tokenizer

from solotune import cli
from solotune.diagnosis.sources import hf_trainer, pickle_reader
from solotune.hub import download

OUTSIDE: list[str] = []
_watched = ""


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if "outside" in Path(path).parts:
            OUTSIDE.append(path)
    elif event in ("socket.connect", "socket.getaddrinfo"):
        OUTSIDE.append(f"{event} {arguments}")


sys.addaudithook(_hook)


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """Files below a folder `outside`, and hosts, that are opened or asked during the test."""
    global _watched
    OUTSIDE.clear()
    _watched = "yes"
    yield OUTSIDE
    _watched = ""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Path:
    """A folder with all that a trainer leaves; beside it `outside` with a model and data, which it names."""
    here = tmp_path_factory.mktemp("foreign")
    shutil.copytree(chat_model, here / "outside" / "model")
    (here / "outside" / "rows.jsonl").write_text('{"text": "x"}\n' * 9)
    out = here / "out"
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(chat_model),
        peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    model.save_pretrained(out)
    save_tokenizer(out)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(here / "outside" / "model")
    (out / "adapter_config.json").write_text(json.dumps(config))
    arguments(out, dataset_name=str(here / "outside" / "rows.jsonl"), resume_from_checkpoint=str(here / "outside"))
    history = [
        {"step": i, "loss": 2.0 / i, "learning_rate": 1e-4, "grad_norm": 1.0, "epoch": i / 5} for i in range(1, 6)
    ]
    (out / "trainer_state.json").write_text(json.dumps({"log_history": history, "max_steps": 5, "global_step": 5}))
    (out / "generation_config.json").write_text('{"eos_token_id": 2}')
    (out / "README.md").write_text("- TRL: 1.0\n")
    (out / "train.log").write_text("error: x\n")
    return out


def arguments(folder: Path, **values: Any) -> None:
    made = transformers.TrainingArguments(output_dir="x", use_cpu=True, report_to=[])
    made.__dict__.update({"completion_only_loss": None, "packing_strategy": "bfd", "max_length": 64, **values})
    torch.save(made, folder / "training_args.bin")


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "out")
    return tmp_path / "out"


# --- what it names


def test_neither_base_nor_data_that_it_names_is_opened(trained: Path, watched: list[str], capsys: Any) -> None:
    facts = hf_trainer.from_folder(trained)
    assert not facts.train and facts.live is None and not facts.model_config
    assert cli.main(["diagnose", str(trained), "--budget", "0"]) in (0, 3)
    assert watched == []
    shown = capsys.readouterr().out
    assert "not opened; give it with --base" in shown
    assert "give --dataset" in facts.missing["train"]


def test_what_the_message_advises_works(trained: Path) -> None:
    outside = trained.parent / "outside"
    facts = hf_trainer.from_folder(trained, base=str(outside / "model"), dataset=str(outside / "rows.jsonl"))
    assert facts.model_config["model_type"] == "llama" and len(facts.train) and facts.live is not None


@pytest.mark.parametrize(
    "name", ["org/evil", "evil", "../outside/rows.jsonl", "https://host/x.jsonl", "~/x", "/dev/zero"]
)
def test_no_name_of_data_reaches_the_hub_or_the_disk(
    name: str, folder: Path, watched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("solotune.dataset.readers.source._load_from_hub", lambda *a: asked.append(a) or [])
    monkeypatch.setattr(download, "download", lambda *a: asked.append(a))
    arguments(folder, dataset=name, dataset_name=name, eval_dataset=name, train_file=name, chat_template_path=name)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
    facts = hf_trainer.from_folder(folder)
    assert not asked and not watched and not facts.train
    assert facts.settings.get("eval_dataset") is None and facts.settings.get("chat_template_path") is None


def test_a_base_inside_the_folder_is_its_own(folder: Path, chat_model: Path) -> None:
    shutil.copytree(chat_model, folder / "merged")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "merged"}))
    assert hf_trainer.from_folder(folder).model_config["model_type"] == "llama"
    shutil.rmtree(folder / "merged")
    (folder / "merged").symlink_to(chat_model)
    assert hf_trainer.from_folder(folder).model_config == {}


# --- what is in it

NAMES = ["trainer_state.json", "training_args.bin", "adapter_config.json", "adapter_model.safetensors", "README.md",
         "train.log", "tokenizer_config.json", "tokenizer.json", "generation_config.json"]  # fmt: skip


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "fifo": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link out": lambda path: path.symlink_to(path.parent.parent / "outside" / path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "empty": lambda path: path.write_bytes(b""),
    "deep": lambda path: path.write_bytes(nested(5000)),
    "other": lambda path: path.write_bytes(b'["x", 1]'),
    "noise": lambda path: path.write_bytes(bytes(range(256)) * 40),
    "sparse": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.parametrize("name", NAMES)
def test_damage_of_any_kind_neither_blocks_nor_crashes(name: str, trained: Path, tmp_path: Path, watched: Any) -> None:
    (tmp_path / "outside").mkdir()
    shutil.copy(trained / name, tmp_path / "outside" / name)
    watched.clear()
    for kind, damage in DAMAGE.items():
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(trained, tmp_path / "out")
        (tmp_path / "out" / name).unlink()
        damage(tmp_path / "out" / name)
        started = time.monotonic()
        assert cli.main(["diagnose", str(tmp_path / "out"), "--budget", "0"]) in (0, 2, 3), kind
        assert time.monotonic() - started < 20 and watched == [], kind


WRONG = [None, True, -1, 1e308, "x", "\ud800", [], {}, [[1]], {"a": {"b": 1}}, 10**30]


@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_wrong_types_in_its_files_are_no_crash(value: Any, folder: Path) -> None:
    state = json.loads((folder / "trainer_state.json").read_text())
    entries = [{**entry, key: value} for entry in state["log_history"] for key in entry]
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, content in [("trainer_state.json", {**state, "log_history": entries}), ("trainer_state.json", {**state, "log_history": value, "max_steps": value, "global_step": value}),
                          ("adapter_config.json", dict.fromkeys(config, value)), ("generation_config.json", {"eos_token_id": value})]:  # fmt: skip
        before = (folder / name).read_text()
        (folder / name).write_text(json.dumps(content))
        assert cli.main(["diagnose", str(folder), "--budget", "0"]) in (0, 2, 3), name
        (folder / name).write_text(before)
    names = [field for field in transformers.TrainingArguments.__dataclass_fields__ if field != "output_dir"]
    outside = folder.parent / "rows.jsonl"
    outside.write_text('{"text": "x"}\n' * 9)
    arguments(folder, **dict.fromkeys([*names, "max_length", "packing", "packing_strategy", "dataset_kwargs",
                                       "dataset_text_field", "completion_only_loss"], value))  # fmt: skip
    assert cli.main(["diagnose", str(folder), "--budget", "0", "--dataset", str(outside)]) in (0, 2, 3)


# --- what lies beside it

BESIDE = ["trainer_log.jsonl", "nohup.out", "events.out.tfevents.1", "run-a.wandb", "args.json", "train.yaml",
          "../train.jsonl", "../sft.yaml", "../nohup.out", "../data/train.parquet", "data/dataset_info.json"]  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_logs_data_and_configs_of_any_kind_neither_block_nor_lead_out(
    name: str, trained: Path, tmp_path: Path, watched: Any
) -> None:
    here = tmp_path / "project"
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / Path(name).name).write_text('{"loss": 1.0, "step": 1}\n{"text": "x"}\n' * 9)
    for kind, damage in DAMAGE.items():
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(trained, here / "out")
        (here / "out" / "trainer_state.json").unlink()
        path = Path(os.path.normpath(here / "out" / name))
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "link out":
            path.symlink_to(tmp_path / "outside" / path.name)
        else:
            damage(path)
        watched.clear()
        started = time.monotonic()
        assert cli.main(["diagnose", str(here / "out"), "--budget", "0"]) in (0, 2, 3), kind
        assert time.monotonic() - started < 20 and watched == [], kind


def test_a_folder_that_is_a_link_is_no_place(folder: Path, watched: list[str]) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "train.jsonl").write_text('{"text": "x"}\n' * 9)
    (outside / "sft.yaml").write_text("output_dir: out\nlearning_rate: 5e-5\nlora_r: 2\n")
    (outside / "trainer_log.jsonl").write_text('{"loss": 1.0, "step": 1}\n' * 9)
    for name in ("data", "config", "runs", "wandb"):
        (folder / name).symlink_to(outside)
        if not (folder.parent / name).exists():
            (folder.parent / name).symlink_to(outside)
    arguments(folder, dataset="train.jsonl")
    watched.clear()
    facts = hf_trainer.from_folder(folder)
    assert watched == [] and not facts.train and "give --dataset" in facts.found["rows"]


@pytest.mark.parametrize("name", ["../outside/rows.jsonl", "/etc/passwd", "~/x.jsonl", "org/evil", "https://h/x.jsonl"])
def test_no_name_in_a_config_beside_or_in_a_log_is_followed(
    name: str, folder: Path, watched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("solotune.dataset.readers.source._load_from_hub", lambda *a: asked.append(a) or [])
    monkeypatch.setattr(download, "download", lambda *a: asked.append(a))
    monkeypatch.setattr(download, "cached", lambda *a: asked.append(a))
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "rows.jsonl").write_text('{"text": "x"}\n' * 9)
    (folder / "training_args.bin").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "base_model_name_or_path": name}))
    (folder / "axolotl.yaml").write_text(
        f"base_model: {name}\nlearning_rate: 1e-4\nmicro_batch_size: 1\nsequence_len: 64\nadapter: lora\n"
        f"chat_template_path: {name}\ntest_datasets:\n  - path: {name}\ndatasets:\n  - path: {name}\n    type: alpaca\n"
    )
    (folder / "data").mkdir()
    (folder / "data" / "dataset_info.json").write_text(json.dumps({name: {"file_name": "../../outside/rows.jsonl"}}))
    (folder / "data" / "a.jsonl").write_text("{}\n")
    watched.clear()
    facts = hf_trainer.from_folder(folder)
    assert not asked and not watched and not facts.train and not facts.model_config
    assert facts.settings.get("learning_rate") == 1e-4, "the config itself is read"
    outside = {
        "dataset",
        "datasets",
        "eval_dataset",
        "test_datasets",
        "base_model",
        "model_name_or_path",
        "chat_template_path",
    }
    assert not outside & {*facts.settings.values, *facts.settings.asked}


def test_thousands_of_logs_and_folders_are_read_in_part(folder: Path) -> None:
    for number in range(3000):
        (folder / f"{number}.log").write_text("{'loss': 1.0}\n")
        (folder.parent / f"run{number}").mkdir()
    started = time.monotonic()
    assert cli.main(["diagnose", str(folder), "--budget", "0"]) in (0, 3)
    assert time.monotonic() - started < 60


# --- bombs

A = b"\x80\x02c__main__\nA\n)\x81"
DOUBLED = b")\x94" + b"".join(b"h" + bytes([i, 104, i]) + b"\x86\x94" for i in range(40))
KEYS = b"".join(b"X\x06\x00\x00\x00%06d" % i + b"K\x01" for i in range(45_000))
BOMBS = {
    "a name of shared tuples": b"\x80\x04" + DOUBLED + b"h\x28h\x28\x93}\x8c\x01aK\x01sb.",
    "a class of shared tuples": b"(" + DOUBLED + b"o}U\x01aK\x01sb.",
    "45,000 keys": A + b"}(" + KEYS + b"ub.",
    "one dict, set again and again": A + b"}q\x00(" + KEYS[: 12 * 1990] + b"ub" + b"h\x00b" * 40_000 + b".",
    "a tuple of one dict": A + b"}q\x00(" + KEYS[: 12 * 1990] + b"u(" + b"h\x00" * 9000 + b"tq\x01b" + b"h\x01b" * 4000 + b".",
    "a number of a million digits": A + b"}U\x01aL" + b"9" * 900_000 + b"L\nsb.",
    "only marks": b"(" * 900_000 + b".",
    "too large": b"(" * (2 << 20),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_pickle_bombs_cost_nothing(name: str, tmp_path: Path) -> None:
    import tracemalloc

    (tmp_path / "training_args.bin").write_bytes(BOMBS[name])
    tracemalloc.start()
    started = time.process_time()
    with contextlib.suppress(pickle_reader.UnreadableError):
        pickle_reader.attributes(tmp_path / "training_args.bin")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - started < 10 and peak < 64 << 20


def test_values_that_contain_each_other_are_cut(tmp_path: Path) -> None:
    class Holder:
        pass

    made, value = Holder(), [1]
    for _ in range(40):
        value = [value, value, value]
    made.deep, made.long, made.big, made.kept = value, "x" * 100_000, 1 << 4000, 3  # type: ignore[attr-defined]
    made.loop = loop = []  # type: ignore[attr-defined]
    loop.append(loop)
    globals()["Holder"] = Holder
    Holder.__qualname__ = "Holder"
    (tmp_path / "a.bin").write_bytes(pickle.dumps(made))
    _, found = pickle_reader.attributes(tmp_path / "a.bin")
    assert found["kept"] == 3 and "long" not in found and "big" not in found and len(repr(found)) < 1_000_000
