"""A quantised checkpoint is refused with the name of the model that it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from solotune.errors import InputError
from solotune.hub.hf_config import read_config

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
METHODS: dict[str, dict[str, Any]] = {
    "bnb 4-bit": {"quantization_config": BNB},
    "GPTQ": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "AWQ": {"quantization_config": {"quant_method": "awq"}},
    "FP8": {"quantization_config": {"quant_method": "fp8"}},
    "compressed-tensors": {"compression_config": {"quant_method": "compressed-tensors"}},
    "without a method": {"quantization_config": {}},
    "of the language model": {"text_config": {"quantization_config": BNB}},
}


def refusal(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    with pytest.raises(InputError) as caught:
        read_config(folder)
    return str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_the_original_is_named_by_the_model_card(method: str, tmp_path: Path) -> None:
    card = "---\nlicense: mit\nbase_model:\n- org/original-7B\ntags: [x]\n---\n# A model\nbase_model: org/other\n"
    (tmp_path / "README.md").write_text(card)
    text = refusal(tmp_path, _name_or_path="org/another", **METHODS[method])
    assert "the checkpoint is already quantised" in text and text.endswith("model_name_or_path: org/original-7B")


@pytest.mark.parametrize(
    ("card", "name", "found"),
    [
        ('---\nbase_model: "org/one"\n---\n', None, "org/one"),
        ("---\nbase_model: org/one\nbase_model_relation: quantized\n---\n", None, "org/one"),
        ("---\nlicense: mit\n---\nbase_model: org/text\n", "org/named", "org/named"),
        ("no front matter", "org/named", "org/named"),
        (None, "org/named", "org/named"),
        (None, "/home/somebody/model", None),
        (None, "model", None),
        (None, None, None),
    ],
)
def test_where_the_name_comes_from(card: str | None, name: str | None, found: str | None, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    change = refusal(tmp_path, _name_or_path=name, quantization_config=BNB).rpartition("change:")[2].strip()
    assert change == (f"model_name_or_path: {found}" if found else change) and ("16-bit model" in change) == (not found)


def test_mxfp4_is_read(tmp_path: Path) -> None:
    raw = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_config(tmp_path) == raw
