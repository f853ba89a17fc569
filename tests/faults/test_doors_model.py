"""The model's door: entries 74 to 87 of the corpus of bad input, as mutations of one tiny sharded Llama.

Each is refused by `solotune train` with exit 2 and the place named, before a run directory exists and, but for numbers
that are not finite, before a tensor is read. transformers alone loads nine of them without a word.
`test_doors_model_config` has config.json.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from inline_snapshot import snapshot

from solotune.model import weights
from solotune.model.base_fingerprint import fingerprint_of
from tests.faults.damaged_models import (
    EMBEDDING,
    FIRST,
    INDEX,
    SECOND,
    AtDoor,
    Change,
    Q,
    config,
    first_of,
    header,
    index,
    last_of,
    linked_out,
    pickle_alone,
    shifted,
    tensors,
    text_of,
    twice,
    unlink,
    with_value,
)
from tests.messages import error_in


def test_the_folder_itself_is_good(at_door: AtDoor) -> None:
    at_door(code=0)
    assert Path("run/adapter/adapter_model.safetensors").is_file()


# --- ways to damage it; all in `model/`


MORE = {"weight_map": {}}
DAMAGED: list[tuple[int, str, Change, str]] = [
    (74, "missing shard", unlink(SECOND), snapshot("""\
model: a weight file is missing
  seen:    model-00002-of-00002.safetensors
  change:  download the folder again\
""")),
    (74, "dangling link", lambda f: (unlink(SECOND)(f), (f / SECOND).symlink_to("gone")), snapshot("""\
model: a weight file is missing
  seen:    model-00002-of-00002.safetensors
  change:  download the folder again\
""")),
    (75, "empty shard", text_of(SECOND, lambda raw: b""), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    0 bytes
  change:  download the file again\
""")),
    (76, "cut by a byte", text_of(SECOND, lambda raw: raw[:-1]), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    1 missing bytes at its end
  change:  download the file again\
""")),
    (76, "cut by half", text_of(SECOND, lambda raw: raw[: len(raw) // 2]), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    78,768 missing bytes at its end
  change:  download the file again\
""")),
    (76, "cut in the header", text_of(SECOND, lambda raw: raw[:100]), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    a header of 1,112 bytes in a file of 100
  change:  download the file again\
""")),
    (76, "a byte too many", text_of(SECOND, lambda raw: raw + b"\0"), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    1 extra bytes at its end
  change:  download the file again\
""")),
    (77, "header of 2^40", text_of(SECOND, lambda raw: struct.pack("<Q", 1 << 40) + raw[8:]), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    a header of 1,099,511,627,776 bytes in a file of 157,536
  change:  download the file again\
""")),
    (77, "header no JSON", header(lambda content: b"{]"), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    its header is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)
  change:  download the file again\
""")),
    (77, "header deep", header(lambda content: b"[" * 9000), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    its header is not valid JSON: maximum recursion depth exceeded while decoding a JSON array from a unicode string
  change:  download the file again\
""")),
    (77, "overlap", header(shifted(-4)), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    model.layers.1.input_layernorm.weight: overlaps the tensor before it
  change:  download the file again\
""")),
    (77, "hole", header(shifted(4)), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    model.layers.1.input_layernorm.weight: leaves a gap before it
  change:  download the file again\
""")),
    (77, "name twice", header(twice), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    its header is not valid JSON: the key 'lm_head.weight' appears twice
  change:  download the file again\
""")),
    (77, "shape against bytes", header(lambda c: first_of(c).update(shape=[1])), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    lm_head.weight: {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 32768]}
  change:  download the file again\
