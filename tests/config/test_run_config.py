"""The config's door: sources, suggestions, and every kind of mistake in the user's own words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from inline_snapshot import snapshot

from solotune.config.describe import allowed_values, field_help, section_of
from solotune.config.key_aliases import FOREIGN_KEYS
from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.config.write import to_yaml
from solotune.errors import InputError
from tests.messages import stable

MINIMAL = {"model_name_or_path": "m", "dataset": "d.jsonl"}


def message(source, overrides=()):
    with pytest.raises(InputError) as caught:
        load_config(source, overrides)
    return stable(caught.value)


@pytest.fixture
def written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text):
        Path("run.yaml").write_text(text)
        return "run.yaml"

    return write


def test_defaults_are_the_walkthroughs_recipe_and_the_shipped_file_says_the_same():
    shipped = load_config(Path(__file__).parents[2] / "examples" / "walkthrough.yaml")
    defaults = load_config({**MINIMAL, "model_name_or_path": shipped.model_name_or_path})
    same = set(RunConfig.model_fields) - {"model_name_or_path", "dataset", "dataset_split", "bnb_4bit_compute_dtype"}
    same -= {"gradient_checkpointing"}  # the file says true; the default asks the plan
    assert {key: getattr(shipped, key) for key in same} == {key: getattr(defaults, key) for key in same}
    assert (shipped.dataset, shipped.dataset_split) == ("HuggingFaceH4/ultrachat_200k", "train_sft[:5000]")


def test_every_value_knows_where_it_came_from(written):
    config = load_config(written("model_name_or_path: m\ndataset: d.jsonl\n\nlora_r: 8\n"), ["learning_rate=1e-5"])
    assert config.source_of("lora_r") == "run.yaml line 4"
    assert config.source_of("learning_rate") == "command line"
    assert config.source_of("seed") == "default"
    assert config.name == "run"


def test_a_saved_config_loads_as_the_same_config(written):
    for keys in (
        {},
        {"save_steps": 5, "eval_steps": 2},
        {"eval_dataset": ["a.jsonl", "b.jsonl"]},
        {"learning_rate": 1e-9},
        {"column_mapping": {"question": "prompt", "a: b": "completion", "x": "ignore", "y": "ignore"}},
    ):
        config = load_config({**MINIMAL, **keys})
        again = load_config(written(to_yaml(config)))
        assert again.model_dump() == config.model_dump()
    assert "learning_rate: 0.0002  # default" in to_yaml(load_config(MINIMAL))


def test_numbers_are_yaml_1_2(written):
    config = load_config(written("model_name_or_path: m\ndataset: d\nlearning_rate: 2e-4\nlora_alpha: 16\n"))
    assert (config.learning_rate, config.lora_alpha) == (2e-4, 16.0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "lora_r: 0",
            snapshot(
                """\
run.yaml line 3, lora_r: 0 (int) is not allowed; allowed: a whole number, at least 1, at most 65,536; this is F62 (solotune explain F62)
  change:  lora_r: 16\
"""
            ),
        ),
        (
            "lora_r: true",
            snapshot(
                "run.yaml line 3, lora_r: True (bool) is not allowed; allowed: a whole number, at least 1, at most 65,536"
            ),
        ),
        (
            "lora_r: '16'",
            snapshot(
                "run.yaml line 3, lora_r: '16' (str) is not allowed; allowed: a whole number, at least 1, at most 65,536"
            ),
        ),
        (
            "learning_rate: .nan",
            snapshot(
                "run.yaml line 3, learning_rate: nan (float) is not allowed; allowed: a number, above 0, at most 1"
            ),
        ),
        ("bf16: yes", snapshot("run.yaml line 3, bf16: 'yes' (str) is not allowed; allowed: true or false")),
        (
            "optim: sgd",
            snapshot(
                "run.yaml line 3, optim: 'sgd' (str) is not allowed; allowed: paged_adamw_8bit, adamw_8bit, paged_adamw_32bit, adamw_torch"
            ),
        ),
        (
            "lora_target_modules: 7",
            snapshot(
                "run.yaml line 3, lora_target_modules: 7 (int) is not allowed; allowed: a list of names, or all-linear"
            ),
        ),
        (
            "lora_target_modules: []",
            snapshot(
                """\
