"""The config's door: entries 55 to 73 of the corpus of bad input, every key with eight wrong values, and no idle key.

What is wrong for a key is generated from the schema, so a new key is tested by being there. The entries have the
numbers of the project's reliability notes.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from solotune import cli
from solotune.config.load import load_config
from solotune.config.run_config import RunConfig
from solotune.errors import InputError
from tests.messages import error_in

MINIMAL = {"model_name_or_path": "m", "dataset": "d.jsonl"}
HEAD = "model_name_or_path: m\ndataset: d.jsonl\n"
SCHEMA = RunConfig.model_json_schema()["properties"]
HUGE = 10**30
LONG = "x" * 100_000


# --- every key, eight wrong values


def branches(key: str) -> list[dict[str, Any]]:
    return SCHEMA[key].get("anyOf", [SCHEMA[key]])


def types(key: str) -> set[str]:
    """JSON's names of the types that a key accepts, as its schema has them."""
    named = {branch.get("type", "") for branch in branches(key)}
    return named | {"string" for branch in branches(key) if "enum" in branch or "const" in branch}


def free_text(key: str) -> bool:
    return any(branch.get("type") == "string" and not branch.keys() & {"enum", "const"} for branch in branches(key))


def wrong_values(key: str) -> dict[str, Any]:
    """Eight kinds of wrong value; what is right for the key by its type is left out, and counted by the test."""
    kinds = types(key)
    is_text = "string" in kinds
    wrong: dict[str, Any] = {
        "another type": 7.5 if is_text or kinds & {"boolean", "array", "object"} else "seven",
        "null": None,
        "NaN": float("nan"),
        "negative": -3,
        "huge": LONG if free_text(key) else HUGE,
        "a list": [[1], {}],
        "a dict": {"a": {"b": 1}},
        "a typo of the key": "",
    }
    if "null" in kinds:
        del wrong["null"]  # empty is a value of it
    return wrong


CASES = [(key, kind, value) for key in RunConfig.model_fields for kind, value in wrong_values(key).items()]


def test_the_cases_are_all_keys_with_eight_values_and_only_empty_is_left_out_where_it_means_something() -> None:
    nullable = sum("null" in types(key) for key in RunConfig.model_fields)
    assert len(CASES) == 8 * len(RunConfig.model_fields) - nullable
    assert nullable < len(RunConfig.model_fields) / 4


@pytest.mark.parametrize("key", RunConfig.model_fields)
def test_wrong_values_are_refused_with_the_key(key: str) -> None:
    for kind, value in wrong_values(key).items():
        name = typo(key) if kind == "a typo of the key" else key
        with pytest.raises(InputError) as caught:
            load_config({**MINIMAL, name: value})
        text = str(caught.value)
        assert f"{name}:" in text or f"{name} " in text, (kind, text)
        if name != key:
            assert f"did you mean {key}?" in text
        assert len(text) < 2_000, "a value is shown, not poured out"


def typo(key: str) -> str:
    """Two neighbouring letters exchanged."""
    place = next(i for i in range(1, len(key) - 1) if key[i] != key[i + 1] and "_" not in key[i : i + 2])
    return key[:place] + key[place + 1] + key[place] + key[place + 2 :]


# --- entries 55 to 73