""")),
    (77, "shape below 0", header(lambda c: first_of(c).update(shape=[-64, -64])), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    lm_head.weight: {'dtype': 'F32', 'shape': [-64, -64], 'data_offsets': [0, 32768]}
  change:  download the file again\
""")),
    (77, "shape of 2^62", header(lambda c: first_of(c).update(shape=[1 << 62, 4])), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    lm_head.weight: {'dtype': 'F32', 'shape': [4611686018427387904, 4], 'data_offsets': [0, 32768]}
  change:  download the file again\
""")),
    (77, "places as texts", header(lambda c: first_of(c).update(data_offsets=["0", "4"])), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    lm_head.weight: {'dtype': 'F32', 'shape': [128, 64], 'data_offsets': ['0', '4']}
  change:  download the file again\
""")),
    (77, "no dtype", header(lambda c: first_of(c).pop("dtype")), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    lm_head.weight: {'shape': [128, 64], 'data_offsets': [0, 32768]}
  change:  download the file again\
""")),
    (77, "dtype a list", header(lambda c: first_of(c).update(dtype=["F32"])), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    lm_head.weight: {'dtype': ['F32'], 'shape': [128, 64], 'data_offsets': [0, 32768]}
  change:  download the file again\
""")),
    (77, "past the end", header(lambda c: last_of(c).update(data_offsets=[0, 1 << 50])), snapshot("""\
model/model-00002-of-00002.safetensors: not a readable safetensors file
  seen:    model.norm.weight: {'dtype': 'F32', 'shape': [64], 'data_offsets': [0, 1125899906842624]}
  change:  download the file again\
""")),
    (79, "NaN", tensors(with_value(float("nan"))), snapshot("""\
model: tensor model.layers.0.self_attn.q_proj.weight is not finite
  seen:    1 of 4,096 numbers are NaN or infinite
  change:  download the folder again, or use another model\
""")),
    (79, "infinity", tensors(with_value(float("inf"))), snapshot("""\
model: tensor model.layers.0.self_attn.q_proj.weight is not finite
  seen:    1 of 4,096 numbers are NaN or infinite
  change:  download the folder again, or use another model\
""")),
    (79, "both", tensors(lambda h: h.update({Q: h[Q] / 0 - h[Q] / 0})), snapshot("""\
model: tensor model.layers.0.self_attn.q_proj.weight is not finite
  seen:    4,096 of 4,096 numbers are NaN or infinite
  change:  download the folder again, or use another model\
""")),
    (80, "index names a tensor too many", index(lambda m: m.update({"model.x": FIRST})), snapshot("""\
model/model.safetensors.index.json: index and files differ for 1 tensors
  seen:    model.x: in model-00001-of-00002.safetensors according to the index, found in no file
  change:  download the folder again\
""")),
    (80, "index lacks a tensor", index(lambda m: m.pop(Q)), snapshot("""\
model/model.safetensors.index.json: index and files differ for 1 tensors
  seen:    model.layers.0.self_attn.q_proj.weight: not in the index, found in model-00001-of-00002.safetensors
  change:  download the folder again\
""")),
    (80, "index names another file", index(lambda m: m.update({EMBEDDING: SECOND, Q: FIRST})), snapshot("""\
model/model.safetensors.index.json: index and files differ for 1 tensors
  seen:    model.embed_tokens.weight: in model-00002-of-00002.safetensors according to the index, found in model-00001-of-00002.safetensors
  change:  download the folder again\
""")),
    (80, "index empty", text_of(INDEX, lambda raw: json.dumps(MORE).encode()), snapshot('model/model.safetensors.index.json: not a safetensors index (weight_map: tensor -> file)')),
    (80, "index no JSON", text_of(INDEX, lambda raw: b"{"), snapshot("""\
model/model.safetensors.index.json, line 1: not valid JSON
  seen:    Expecting property name enclosed in double quotes\
""")),
    (80, "index a list", text_of(INDEX, lambda raw: b"[]"), snapshot("""\
model/model.safetensors.index.json: not a JSON object
  seen:    list\
""")),
    (80, "index with numbers", index(lambda m: m.update({Q: 3})), snapshot("""\
model/model.safetensors.index.json: refers to a file outside the folder
  seen:    3
  allowed: names such as a.safetensors\
""")),
    (80, "tensor gone from file and index", tensors(lambda h: h.pop(Q)), snapshot("""\
model: the checkpoint lacks 1 tensors
  seen:    model.layers.0.self_attn.q_proj.weight
  change:  check that config.json belongs to these weights, or download the folder again\
""")),
    (80, "tensor in two files", header(lambda c: c.update({EMBEDDING: c.pop(min(c.keys() - {"__metadata__"}))})),
     snapshot("""\
model/model-00002-of-00002.safetensors: contains a tensor that is also in model-00001-of-00002.safetensors
  seen:    model.embed_tokens.weight\
""")),
    (81, "extra tensor", tensors(lambda h: h.update({"model.evil": torch.zeros(2)})), snapshot("""\
model: the checkpoint has 1 tensors that the architecture does not have
  seen:    model.evil
  change:  check that config.json belongs to these weights, or download the folder again\
""")),
    (82, "another shape", tensors(lambda h: h.update({Q: torch.zeros(3, 64)})), snapshot("""\
model/model-00001-of-00002.safetensors: tensor model.layers.0.self_attn.q_proj.weight does not fit the architecture in config.json
  seen:    F32 (3, 64)
  allowed: floating point (64, 64)\
""")),
    (82, "transposed", tensors(lambda h: h.update({Q: torch.zeros(64, 64, 1)})), snapshot("""\
model/model-00001-of-00002.safetensors: tensor model.layers.0.self_attn.q_proj.weight does not fit the architecture in config.json
  seen:    F32 (64, 64, 1)
  allowed: floating point (64, 64)\
""")),
    (82, "vocabulary", config(vocab_size=256), snapshot("""\
model/model-00001-of-00002.safetensors: tensor model.embed_tokens.weight does not fit the architecture in config.json
  seen:    F32 (128, 64)
  allowed: floating point (256, 64)\
""")),
    (83, "fewer layers in config", config(num_hidden_layers=1), snapshot("""\
model: the checkpoint has 9 tensors that the architecture does not have
  seen:    model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, model.layers.1.mlp.gate_proj.weight
  change:  check that config.json belongs to these weights, or download the folder again\
""")),
    (83, "more layers in config", config(num_hidden_layers=3), snapshot("""\
model: the checkpoint lacks 9 tensors
  seen:    model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, model.layers.2.mlp.gate_proj.weight
  change:  check that config.json belongs to these weights, or download the folder again\
""")),
    (83, "another architecture", config(model_type="gpt2"), snapshot("""\
model: the checkpoint lacks 28 tensors
  seen:    transformer.h.0.attn.c_attn.bias, transformer.h.0.attn.c_attn.weight, transformer.h.0.attn.c_proj.bias
  change:  check that config.json belongs to these weights, or download the folder again\
""")),
    (83, "experts in config", config(model_type="mixtral", num_local_experts=4), snapshot("""\
model: the checkpoint lacks 6 tensors
  seen:    model.layers.0.mlp.experts.down_proj, model.layers.0.mlp.experts.gate_up_proj, model.layers.0.mlp.gate.weight
  change:  check that config.json belongs to these weights, or download the folder again\
""")),
    (84, "int8", tensors(lambda h: h.update({Q: h[Q].to(torch.int8)})), snapshot("""\
model/model-00001-of-00002.safetensors: tensor model.layers.0.self_attn.q_proj.weight does not fit the architecture in config.json
  seen:    I8 (64, 64)
  allowed: floating point of 16 bits or more: F32, F16, BF16, F64\
""")),
    (84, "fp8", tensors(lambda h: h.update({Q: h[Q].to(torch.float8_e4m3fn)})), snapshot("""\
model/model-00001-of-00002.safetensors: tensor model.layers.0.self_attn.q_proj.weight does not fit the architecture in config.json
  seen:    F8_E4M3 (64, 64)
  allowed: floating point of 16 bits or more: F32, F16, BF16, F64\
""")),
    (85, "GPTQ", config(quantization_config={"quant_method": "gptq"}), snapshot("""\
model/config.json: the checkpoint is already quantised
  seen:    quantization_config: gptq
  allowed: 16- or 32-bit weights, which solotune quantises itself (base_precision: nf4 is 4 bits)
  change:  use the 16-bit model that it was made from (its model card names it as base_model; often the same name without -4bit or -FP8)\
""")),
    (85, "unknown method", config(quantization_config={"quant_method": "evil"}), snapshot("""\
model/config.json: the checkpoint is already quantised
  seen:    quantization_config: evil
  allowed: 16- or 32-bit weights, which solotune quantises itself (base_precision: nf4 is 4 bits)
  change:  use the 16-bit model that it was made from (its model card names it as base_model; often the same name without -4bit or -FP8)\
""")),
    (85, "no method", config(quantization_config="yes"), snapshot("""\
model/config.json: the checkpoint is already quantised
  seen:    quantization_config: yes
  allowed: 16- or 32-bit weights, which solotune quantises itself (base_precision: nf4 is 4 bits)
  change:  use the 16-bit model that it was made from (its model card names it as base_model; often the same name without -4bit or -FP8)\
""")),
    (86, "a pickle alone", pickle_alone, snapshot("""\
model: no weights in safetensors
  seen:    pytorch_model.bin
  allowed: *.safetensors; formats that can run code are not read\
""")),
    (87, "../", index(lambda m: m.update({Q: "../elsewhere.safetensors"})), snapshot("""\
model/model.safetensors.index.json: refers to a file outside the folder
  seen:    ../elsewhere.safetensors
  allowed: names such as a.safetensors\
""")),
    (87, "absolute", index(lambda m: m.update({Q: "/etc/passwd"})), snapshot("""\
model/model.safetensors.index.json: refers to a file outside the folder
  seen:    /etc/passwd
  allowed: names such as a.safetensors\
""")),
    (87, "home", index(lambda m: m.update({Q: "~/a.safetensors"})), snapshot("""\
model/model.safetensors.index.json: refers to a file outside the folder
  seen:    ~/a.safetensors
  allowed: names such as a.safetensors\
""")),
    (87, "a pickle", index(lambda m: m.update({Q: "pytorch_model.bin"})), snapshot("""\
model/model.safetensors.index.json: refers to a file outside the folder
  seen:    pytorch_model.bin
  allowed: names such as a.safetensors\
""")),
    (87, "NUL", index(lambda m: m.update({Q: "a\0.safetensors"})), snapshot("""\
model: a weight file is missing
  seen:    a␀.safetensors
  change:  download the folder again\
""")),
    (87, "link out", linked_out, snapshot("""\
model/model-00002-of-00002.safetensors: a link to a file outside the folder
  seen:    <tmp>/elsewhere.safetensors
  allowed: files in the folder itself, and links of the hub's cache
  change:  copy the file into the folder\
""")),
    (87, "link out, config", lambda f: ((f / "config.json").rename(f.parent / "c.json"),
     (f / "config.json").symlink_to("../c.json")), snapshot("""\
model/config.json: a link to a file outside the folder
  seen:    <tmp>/c.json
  allowed: files in the folder itself, and links of the hub's cache
  change:  copy the file into the folder\
""")),
    (87, "FIFO", lambda f: (unlink(SECOND)(f), os.mkfifo(f / SECOND)), snapshot('model/model-00002-of-00002.safetensors: not a regular file')),
    (87, "folder", lambda f: (unlink(SECOND)(f), (f / SECOND).mkdir()), snapshot('model/model-00002-of-00002.safetensors: not a regular file')),
    (87, "device", lambda f: (unlink("config.json")(f), (f / "config.json").symlink_to("/dev/zero")), snapshot('model/config.json: not a regular file')),
]  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: f"{case[0]} {case[1]}")
def test_damaged_models_are_refused(case: tuple[int, str, Change, str], at_door: AtDoor) -> None:
    number, _, change, message = case
    change(Path("model"))
    shown = at_door()
    assert error_in(shown) == message
    if number != 79:  # it is seen as the model loads
        assert "reading data" not in shown, "refused before anything is spent"


