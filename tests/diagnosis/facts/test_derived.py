"""Numbers that follow from settings and config.json alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import FAMILIES

from solotune.diagnosis.facts.derived import steps_of_an_epoch, weight_bytes
from solotune.diagnosis.run_facts import RankCheckpoint, Ranks, RunFacts, Settings
from solotune.diagnosis.sources import solotune_run
from solotune.planning import layer_profile, memory
from solotune.planning.model_shape import model_shape

LLAMA_3_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
PARAMETERS = 8_030_261_248
OUTSIDE = 2 * 128256 * 4096 + (2 * 32 + 1) * 4096  # embedding, head, norms


def bytes_of(**settings: object) -> int | None:
    return weight_bytes(RunFacts("test", Settings(settings), model_config=LLAMA_3_8B))


def test_a_base_with_grouped_heads_has_the_bytes_of_its_parameters():
    assert bytes_of() == 2 * PARAMETERS
    assert bytes_of(model_dtype="float32") == 4 * PARAMETERS
    quantised = bytes_of(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    assert quantised is not None
    assert quantised == pytest.approx(4.127 / 8 * (PARAMETERS - OUTSIDE) + 2 * OUTSIDE, rel=1e-3)  # QLoRA, section 3


def test_an_unknown_base_has_no_bytes():
    assert weight_bytes(RunFacts("test", Settings({}), model_config={"hidden_size": 4096, "vocab_size": 100})) is None
    assert weight_bytes(RunFacts("test", Settings({}), model_config={"model_type": "nobody_knows"})) is None


def test_all_ranks_share_the_rows_of_an_epoch():
    settings = Settings({"train_rows": 1000, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2})
    four = Ranks(checkpoints=[RankCheckpoint(10, 4)])
    assert steps_of_an_epoch(RunFacts("one", settings)) == 125
    assert steps_of_an_epoch(RunFacts("four", settings, ranks=four)) == 32
    assert steps_of_an_epoch(RunFacts("two", Settings({**settings.values, "world_size": 2}))) == 63


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_plans_number(family, tiny_config, monkeypatch):
    """Weights are counted; what layers cost is not asked for here, and looking at that takes most of the time."""
    for part in ("_layer_costs", "_outside_or_estimated"):
        monkeypatch.setattr(f"solotune.planning.model_shape.{part}", lambda *_: ())
    config = tiny_config(family, base_precision="nf4")
    shape = model_shape(config)
    files = json.loads((Path(config.model_name_or_path) / "config.json").read_text())
    run_facts = RunFacts("test", solotune_run.settings_of(config), model_config=files)
    knobs = layer_profile.MemoryStrategy("nf4", config.bnb_4bit_use_double_quant, False, 0, False, "adamw_torch", "cpu")
    assert weight_bytes(run_facts) == memory.weight_bytes(shape, knobs) + memory.quantisation_bytes(shape, knobs)