TEXTS = [
    (55, "unknown key", "lerning_rate: 1e-4", snapshot("""\
run.yaml line 3, lerning_rate: unknown key; did you mean learning_rate? (Peak learning rate.)
  change:  learning_rate: 0.0001\
""")),
    (56, "key in a section", "training:\n  learning_rate: 1e-4", snapshot('run.yaml line 3, training: unknown key; a config has no sections; write the keys in it without indentation')),
    (57, "key twice", "seed: 1\nseed: 2", snapshot("""\
run.yaml line 4: not valid YAML
  seen:    found duplicate key "seed" with value "2" (original value: "1")
  change:  fix the YAML syntax\
""")),
    (59, "no for false", "bf16: no", snapshot("run.yaml line 3, bf16: 'no' (str) is not allowed; allowed: true or false")),
    (59, "a clock for a number", "lora_r: 12:30", snapshot("run.yaml line 3, lora_r: '12:30' (str) is not allowed; allowed: a whole number, at least 1, at most 65,536")),
    (59, "YAML 1.1 asked for", "", snapshot("""\
run.yaml line 2: a config cannot use directives (%YAML, %TAG)
  change:  remove the line\
""")),
    (60, "rate below 0", "learning_rate: -1e-4", snapshot("""\
run.yaml line 3, learning_rate: -0.0001 (float) is not allowed; allowed: a number, above 0, at most 1; this is F64 (solotune explain F64)
  change:  learning_rate: 2e-4\
""")),
    (60, "rate 0", "learning_rate: 0", snapshot("""\
run.yaml line 3, learning_rate: 0 (int) is not allowed; allowed: a number, above 0, at most 1; this is F64 (solotune explain F64)
  change:  learning_rate: 2e-4\
""")),
    (60, "rate NaN", "learning_rate: .nan", snapshot('run.yaml line 3, learning_rate: nan (float) is not allowed; allowed: a number, above 0, at most 1')),
    (60, "rate infinite", "learning_rate: .inf", snapshot("""\
run.yaml line 3, learning_rate: inf (float) is not allowed; allowed: a number, above 0, at most 1; this is F67 (solotune explain F67)
  change:  learning_rate: 2e-4\
""")),
    (60, "rate above 1", "learning_rate: 20", snapshot("""\
run.yaml line 3, learning_rate: 20 (int) is not allowed; allowed: a number, above 0, at most 1; this is F67 (solotune explain F67)
  change:  learning_rate: 2e-4\
""")),
    (60, "warm-up longer than the run", "max_steps: 10\nwarmup_steps: 11", snapshot("""\
max_steps and warmup_steps: max_steps: 10 is less than warmup_steps: 11; this is F65 (solotune explain F65)
  change:  warmup_steps: 0, warmup_ratio: 0.03\
""")),
    (60, "warm-up 1", "warmup_ratio: 1.0", snapshot("""\
run.yaml line 3, warmup_ratio: 1.0 (float) is not allowed; allowed: a number, at least 0, below 1; this is F65 (solotune explain F65)
  change:  warmup_ratio: 0.03\
""")),
    (60, "alpha 0", "lora_alpha: 0", snapshot("""\
run.yaml line 3, lora_alpha: 0 (int) is not allowed; allowed: a number, above 0, at most 1,000,000.0; this is F61 (solotune explain F61)
  change:  lora_alpha: 32\
""")),
    (60, "r 0", "lora_r: 0", snapshot("""\
run.yaml line 3, lora_r: 0 (int) is not allowed; allowed: a whole number, at least 1, at most 65,536; this is F62 (solotune explain F62)
  change:  lora_r: 16\
""")),
    (60, "dropout 1", "lora_dropout: 1.0", snapshot('run.yaml line 3, lora_dropout: 1.0 (float) is not allowed; allowed: a number, at least 0, below 1')),
    (61, "true for 1", "lora_r: true", snapshot('run.yaml line 3, lora_r: True (bool) is not allowed; allowed: a whole number, at least 1, at most 65,536')),
    (61, "'8' for 8", "lora_r: '8'", snapshot("run.yaml line 3, lora_r: '8' (str) is not allowed; allowed: a whole number, at least 1, at most 65,536")),
    (61, "3.0 for 3", "lora_r: 3.0", snapshot('run.yaml line 3, lora_r: 3.0 (float) is not allowed; allowed: a whole number, at least 1, at most 65,536')),
    (62, "null", "learning_rate:", snapshot('run.yaml line 3, learning_rate: None (NoneType) is not allowed; allowed: a number, above 0, at most 1')),
    (62, "null as a sign", "learning_rate: ~", snapshot('run.yaml line 3, learning_rate: None (NoneType) is not allowed; allowed: a number, above 0, at most 1')),
    (63, "batch of 10^12", "per_device_train_batch_size: 1000000000000", snapshot('run.yaml line 3, per_device_train_batch_size: 1000000000000 (int) is not allowed; allowed: a whole number, at least 1, at most 65,536')),
    (63, "rows of 10^12 tokens", "max_length: 1000000000000", snapshot('run.yaml line 3, max_length: 1000000000000 (int) is not allowed; allowed: a whole number, at least 8, at most 10,000,000')),
    (64, "two documents", "---\nlora_r: 8", snapshot("""\
run.yaml line 3: a config cannot have a second document
  change:  remove the --- and what follows it\
""")),
    (64, "tab as indent", "column_mapping:\n\ta: prompt", snapshot("""\
run.yaml line 4: not valid YAML
  seen:    found character '\\t' that cannot start any token
  change:  fix the YAML syntax\
""")),
    (65, "Python object", "seed: !!python/object/apply:os.system ['touch made']", snapshot("""\
run.yaml line 3: a config cannot use tags such as tag:yaml.org,2002:python/object/apply:os.system
  change:  write the plain value instead\
""")),
    (65, "Python name", "seed: !!python/name:os.system ''", snapshot("""\
run.yaml line 3: a config cannot use tags such as tag:yaml.org,2002:python/name:os.system
  change:  write the plain value instead\
""")),
    (65, "unknown tag", "seed: !mine 3", snapshot("""\
run.yaml line 3: a config cannot use tags such as !mine
  change:  write the plain value instead\
""")),
    (66, "alias", "seed: &a 3\nlora_r: *a", snapshot("""\
run.yaml line 3: a config cannot use anchors and aliases
  change:  write the plain value instead\
""")),
    (66, "alias bomb", "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{c}: &{c} [{','.join(['*' + b] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)
    ), snapshot("""\
run.yaml line 3: a config cannot use anchors and aliases
  change:  write the plain value instead\
""")),
    (67, "deep flow", "seed: " + "[" * 5000 + "]" * 5000, snapshot("""\
run.yaml line 3: nested more than 4 levels deep
  change:  write the plain value instead\
""")),
    (67, "deep mappings", "seed: " + "{a: " * 5000 + "}" * 5000, snapshot("""\
run.yaml line 3: nested more than 4 levels deep
  change:  write the plain value instead\
""")),
    (67, "!!binary", "seed: !!binary aGk=", snapshot("""\
run.yaml line 3: a config cannot use tags such as tag:yaml.org,2002:binary
  change:  write the plain value instead\
""")),
    (67, "!!set", "seed: !!set {a, b}", snapshot("""\
run.yaml line 3: a config cannot use tags such as tag:yaml.org,2002:set
  change:  write the plain value instead\
""")),
    (67, "date", "seed: 2026-01-02", snapshot('run.yaml line 3, seed: datetime.date(2026, 1, 2) (date) is not allowed; allowed: a whole number, at least 0, below 4,294,967,296')),
    (69, "hub token", "model_revision: hf_abcdefghijklmnopqrstuvwxyz", snapshot("""\
run.yaml line 3, model_revision: this looks like a token or password, and the config is saved with the run
  seen:    ***
  change:  remove it from the config and the command line, and use an environment variable (HF_TOKEN)\
""")),
    (69, "password", "hub_password: swordfish", snapshot("""\
run.yaml line 3, hub_password: this looks like a token or password, and the config is saved with the run
  seen:    ***
  change:  remove it from the config and the command line, and use an environment variable (HF_TOKEN)\
""")),
    (69, "URL with user", "chat_template_path: https://me:swordfish@host/x", snapshot("""\
run.yaml line 3, chat_template_path: this looks like a token or password, and the config is saved with the run
  seen:    ***
  change:  remove it from the config and the command line, and use an environment variable (HF_TOKEN)\
""")),
    (70, "empty output_dir", "output_dir: ''", snapshot("run.yaml line 3, output_dir: '' (str) is not allowed; allowed: text, or empty")),
    (70, "NUL in output_dir", 'output_dir: "a\\0b"', snapshot("""\
run.yaml line 3, output_dir: a NUL character
  seen:    'a\\x00b'\
""")),
    (73, "schema of tomorrow", "schema_version: 99", snapshot('run.yaml line 3, schema_version: unknown key')),
    (73, "key of tomorrow", "quantum_annealing: true", snapshot('run.yaml line 3, quantum_annealing: unknown key')),
]  # fmt: skip