def test_60_a_rank_above_the_models_sizes(at_door: AtDoor) -> None:
    assert error_in(at_door(lora_r=65)) == snapshot("""\
config.yaml line 1, lora_r: larger than the layer model.layers.0.self_attn.q_proj
  seen:    lora_r: 65
  allowed: at most 64: the layer is 64 x 64
  change:  use a smaller lora_r, or remove the layer from lora_target_modules\
""")


def test_78_a_flipped_bit_is_told_where_a_fingerprint_reaches(at_door: AtDoor) -> None:
    """safetensors has no checksum: a bit inside a tensor changes nothing that is known; other weights do."""
    before = fingerprint_of(Path("model"))
    assert before == fingerprint_of(Path("model"))
    for change in (config(rms_norm_eps=1e-3), tensors(lambda h: h.update({Q: h[Q] * 1.001}))):
        shutil.copytree("model", "other")
        change(Path("other"))
        assert fingerprint_of(Path("other")) != before
        shutil.rmtree("other")


def test_links_of_the_hubs_cache_are_followed_and_no_others(at_door: AtDoor, sharded: Path) -> None:
    shutil.rmtree("model")
    inside, blobs = Path("hub/models--a--b/snapshots/abc"), Path("hub/models--a--b/blobs")
    inside.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(sharded.iterdir())):
        shutil.copy(path, blobs / str(number))
        (inside / path.name).symlink_to(f"../../blobs/{number}")
    at_door(code=0, model_name_or_path=str(inside))
    shutil.rmtree("run")
    Path("secret.json").write_bytes((inside / "config.json").read_bytes())
    (inside / "config.json").unlink()
    (inside / "config.json").symlink_to("../../../../secret.json")
    assert error_in(at_door(model_name_or_path=str(inside))) == snapshot("""\
hub/models--a--b/snapshots/abc/config.json: a link to a file outside the folder
  seen:    <tmp>/secret.json
  allowed: files in the folder itself, and links of the hub's cache
  change:  copy the file into the folder\
""")


def test_a_large_finite_weight_is_no_false_alarm() -> None:
    tensor = torch.full((64, 64), 3e38)
    weights.check_finite("m", "w", tensor)
    weights.check_finite("m", "w", torch.tensor([65504.0] * 5000, dtype=torch.float16))
    weights.check_finite("m", "w", torch.tensor([3e38, -3e38, 0.0], dtype=torch.bfloat16))
    weights.check_finite("m", "w", torch.zeros(0))