run.yaml line 3, lora_target_modules: [] (list) is not allowed; allowed: a list of names, or all-linear; this is F56 (solotune explain F56)
  change:  lora_target_modules: all-linear\
"""
            ),
        ),
        (
            "validation_size: 1.5",
            snapshot(
                "run.yaml line 3, validation_size: 1.5 (float) is not allowed; allowed: a fraction, at least 0 and below 1 (0.05), or a whole number of rows (200)"
            ),
        ),
        (
            "overflow: cut",
            snapshot("run.yaml line 3, overflow: 'cut' (str) is not allowed; allowed: truncate, drop, split, error"),
        ),
        (
            "column_mapping: {question: promt}",
            snapshot(
                "run.yaml line 3, column_mapping: {'question': 'promt'} (dict) is not allowed; allowed: `your column: name`, each name at most once (`ignore`: any number of times); names: messages, conversations, instruction, input, output, prompt, completion, text, system, tools, history, reasoning_content, id, conversation_id, parent_id, weight, train, ignore"
            ),
        ),
        (
            "column_mapping: {a: prompt, b: prompt}",
            snapshot(
                "run.yaml line 3, column_mapping: {'a': 'prompt', 'b': 'prompt'} (dict) is not allowed; allowed: `your column: name`, each name at most once (`ignore`: any number of times); names: messages, conversations, instruction, input, output, prompt, completion, text, system, tools, history, reasoning_content, id, conversation_id, parent_id, weight, train, ignore"
            ),
        ),
        (
            "column_mapping: {a: 3}",
            snapshot(
                "run.yaml line 3, column_mapping: {'a': 3} (dict) is not allowed; allowed: `your column: name`, each name at most once (`ignore`: any number of times); names: messages, conversations, instruction, input, output, prompt, completion, text, system, tools, history, reasoning_content, id, conversation_id, parent_id, weight, train, ignore"
            ),
        ),
        (
            "mask_history: true",
            snapshot(
                """\
run.yaml line 3, mask_history: unknown key; did you mean train_on_last_turn? (Compute the loss only on the last assistant turn of each row.)
  change:  train_on_last_turn: true\
"""
            ),
        ),
        (
            "max_steps: 0",
            snapshot(
                "run.yaml line 3, max_steps: 0 (int) is not allowed; allowed: -1 (use num_train_epochs) or a whole number, at least 1"
            ),
        ),
        (
            "learning_rte: 1",
            snapshot("""\
run.yaml line 3, learning_rte: unknown key; did you mean learning_rate? (Peak learning rate.)
  change:  learning_rate: 1\
"""),
        ),
        ("zzz: 1", snapshot("run.yaml line 3, zzz: unknown key")),
        (
            "trust_remote_code: true",
            snapshot(
                "run.yaml line 3, trust_remote_code: solotune never runs code that comes with a model or a dataset; remove the line"
            ),
        ),
        ("save_strategy: steps", snapshot("save_strategy: steps needs save_steps")),
        (
            "load_in_4bit: false",
            snapshot("""\
run.yaml line 3: load_in_4bit is only an alias for base_precision: nf4
  seen:    load_in_4bit: False
  allowed: load_in_4bit: true, without base_precision
  change:  use base_precision: nf4, bf16 or fp32\
"""),
        ),
        (
            "seed: 1\nseed: 2",
            snapshot("""\
run.yaml line 4: not valid YAML
  seen:    found duplicate key "seed" with value "2" (original value: "1")
  change:  fix the YAML syntax\
"""),
        ),
        (
            "seed: [1",
            snapshot("""\
run.yaml line 4: not valid YAML
  seen:    expected ',' or ']', but got '<stream end>'
  change:  fix the YAML syntax\
