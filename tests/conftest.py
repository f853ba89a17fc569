"""Fixtures that many tests share; no test reaches a hub.

What takes seconds to import is imported where it is used: the process that hands the tests out runs none of them, and
the others begin after it has read this file.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# this process's own: neither the user's nor that of the worker beside it
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="solotune-test-cache-")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from solotune.config.run_config import RunConfig

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _temporary_folders_have_one_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests import messages

    messages.temporary = str(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """For models this small a second thread costs more than it computes."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _plans_look_once_at_a_model() -> Iterator[None]:
    from tests import plans

    with pytest.MonkeyPatch.context() as patch:
        plans.look_once(patch)
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> a folder with a random model of it, in the clear (weights large enough that nothing is near zero)."""
    import torch
    import transformers
    from tiny import FAMILIES

    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.add_(0.05 * torch.randn_like(parameter))
                    elif parameter.eq(0).all():
                        parameter.add_(0.02 * torch.randn_like(parameter))  # biases that matter
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture
def tiny_config(model_folder: Callable[[str], Path]) -> Callable[..., RunConfig]:
    """A float32 CPU config on a tiny model; keywords change keys."""
    from solotune.config.load import load_config

    def make(family: str = "llama", **keys: object) -> RunConfig:
        plain: dict[str, object] = {
            "model_name_or_path": str(model_folder(family)),
            "dataset": "unused.jsonl",
            "max_length": 64,
            "base_precision": "fp32",
            "bf16": False,
            "use_cpu": True,
            "lora_target_modules": "all-linear",
            "lora_r": 4,
            "lora_alpha": 8.0,
            "lora_dropout": 0.0,
            "gradient_checkpointing": False,
            "torch_compile": False,
            "optim": "adamw_torch",
            "learning_rate": 1e-2,
            "seed": 0,
        }
        return load_config({**plain, **keys})

    return make


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """A random Llama with a byte tokenizer and a ChatML template."""
    import torch
    import transformers
    from tiny import FAMILIES, save_tokenizer

    folder = tmp_path_factory.mktemp("chat-model")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]()).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture
def chat_config(chat_model, tmp_path, monkeypatch):
    """Keys of a run in `tmp_path`, which becomes the working directory."""
    from tiny import SHORT_RUN, chat_rows

    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(60)))
    return {
        **SHORT_RUN,
        "model_name_or_path": str(chat_model),
        "dataset": "chats.jsonl",
        "validation_size": 10,
        "output_dir": "run",
        "learning_rate": 1e-2,
        "save_steps": 3,
        "num_samples": 2,
        "max_new_tokens": 8,
    }


LONG = (
    "planning/test_model_shape.py",
    "api/test_train.py",
    "faults/test_running_campaign.py",
    "faults/test_doors_hostile.py",
    "faults/test_running_before.py",
    "dataset/readers/test_source_hub.py",
    "diagnosis/probes/test_probes_model.py",
    "faults/test_saving.py",
    "faults/test_mutants.py",
    "docs/test_commands_run.py",
    "examples/test_quickstart.py",
    "hardware/test_gpu_errors.py",
    "training/test_preflight.py",
    "cli/test_commands.py",
    "api/test_init.py",
    "faults/test_doors_foreign.py",
)
"""Files that take long: they go first, so that none begins when the other process has nothing left to do."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection() -> Iterator[None]:
    """Nothing that is imported goes away again, and it is not looked through for garbage: that took a quarter of the
    time of a collection (6 of 27 s), went on in the tests, and had each of their forks copy what it looked at."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "export" not in config.getoption("markexpr"):
        exports = [item for item in items if "export" in item.keywords and item.get_closest_marker("export")]
        config.hook.pytest_deselected(items=exports)
        items[:] = [item for item in items if item not in exports]
    here = Path(__file__).parent
    order = {here / name: place for place, name in enumerate(LONG)}
    assert all(path.is_file() for path in order), "a file of LONG is gone"
    items.sort(key=lambda item: order.get(item.path, len(LONG)))
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))
