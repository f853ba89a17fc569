"""Which files are a model's weights: shards with and without an index, and folders that two readers would read apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot
from safetensors.torch import load_file, save_file

from solotune.errors import InputError
from solotune.model.loading import load_model
from solotune.model.weight_files import weight_files
from tests.messages import stable

CPU = torch.device("cpu")
WHOLE = "model.safetensors"


def shards(folder: Path, count: int = 3, pattern: str = "model-{:05}-of-{:05}.safetensors") -> None:
    """Split model.safetensors into shards, without an index."""
    tensors = load_file(folder / WHOLE)
    names = sorted(tensors)
    for number in range(count):
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, folder / pattern.format(number + 1, count), {"format": "pt"})
    (folder / WHOLE).unlink()


def index(folder: Path) -> None:
    names = {name: path.name for path in folder.glob("model-*.safetensors") for name in load_file(path)}
    (folder / f"{WHOLE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.fixture
def folder(model_folder, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


@pytest.mark.parametrize("pattern", ["model-{:05}-of-{:05}.safetensors", "model-{}.safetensors"])
def test_shards_without_an_index_are_the_model(pattern, folder, tiny_config, model_folder):
    whole = load_model(tiny_config(), CPU, torch.float32).module.state_dict()
    shards(folder, pattern=pattern)
    assert len(weight_files(folder)) == 3
    model = load_model(tiny_config(model_name_or_path=str(folder)), CPU, torch.float32)
    assert [choice.key for choice in model.choices] == []
    found = model.module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items() if "lora" not in name)


def test_other_safetensors_are_named(folder, tiny_config):
    save_file({"x": torch.zeros(1)}, folder / "consolidated.safetensors")
    (choice,) = load_model(tiny_config(model_name_or_path=str(folder)), CPU, torch.float32).choices
    assert tuple(choice) == snapshot(
        ("files not read", "consolidated.safetensors", "the weights are in model.safetensors")
    )


def both(folder: Path) -> None:
    shutil.copy(folder / WHOLE, folder / "copy")
    shards(folder)
    (folder / "copy").rename(folder / WHOLE)


def without(name: str):
    def change(folder: Path) -> None:
        shards(folder)
        (folder / name).unlink()

    return change


def two_sets(folder: Path) -> None:
    shutil.copy(folder / WHOLE, folder / "copy")
    shards(folder, 2)
    (folder / "copy").rename(folder / WHOLE)
    shards(folder, 3)


def twice(folder: Path) -> None:
    shards(folder)
    path = folder / "model-00002-of-00003.safetensors"
    save_file({**load_file(path), "lm_head.weight": torch.zeros(128, 64)}, path)


def with_index(change):
    def do(folder: Path) -> None:
        shards(folder)
        index(folder)
        change(folder)

    return do


AMBIGUOUS = {
    "a whole model and shards": (both, snapshot("""\
<tmp>/model: two sets of weights
  seen:    model.safetensors, and model-00001-of-00003.safetensors, model-00002-of-00003.safetensors, model-00003-of-00003.safetensors
  allowed: one set; transformers would read the first, another program the second
  change:  move model.safetensors, or the other files and model.safetensors.index.json, out of the folder\
""")),
    "a whole model and an index": (lambda f: (both(f), index(f)), snapshot("""\
<tmp>/model: two sets of weights
  seen:    model.safetensors, and model-00001-of-00003.safetensors, model-00002-of-00003.safetensors, model-00003-of-00003.safetensors
  allowed: one set; transformers would read the first, another program the second
  change:  move model.safetensors, or the other files and model.safetensors.index.json, out of the folder\
""")),
    "a part is missing": (without("model-00002-of-00003.safetensors"), snapshot("""\
<tmp>/model: a weight file is missing
  seen:    no part 2 of 3
  change:  download the folder again\
""")),
    "a part of the index is missing": (
        with_index(lambda f: (f / "model-00002-of-00003.safetensors").unlink()), snapshot("""\
<tmp>/model: a weight file is missing
  seen:    model-00002-of-00003.safetensors
  change:  download the folder again\
""")),
    "parts of two sets": (two_sets, snapshot("""\
<tmp>/model: parts of several sets of weights, and no model.safetensors.index.json that says which belong together
  seen:    model-00001-of-00002.safetensors, model-00001-of-00003.safetensors, model-00002-of-00002.safetensors and 2 more
  allowed: model.safetensors, or model-00001-of-00002.safetensors, model-00002-of-00002.safetensors
  change:  keep the files of one set, or download the folder again\
""")),
    "a tensor in two shards": (twice, snapshot("""\
<tmp>/model/model-00002-of-00003.safetensors: contains a tensor that is also in model-00001-of-00003.safetensors
  seen:    lm_head.weight\
""")),
    "another name": (lambda f: (f / WHOLE).rename(f / "model.fp16.safetensors"), snapshot("""\
<tmp>/model: no weights under transformers' names
  seen:    model.fp16.safetensors
  allowed: model.safetensors, or model-00001-of-00002.safetensors, model-00002-of-00002.safetensors
  change:  rename it to model.safetensors if its tensors have transformers' names\
""")),
    "an adapter beside the model": (lambda f: (f / "adapter_config.json").write_text("{}"), snapshot("""\
<tmp>/model: contains an adapter next to the model
  seen:    adapter_config.json, which transformers would load into the model
  allowed: only the model
  change:  move adapter_config.json out of the folder, or merge the adapter into the model with PEFT\
""")),
    "an adapter alone": (
        lambda f: ((f / WHOLE).rename(f / "adapter_model.safetensors"), (f / "adapter_config.json").write_text("{}")),
        snapshot("""\
<tmp>/model: no weights in safetensors
  seen:    adapter_model.safetensors
  allowed: *.safetensors; formats that can run code are not read
  change:  this is an adapter: use its base model, base_model_name_or_path in adapter_config.json\
"""),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_a_folder_without_one_set_of_weights_is_refused(case, folder):
    change, message = AMBIGUOUS[case]
    change(folder)
    with pytest.raises(InputError) as caught:
        weight_files(folder)
    assert stable(caught.value) == message