"""),
        ),
    ],
)
def test_a_mistake_names_file_line_key_and_what_is_allowed(written, line, said):
    assert message(written(f"model_name_or_path: m\ndataset: d.jsonl\n{line}\n")) == said


def test_all_mistakes_are_reported_together(written):
    assert message(written("lora_r: 0\nepochs: 3\n")) == snapshot("""\
the config has 4 mistakes:
  model_name_or_path: missing; Model id on the hub, or a local folder with config.json, safetensors and tokenizer.
  run.yaml line 1, lora_r: 0 (int) is not allowed; allowed: a whole number, at least 1, at most 65,536; this is F62 (solotune explain F62)
  dataset: missing; Training data: a hub id, or one or more local files (jsonl, json, csv, parquet).
  run.yaml line 2, epochs: unknown key; did you mean num_train_epochs? (Number of passes over the training rows.)
  change:  lora_r: 16\
""")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"bf16": False, "bnb_4bit_compute_dtype": "bfloat16"},
            snapshot(
                "bf16 and bnb_4bit_compute_dtype: bf16: false computes in float32, but bnb_4bit_compute_dtype is bfloat16; use the same type for both, or remove one"
            ),
        ),
        (
            {"eval_dataset": "e.jsonl", "validation_size": 0.1},
            snapshot("eval_dataset and validation_size: both are set; remove one"),
        ),
        (
            {"save_strategy": "epoch", "save_steps": 5},
            snapshot("save_strategy and save_steps: save_steps: 5 needs save_strategy: steps, not epoch"),
        ),
        (
            {"train_on_last_turn": True, "assistant_only_loss": False},
            snapshot(
                "train_on_last_turn and assistant_only_loss: train_on_last_turn: true trains on one turn, but assistant_only_loss: false trains on every token; remove one"
            ),
        ),
        (
            {"load_in_4bit": True, "base_precision": "bf16"},
            snapshot("""\
python: load_in_4bit is only an alias for base_precision: nf4
  seen:    load_in_4bit: True, base_precision: bf16
  allowed: load_in_4bit: true, without base_precision
  change:  use base_precision: nf4, bf16 or fp32\
"""),
        ),
        (
            {"base_precision": "fp8", "matmul_precision": "bf16"},
            snapshot(
                "base_precision and matmul_precision: base_precision: fp8 with matmul_precision: bf16; an fp8 base is always multiplied in fp8; remove matmul_precision, or use base_precision: bf16"
            ),
        ),
        (
            {"base_precision": "bf16", "matmul_precision": "fp8"},
            snapshot(
                "base_precision and matmul_precision: base_precision: bf16 with matmul_precision: fp8; fp8 matmuls need weights stored in fp8; use base_precision: fp8"
            ),
        ),
        (
            {"matmul_precision": "fp8", "base_residency": "quantized"},
            snapshot(
                "base_precision and matmul_precision: base_precision: nf4 with matmul_precision: fp8; fp8 matmuls keep only the fp8 weights; remove base_residency: quantized"
            ),
        ),
        (
            {"base_sharding": True, "base_offload": 3},
            snapshot(
                "base_sharding and base_offload: frozen layers lie on the GPUs, or in host memory; use base_offload: false, or base_sharding: false"
            ),
        ),
        (
            {"base_sharding": True, "base_residency": "dequantized"},
            snapshot(
                "base_residency and base_sharding: an unpacked copy of all layers is kept on each GPU, which sharding saves; use base_residency: quantized, or base_sharding: false"
            ),
        ),
    ],
)
def test_contradictions_are_refused(keys, said):
    assert message({**MINIMAL, **keys}) == said


@pytest.mark.parametrize(
    ("base", "matmuls", "fp8"),
    [
        ("nf4", "auto", False),
        ("nf4", "bf16", False),
        ("nf4", "fp8", True),
        ("fp8", "auto", True),
        ("fp8", "fp8", True),
        ("bf16", "auto", False),
        ("bf16", "bf16", False),
        ("fp32", "auto", False),
    ],
)
def test_what_is_multiplied_in_fp8(base, matmuls, fp8):
    config = load_config({**MINIMAL, "base_precision": base, "matmul_precision": matmuls})
    assert config.multiplies_in_fp8 is fp8


def test_the_one_alias():
    assert load_config({**MINIMAL, "load_in_4bit": True}).base_precision == "nf4"


def test_what_one_key_implies_for_another():
    config = load_config({**MINIMAL, "save_steps": 5, "eval_dataset": "e.jsonl"})
    assert (config.save_strategy, config.validation_size) == ("steps", 0)
    assert config.source_of("save_strategy") == "because save_steps is set"
    assert load_config(config, ["eval_steps=3"]).eval_strategy == "steps"


def test_overrides_must_be_key_value():
    assert message(MINIMAL, ["bf16"]) == snapshot("""\