@pytest.fixture
def at_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """at_door(content or text after the two required keys) -> what `solotune train` says; all of A1 is asserted."""
    monkeypatch.chdir(tmp_path)

    def ask(text: str | bytes, *overrides: str, code: int = 2) -> str:
        Path("run.yaml").write_bytes(text if isinstance(text, bytes) else (HEAD + text + "\n").encode())
        before, started = sorted(os.listdir()), time.process_time()
        assert cli.main(["train", "run.yaml", "--json", *overrides]) == code
        out, shown = capsys.readouterr()
        assert time.process_time() - started < 10 and sorted(os.listdir()) == before
        assert "Traceback" not in shown and json.loads(out)["error"]["exit_code"] == code
        return shown

    return ask


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: f"{case[0]} {case[1]}")
def test_configs_that_are_refused(case: tuple[int, str, str, str], at_door: Any) -> None:
    _, what, text, message = case
    content = f"%YAML 1.1\n---\n{HEAD}bf16: no\n".encode() if what == "YAML 1.1 asked for" else text
    shown = at_door(content)
    assert error_in(shown) == message
    assert "swordfish" not in shown and "hf_abcdef" not in shown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", snapshot("""\
run.yaml: a config must be lines of `key: value`
  seen:    empty
  change:  create one with: solotune init MODEL DATA\
""")),
        (b"- a\n", snapshot("""\
