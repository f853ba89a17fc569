"""The model's config.json at the door: entries 88 and 89 of the corpus of bad input (see `test_doors_model`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from solotune.errors import InputError
from solotune.hub.hf_config import read_config
from tests.faults.damaged_models import AtDoor, Change, config, text_of, unlink
from tests.messages import error_in

DAMAGED: list[tuple[int, str, Change, str]] = [
    (88, "auto_map", config(auto_map={"AutoModelForCausalLM": "evil.Evil"}, model_type="evil"), snapshot("""\
model/config.json: auto_map can make a loader run code from the model folder or from elsewhere
  seen:    auto_map: {'AutoModelForCausalLM': 'evil.Evil'}
  allowed: architectures of the installed transformers
  change:  remove auto_map if the model has such an architecture; otherwise use another model\
""")),
    (88, "auto_map elsewhere", config(auto_map={"AutoConfig": "org/evil--e.E"}, model_type="evil"), snapshot("""\
model/config.json: auto_map can make a loader run code from the model folder or from elsewhere
  seen:    auto_map: {'AutoConfig': 'org/evil--e.E'}
  allowed: architectures of the installed transformers
  change:  remove auto_map if the model has such an architecture; otherwise use another model\
""")),
    (88, "trust_remote_code", config(trust_remote_code=True), snapshot("""\
model/config.json: trust_remote_code can make a loader run code from the model folder or from elsewhere
  seen:    trust_remote_code: True
  allowed: architectures of the installed transformers
  change:  remove trust_remote_code if the model has such an architecture; otherwise use another model\
""")),
    (88, "attention kernel", config(attn_implementation="org/kernel"), snapshot("""\
model/config.json: attn_implementation can make a loader run code from the model folder or from elsewhere
  seen:    attn_implementation: 'org/kernel'
  allowed: architectures of the installed transformers
  change:  remove attn_implementation if the model has such an architecture; otherwise use another model\
""")),
    (88, "_attention kernel", config(_attn_implementation="org/k"), snapshot("""\
model/config.json: _attn_implementation can make a loader run code from the model folder or from elsewhere
  seen:    _attn_implementation: 'org/k'
  allowed: architectures of the installed transformers
  change:  remove _attn_implementation if the model has such an architecture; otherwise use another model\
""")),
    (88, "internal", config(_attn_implementation_internal="org/k"), snapshot("""\
model/config.json: _attn_implementation_internal can make a loader run code from the model folder or from elsewhere
  seen:    _attn_implementation_internal: 'org/k'
  allowed: architectures of the installed transformers
  change:  remove _attn_implementation_internal if the model has such an architecture; otherwise use another model\
""")),
    (88, "experts kernel", config(experts_implementation="org/k"), snapshot("""\
model/config.json: experts_implementation can make a loader run code from the model folder or from elsewhere
  seen:    experts_implementation: 'org/k'
  allowed: architectures of the installed transformers
  change:  remove experts_implementation if the model has such an architecture; otherwise use another model\
""")),
    (88, "deep inside", config(text_config={"attn_implementation": {"": "org/k"}}), snapshot("""\
model/config.json: text_config.attn_implementation can make a loader run code from the model folder or from elsewhere
  seen:    text_config.attn_implementation: {'': 'org/k'}
  allowed: architectures of the installed transformers
  change:  remove text_config.attn_implementation if the model has such an architecture; otherwise use another model\
""")),
    (88, "kernel_config", config(kernel_config={"RMSNorm": "org/k:x"}), snapshot("""\
model/config.json: kernel_config can make a loader run code from the model folder or from elsewhere
  seen:    kernel_config: {'RMSNorm': 'org/k:x'}
  allowed: architectures of the installed transformers
  change:  remove kernel_config if the model has such an architecture; otherwise use another model\
""")),
    (88, "use_kernels", config(use_kernels=True), snapshot("""\
model/config.json: use_kernels can make a loader run code from the model folder or from elsewhere
  seen:    use_kernels: True
  allowed: architectures of the installed transformers
  change:  remove use_kernels if the model has such an architecture; otherwise use another model\
""")),
    (88, "_target_", config(rope_scaling={"_target_": "os.system"}), snapshot("""\
model/config.json: rope_scaling._target_ can make a loader run code from the model folder or from elsewhere
  seen:    rope_scaling._target_: 'os.system'
  allowed: architectures of the installed transformers
  change:  remove rope_scaling._target_ if the model has such an architecture; otherwise use another model\
""")),
    (88, "custom pipelines", config(custom_pipelines={"x": {"impl": "evil.P"}}), snapshot("""\
model/config.json: custom_pipelines can make a loader run code from the model folder or from elsewhere
  seen:    custom_pipelines: {'x': {'impl': 'evil.P'}}
  allowed: architectures of the installed transformers
  change:  remove custom_pipelines if the model has such an architecture; otherwise use another model\