command line: an override must look like key=value
  seen:    bf16
  allowed: learning_rate=1e-4\
""")
    assert message(MINIMAL, ["lora_r=x"]) == snapshot(
        "command line, lora_r: 'x' (str) is not allowed; allowed: a whole number, at least 1, at most 65,536"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            b"",
            snapshot("""\
run.yaml: a config must be lines of `key: value`
  seen:    empty
  change:  create one with: solotune init MODEL DATA\
"""),
        ),
        (
            b"- a\n- b\n",
            snapshot("""\
run.yaml: a config must be lines of `key: value`
  seen:    a list
  change:  create one with: solotune init MODEL DATA\
"""),
        ),
        (
            b"\xff\xfe\x00",
            snapshot("""\
run.yaml: not UTF-8 text
  seen:    byte 0: invalid start byte\
"""),
        ),
        (
            b"a" * (1 << 20) + b"a",
            snapshot("""\
run.yaml: too large for a config
  seen:    1,048,577 bytes
  allowed: at most 256 KiB\
"""),
        ),
    ],
)
def test_files_that_are_no_config(written, content, said):
    path = Path(written(""))
    path.write_bytes(content)
    assert message(path) == said


def test_an_absent_file_says_where_it_looked(written):
    written("")
    assert message("nope.yaml") == snapshot("""\
nope.yaml: no such config file
  seen:    looked in <tmp>
  change:  create one with: solotune init MODEL DATA\
""")


def test_every_key_has_help_a_section_and_words_for_what_it_allows():
    for key in RunConfig.model_fields:
        assert field_help(key).endswith(".")
        assert section_of(key)
        assert allowed_values(key)
    assert set(FOREIGN_KEYS.values()) <= set(RunConfig.model_fields)
    assert not set(FOREIGN_KEYS) & set(RunConfig.model_fields)


def test_the_limits_in_words_are_those_that_hold():
    """A limit of a type must not hide the narrower one of a key."""
    checked = 0
    for key in RunConfig.model_fields:
        if limit := re.fullmatch(r"a whole number, at least \d+, at most ([\d,]+)", allowed_values(key)):
            most = int(limit[1].replace(",", ""))
            assert getattr(load_config({**MINIMAL, key: most}), key) == most
            with pytest.raises(InputError, match=key):
                load_config({**MINIMAL, key: most + 1})
            checked += 1
    assert checked >= 8


def test_paths_count_from_the_working_directory_or_else_from_the_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "chats.jsonl").touch()
    (tmp_path / "both.jsonl").touch()
    (tmp_path / "mine" / "both.jsonl").touch()
    text = "model_name_or_path: model\ndataset: [chats.jsonl, both.jsonl, owner/data]\neval_dataset: none.jsonl\n"
    (tmp_path / "mine" / "a.yaml").write_text(text)
    config = load_config("mine/a.yaml")
    assert config.model_name_or_path == "mine/model"
    assert config.dataset == ["mine/chats.jsonl", "both.jsonl", "owner/data"]
    assert config.eval_dataset == "none.jsonl"  # nowhere: the message has the name as it is written
    monkeypatch.chdir(tmp_path / "mine")
    assert load_config("a.yaml").dataset == ["chats.jsonl", "both.jsonl", "owner/data"]
    assert load_config("a.yaml", ["dataset=chats.jsonl"]).dataset == "chats.jsonl"