run.yaml: a config must be lines of `key: value`
  seen:    a list
  change:  create one with: solotune init MODEL DATA\
""")),
        (b"just words\n", snapshot("""\
run.yaml: a config must be lines of `key: value`
  seen:    just words
  change:  create one with: solotune init MODEL DATA\
""")),
        (b"\xff\xfea", snapshot("""\
run.yaml: not UTF-8 text
  seen:    byte 0: invalid start byte\
""")),
        (b"a: [1\n", snapshot("""\
run.yaml line 2: not valid YAML
  seen:    expected ',' or ']', but got '<stream end>'
  change:  fix the YAML syntax\
""")),
        (b"seed: " + b"9" * 5_000 + b"\n", snapshot("""\
run.yaml: not valid YAML
  seen:    Exceeds the limit (4300 digits) for integer string conversion: value has 5000 digits; use sys.set_int_max_str_digits() to increase the limit\
""")),
        (b"? [a, b]\n: 1\n", snapshot("""\
the config has 3 mistakes:
  model_name_or_path: missing; Model id on the hub, or a local folder with config.json, safetensors and tokenizer.
  dataset: missing; Training data: a hub id, or one or more local files (jsonl, json, csv, parquet).
  run.yaml line 1, ('a', 'b'): unknown key\
""")),
        (b"1: 2\n", snapshot("""\
the config has 3 mistakes:
  model_name_or_path: missing; Model id on the hub, or a local folder with config.json, safetensors and tokenizer.
  dataset: missing; Training data: a hub id, or one or more local files (jsonl, json, csv, parquet).
  run.yaml line 1, 1: unknown key\
""")),
        (b"a: b: c\n", snapshot("""\
run.yaml line 1: not valid YAML
  seen:    mapping values are not allowed here
  change:  fix the YAML syntax\
""")),
        (b"\x00\x01", snapshot("""\
run.yaml: not valid YAML
  seen:    unacceptable character #x0000: special characters are not allowed\
""")),
    ],
    ids=["empty", "a list", "words", "not UTF-8", "cut", "digits", "a list as key", "1 as key", "colons", "NUL"],
)  # fmt: skip
def test_64_files_that_are_no_config(content: bytes, message: str, at_door: Any) -> None:
    assert error_in(at_door(content)) == message


def test_58_and_59_numbers_are_yaml_1_2(tmp_path: Path) -> None:
    for text, value in (("2e-4", 2e-4), ("1e-3", 1e-3), (".0002", 2e-4)):
        assert load_config(MINIMAL, [f"learning_rate={text}"]).learning_rate == value
    assert load_config(MINIMAL, ["seed=010"]).seed == 10
    for word in ("yes", "on", "off", "no", "y"):
        with pytest.raises(InputError, match=rf"bf16: '{word}' \(str\)"):
            load_config(MINIMAL, [f"bf16={word}"])


def test_68_nothing_is_expanded_but_a_leading_tilde_of_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", "expanded")
    for text in ("${CANARY}", "$CANARY", "$(touch made)", "{{ CANARY }}", "`touch made`", "%CANARY%"):
        assert load_config(MINIMAL, [f"output_dir='{text}'"]).output_dir == text
    assert not Path("made").exists()


def test_69_a_secret_is_not_shown_wherever_it_stands(at_door: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "Q7" * 17
    for override in (f"model_revision={token}", f"dataset=[a.jsonl, {token}]", f"hf_token={token}", f"{token}",
                     f"column_mapping={{{token}: prompt}}", f"lora_r={token}", f"api_key={token}"):  # fmt: skip
        shown = at_door("", override)
        assert token not in shown, override
    monkeypatch.setenv("MY_API_KEY", "a-secret-without-any-form")
    assert "a-secret" not in at_door("", "seed=a-secret-without-any-form")


def test_a_configs_name_cannot_write_keys_into_the_saved_config(tmp_path: Path) -> None:
    from solotune.config.write import to_yaml

    path = tmp_path / "a\nlora_r: 3 #.yaml"
    path.write_text(HEAD + "seed: 1\n")
    config = load_config(path)
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "saved.yaml").model_dump() == config.model_dump()


@pytest.mark.parametrize("name", ["x" * 300 + ".yaml", "x" * 5000, "a\0b.yaml", ".", "fifo.yaml"])
def test_config_paths_that_cannot_be(name: str, at_door: Any, capsys: pytest.CaptureFixture[str]) -> None:
    at_door("lora_r: 0")  # a folder to stand in
    if name == "fifo.yaml":
        os.mkfifo(name)
    assert cli.main(["train", name]) == 2
    assert "Traceback" not in capsys.readouterr().err