""")),
    (88, "line break in model_type", config(model_type="llama\nimport os"), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    model_type: 'llama\\nimport os'
  allowed: an architecture of the installed transformers; code from a model folder never runs\
""")),
    (88, "model_type a path", config(model_type="../evil"), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    model_type: '../evil'
  allowed: an architecture of the installed transformers; code from a model folder never runs\
""")),
    (88, "model_type a list", config(model_type=["llama"]), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    model_type: ['llama']
  allowed: an architecture of the installed transformers; code from a model folder never runs\
""")),
    (88, "a method replaced", config(to_dict="x"), snapshot("""\
model/config.json: to_dict is not a setting of this architecture
  seen:    to_dict: 'x'
  change:  remove to_dict\
""")),
    (88, "an attribute map", config(attribute_map={"a": "b"}), snapshot("""\
model/config.json: attribute_map is not a setting of this architecture
  seen:    attribute_map: {'a': 'b'}
  change:  remove attribute_map\
""")),
    (89, "cut", text_of("config.json", lambda raw: raw[:200]), snapshot("""\
model/config.json, line 11: not valid JSON
  seen:    Unterminated string starting at\
""")),
    (89, "empty", text_of("config.json", lambda raw: b""), snapshot("""\
model/config.json, line 1: not valid JSON
  seen:    Expecting value\
""")),
    (89, "UTF-16", text_of("config.json", lambda raw: raw.decode().encode("utf-16")), snapshot("""\
model/config.json: not valid JSON
  seen:    'utf-8' codec can't decode byte 0xff in position 0: invalid start byte\
""")),
    (89, "a list", text_of("config.json", lambda raw: b"[]"), snapshot("""\
model/config.json: not a JSON object
  seen:    list\
""")),
    (89, "key twice", text_of("config.json", lambda raw: raw.rstrip()[:-1] + b', "hidden_size": 8}'), snapshot("""\
model/config.json: not valid JSON
  seen:    the key 'hidden_size' appears twice\
""")),
    (89, "NaN", config(initializer_range=float("nan")), snapshot("""\
model/config.json: not valid JSON
  seen:    NaN is not JSON\
""")),
    (89, "a text for a number", config(hidden_size="64"), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    Validation error for field 'hidden_size': TypeError: Field 'hidden_size' expected int, got str (value: '64')\
""")),
    (89, "a list for a number", config(num_attention_heads=[4]), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    Validation error for field 'num_attention_heads': TypeError: Field 'num_attention_heads' expected int, got list (value: [4])\
""")),
    (89, "no number", config(num_hidden_layers=None), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    Validation error for field 'num_hidden_layers': TypeError: Field 'num_hidden_layers' expected int, got NoneType (value: None)\
""")),
    (89, "10^9 layers", config(num_hidden_layers=10**9), snapshot("""\
model/config.json: num_hidden_layers is too large
  seen:    1000000000
  allowed: at most 2,000\
""")),
    (89, "10^9 wide", config(hidden_size=10**9), snapshot("""\
model/config.json: hidden_size is too large
  seen:    1000000000
  allowed: at most 33,554,432\
""")),
    (89, "10^12 words", config(vocab_size=10**12), snapshot("""\
model/config.json: vocab_size is too large
  seen:    1000000000000
  allowed: at most 33,554,432\
""")),
    (89, "0 heads", config(num_attention_heads=0), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    integer modulo by zero\
""")),
    (89, "layers below 0", config(num_hidden_layers=-1), snapshot("""\
model: the checkpoint has 18 tensors that the architecture does not have
  seen:    model.layers.0.input_layernorm.weight, model.layers.0.mlp.down_proj.weight, model.layers.0.mlp.gate_proj.weight
  change:  check that config.json belongs to these weights, or download the folder again\
""")),
    (89, "dtype a module", config(torch_dtype="hub"), snapshot("""\
model/config.json: torch_dtype is not a floating-point type
  seen:    'hub'
  allowed: float32, float16, bfloat16, float64\
""")),
    (89, "no model_type", config(model_type=None), snapshot("""\
model/config.json: transformers cannot read this config
  seen:    model_type: None
  allowed: an architecture of the installed transformers; code from a model folder never runs\
""")),
    (89, "2 MiB", config(padding="x" * (2 << 20)), snapshot("""\
model/config.json: too large
  seen:    2,097,807 bytes
  allowed: at most 1,048,576 bytes\
""")),
    (89, "missing", unlink("config.json"), snapshot("""\
model: no config.json, so this is not a model folder
  allowed: a Hugging Face model folder\
""")),
    (89, "generation config", lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'),
     snapshot("""\
model/generation_config.json: eos_token_id is not a token id
  seen:    'x'\
""")),
]  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: f"{case[0]} {case[1]}")
def test_damaged_configs_are_refused(case: tuple[int, str, Change, str], at_door: AtDoor) -> None:
    _, what, change, message = case
    change(Path("model"))
    shown = at_door()
    assert error_in(shown) == message
    if what != "generation config":  # it is read as the model loads
        assert "reading data" not in shown, "refused before anything is spent"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"attn_implementation": "org/k"},
            snapshot("""\
model/config.json: attn_implementation can make a loader run code from the model folder or from elsewhere
  seen:    attn_implementation: 'org/k'
  allowed: architectures of the installed transformers
  change:  remove attn_implementation if the model has such an architecture; otherwise use another model\
"""),
        ),
        (
            {"auto_map": {}, "model_type": "evil"},
            snapshot("""\
model/config.json: auto_map can make a loader run code from the model folder or from elsewhere
  seen:    auto_map: {}
  allowed: architectures of the installed transformers
  change:  remove auto_map if the model has such an architecture; otherwise use another model\
"""),
        ),
        (
            {"text_config": {"use_kernels": 1}},
            snapshot("""\
model/config.json: text_config.use_kernels can make a loader run code from the model folder or from elsewhere
  seen:    text_config.use_kernels: 1
  allowed: architectures of the installed transformers
  change:  remove text_config.use_kernels if the model has such an architecture; otherwise use another model\
"""),
        ),
    ],
    ids=["kernel", "auto_map", "deep inside"],
)
def test_88_the_reader_of_config_json_refuses_code_itself(keys: dict[str, Any], message: str, at_door: AtDoor) -> None:
    """The tokenizer's door, through which `train` comes as well, is not the only one."""
    config(**keys)(Path("model"))
    with pytest.raises(InputError) as caught:
        read_config(Path("model"))
    assert str(caught.value) == message
